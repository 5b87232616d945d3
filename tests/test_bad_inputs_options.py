"""Options and folders that train.py refuses in one line: the value, the exit status, words that the
line has. Nothing is written."""

import os
import shlex

import pytest

import train

ROWS = [
    # numbers
    ('--seed 18446744073709551616', 2, ['--seed', '18446744073709551616']),
    ('--seed -1', 2, ['--seed', '-1']),
    ('--epochs \u0661', 2, '--epochs'),
    ('--epochs 1_0', 2, ['--epochs', '1_0']),
    ('--lr 1_0', 2, ['--lr', '1_0']),
    ('--bn_init 1,0_5', 2, ['--bn_init', '0_5']),
    ('--bn_momentum 0_1', 2, '--bn_momentum'),
    ('--evaluate a --resume b', 2, ['--evaluate', '--resume']),
    ('--lr inf', 2, ['--lr', 'inf', 'number']),
    ('--lr 1e300', 2, ['--lr', '1e300']),
    ('--lr=--', 2, '--lr'),
    (f'--epochs {"9" * 400}', 2, '--epochs'),
    (f'--epochs {"9" * 5000}', 2, '--epochs'),
    ('--dropout nan --model wrn', 2, ['--dropout', 'nan']),
    ('--dropout 1.5 --model wrn', 2, ['dropout 1.5', 'below 1']),
    ('--alpha 1e300', 2, ['--alpha', '1e300']),
    ('--bn_init 1e300,0', 2, ['--bn_init', '1e300,0']),
    ('--ngpu 99999', 2, ['--ngpu', '99999']),
    ('--lr_decay_ratio 1e37 --epoch_step [1,2]', 2, '--lr_decay_ratio'),
    (f'--lr_decay_ratio 1e37 --epoch_step {[*range(1, 30)]}'.replace(', ', ','), 2, '--lr_decay'),
    # epochs
    ('--epoch_step [2,2]', 2, ['--epoch_step', '[2,2]']),
    ('--epoch_step [true]', 2, ['--epoch_step', '[true]']),
    (f'--epoch_step {"[" * 50_000}', 2, '--epoch_step'),
    # paths
    ('--save ""', 2, '--save'),
    ('--save " "', 2, '--save'),
    (f'--save {"a" * 300}', 2, ['--save', 'too long']),
    (f'--save {"a/" * 3000}', 2, ['--save', 'too long']),
    ('--save ~nobody-here/run', 2, ['--save', '~nobody-here']),
    (f'--resume {"a" * 300}', 2, ['--resume', 'too long']),
    (f'--evaluate {"a" * 300}', 2, ['--evaluate', 'too long']),
    (f'--dataroot {"a" * 300}', 2, ['--dataroot', 'too long']),
    # devices
    ('--device meta', 2, ['--device', 'meta', 'cpu', 'cuda']),
    ('--device mps', 2, ['--device', 'mps']),
    ('--device xla', 2, ['--device', 'xla']),
    ('--device ""', 2, '--device'),
    ('--device cuda:99999999999999999999', 2, 'cuda:99999999999999999999'),
    ('--device cpu:x', 2, 'cpu:x'),
    ('--gpu_id x', 2, 'cuda:x'),
    # memory, which each of them would need 30 times over
    ('--depth 6000004', 2, ['--depth 6000004', '97,663,977,786 parameters', 'GB']),
    ('--depth 6000003', 2, ['depth 6000003', '6000004']),
    (f'--depth {6 * 10**17 + 4}', 2, [f'--depth {6 * 10**17 + 4}', 'GB']),
    ('--width 1e9', 2, ['--width 1e+09', 'parameters', 'GB']),
    ('--width 1e9 --model resnet', 2, ['--width 1e+09', 'parameters', 'GB']),
    # lines have a limit
    (f'--dataset {"x" * 100_000}', 2, ['--dataset', 'digits']),
]


@pytest.fixture
def nothing_is_built(monkeypatch):
    """Fail instead of filling the memory, if a network or a batch of an impossible size is made."""
    make_batches = train.make_batches

    def build_network(options, *_):
        pytest.fail(f'builds a network of {options["depth"]} layers')

    def make_small_batches(data, training, options, device):
        if data.preprocessing.image_size > 1000:
            pytest.fail(f'makes batches of {data.preprocessing.image_size} pixels')
        return make_batches(data, training, options, device)

    monkeypatch.setattr(train, 'build_network', build_network)
    monkeypatch.setattr(train, 'make_batches', make_small_batches)


@pytest.mark.parametrize('arguments, status, words', ROWS, ids=[row[0][:40] for row in ROWS])
def test_refused(arguments, status, words, refused, nothing_is_built, tmp_path, monkeypatch):
    arguments = shlex.split(arguments)
    others = [] if {'--save', '--dataset'} & set(arguments) else ['--save', tmp_path / 'run']
    data = [] if '--dataset' in arguments else ['--dataset', 'digits']
    monkeypatch.chdir(tmp_path)
    result = refused(status, words, train.main, *data, *arguments, *others)
    assert len(result.err) < 1500
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('options', ['', '--batch_size 1', '--recompute', '--nthread 0'])
def test_images_that_are_too_large(options, image_folder, nothing_is_built, tmp_path, refused):
    data = ('--dataset', 'folder', '--dataroot', image_folder, '--save', tmp_path / 'run')
    words = ['100000 x 100000', '--image_size', 'GB']
    refused(2, words, train.main, *data, '--image_size', 100_000, *options.split())
    assert not (tmp_path / 'run').exists()


# --- the folder of --save --------------------------------------------------------------------


def make_home(folder):
    (folder / 'thesis.tex').write_text('mine')


def make_log_of_another(folder):
    (folder / 'log.txt').write_text('mine')


def make_run_of_another(folder):
    for name in ('run.json', 'thesis.tex'):
        (folder / name).write_text('mine')


def make_pipe(folder):
    os.mkfifo(folder / 'run.json')
    (folder / 'thesis.tex').write_text('mine')


def make_subfolder(folder):
    (folder / 'photos').mkdir()


def make_file(folder):
    folder.rmdir()
    folder.write_text('mine')


FOLDERS = [
    (make_home, [], 2, 'thesis.tex'),
    (make_home, ['--resume', 'auto'], 2, 'thesis.tex'),
    (make_log_of_another, [], 2, 'log.txt'),
    (make_log_of_another, ['--resume', 'auto'], 2, 'log.txt'),
    (make_run_of_another, [], 2, 'run.json'),
    (make_pipe, [], 2, 'run.json'),
    (make_subfolder, [], 2, 'photos'),
    (make_file, [], 1, 'File exists'),
]


@pytest.mark.parametrize('make, options, status, word', FOLDERS)
def test_folder_of_others(make, options, status, word, refused, tmp_path):
    folder = tmp_path / 'folder'
    folder.mkdir()
    make(folder)
    before = sorted(tmp_path.rglob('*'))
    command = ('--dataset', 'digits', '--save', folder, *options)
    refused(status, [folder, word], train.main, *command)
    assert sorted(tmp_path.rglob('*')) == before
    assert all(path.read_text() == 'mine' for path in before if path.is_file())


@pytest.mark.parametrize('name', ['.DS_Store', 'output.txt', 'run.json.123.tmp'])
def test_folders_that_a_run_may_use(name, tmp_path):
    """An empty one, apart from hidden files and what a run or its study left there."""
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / name).write_text('')
    options = '--dataset digits --depth 10 --width 0.25 --epochs 1'
    train.main([*options.split(), '--save', str(tmp_path / 'run')])
    assert (tmp_path / 'run' / 'model.pt7').exists()

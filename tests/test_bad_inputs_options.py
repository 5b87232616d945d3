"""Options and folders that train.py refuses in one line with exit status 2: the command line, and
words that the line has. Nothing is written."""

import os
import shlex

import pytest

import train

ROWS = [
    # words
    ('--dept 34', '--dept'),
    ('extra', 'extra'),
    ('--dataset MNIST', ['MNIST', 'digits']),
    ('--model vgg', ['vgg', 'diracnet']),
    (f'--dataset {"x" * 100_000}', ['--dataset', 'digits']),  # a line has a limit
    # numbers
    ('--depth x', 'x'),
    ('--depth 0', '--depth'),
    ('--depth 20', ['20', '6n + 4']),
    ('--width 0', '--width'),
    ('--batch_size 1.5', '1.5'),
    ('--lr nan', ['--lr', 'nan']),
    ('--lr inf', ['--lr', 'inf']),
    ('--lr=--', '--lr'),
    ('--seed 18446744073709551616', ['--seed', '18446744073709551616']),
    (f'--epochs {"9" * 400}', '--epochs'),
    ('--dropout nan --model wrn', ['--dropout', 'nan']),
    ('--dropout 1.5 --model wrn', ['dropout 1.5', 'below 1']),
    ('--ema 1', ['--ema', '1']),
    ('--label_smoothing 2', ['--label_smoothing', '2']),
    ('--bn_momentum 0', '--bn_momentum'),
    ('--bn_init 0,1', ['--bn_init', '0,1']),
    ('--alpha 0', '--alpha'),
    ('--ngpu 99999', ['--ngpu', '99999']),
    ('--warmup ramp:x', ['--warmup', 'ramp:x']),
    ('--warmup jump:3', ['--warmup', 'jump:3']),
    ('--warmup 5e', ['--warmup', '5e']),
    ('--warmup ramp:nane', ['--warmup', 'nan']),
    ('--randomcrop_pad 8', '--randomcrop_pad 8'),
    ('--holdout 1437', '--holdout 1437'),
    ('--holdout 0%', '--holdout'),
    ('--holdout 100%', '--holdout'),
    # epochs
    ('--epoch_step 60', ['--epoch_step', '60']),
    ('--epoch_step [60,', ['--epoch_step', '[60,']),
    ('--epoch_step [60,30]', ['--epoch_step', '[60,30]']),
    ('--epoch_step [true]', ['--epoch_step', '[true]']),
    # paths
    ('--save ""', '--save'),
    (f'--save {"a" * 300}', ['--save', 'too long']),
    ('--save ~nobody-here/run', ['--save', '~nobody-here']),
    (f'--evaluate {"a" * 300}', ['--evaluate', 'too long']),
    # devices
    ('--device gpu', 'gpu'),
    ('--device ""', '--device'),
    ('--device cuda:99', 'cuda:99'),
    ('--gpu_id x', 'cuda:x'),
    ('--device cpu --cuda', '--cuda'),
    ('--device cpu --gpu_id 0', '--gpu_id'),
    ('--device cpu --dtype half', '--dtype half'),
    ('--device mps', 'mps'),
    ('--device xpu:1', 'xpu:1'),
    ('--device xpu --cuda', '--cuda'),
    ('--device mps --ngpu 2', '--ngpu 2'),
    # what excludes each other, or the model does not have
    ('--evaluate a --resume b', ['--evaluate', '--resume']),
    ('--schedule cosine --epoch_step [2]', ['--schedule cosine', '--epoch_step']),
    ('--sync_bn --compile', ['--sync_bn', '--compile']),
    ('--sync_bn --accumulate 2', ['--sync_bn', '--accumulate']),
    ('--warmup 5e', ['5e', 'ramp:EPOCHSe']),
    ('--accumulate 0', ['0', 'at least 1']),
    ('--recompute --compile', ['--recompute', '--compile']),
    ('--bn_momentum cumulative --compile', ['--bn_momentum cumulative', '--compile']),
    ('--model resnet --recompute', ['--recompute', 'diracnet and plain']),
    ('--device cpu --compile', ['--compile', 'cpu']),
    ('--block bn-add', ['--block', '--model diracnet', 'resnet-dirac']),
    ('--freeze stem', ['--freeze', '--pretrained']),
    ('--form imagenet', ['--form imagenet', 'digits']),
    ('--dataset CIFAR100 --recipe fast', '--recipe fast'),
    ('--dataset ImageNet --image_size 63', ['--image_size 63', '64']),
    # memory, which each of them would need 30 times over
    ('--depth 6000004', ['--depth 6000004', '97,663,977,786 parameters', 'GB']),
    ('--width 1e9 --model resnet', ['width 1e+09', 'memory']),
]


@pytest.mark.parametrize('arguments, words', ROWS, ids=[row[0][:40] for row in ROWS])
def test_refused(arguments, words, refused, tmp_path, monkeypatch):
    arguments = shlex.split(arguments)
    others = [] if '--save' in arguments else ['--save', tmp_path / 'run']
    data = [] if '--dataset' in arguments else ['--dataset', 'digits']
    monkeypatch.chdir(tmp_path)
    result = refused(2, words, train.main, *data, *arguments, *others)
    assert len(result.err) < 1500
    assert list(tmp_path.iterdir()) == []


# --- the folder of --save --------------------------------------------------------------------


def make_pipe(folder):
    os.mkfifo(folder / 'run.json')
    (folder / 'thesis.tex').write_text('mine')


FOLDERS = [
    (lambda folder: (folder / 'thesis.tex').write_text('mine'), 2, 'thesis.tex'),
    (lambda folder: (folder / 'log.txt').write_text('mine'), 2, 'log.txt'),
    (lambda folder: (folder / 'run.json').write_text('mine'), 2, 'run.json'),
    (lambda folder: (folder / 'photos').mkdir(), 2, 'photos'),
    (make_pipe, 2, 'run.json'),
    (lambda folder: (folder.rmdir(), folder.write_text('mine')), 1, 'not a folder'),
]


@pytest.mark.parametrize('options', [[], ['--resume', 'auto']])
@pytest.mark.parametrize('make, status, word', FOLDERS)
def test_folder_of_others(make, status, word, options, refused, tmp_path):
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

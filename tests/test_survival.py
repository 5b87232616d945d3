"""Runs that are stopped, killed, cut off from their disk or from their senses: nothing is lost, and they go on exactly."""

import io
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch

from lab.runs import checkpoint
from lab.runs import folder as runs
import train
from conftest import ROOT, python, read_log, same, start, without_times

DIGITS = [
    '--dataset',
    'digits',
    '--depth',
    '10',
    '--epochs',
    '4',
    '--epoch_step',
    '[2,3]',
    '--randomcrop_pad',
    '1',
    '--seed',
    '3',
]


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """The folder of an undisturbed run of DIGITS."""
    folder = tmp_path_factory.mktemp('whole') / 'run'
    train.main([*DIGITS, '--save', str(folder)])
    return folder


@pytest.fixture
def stop_at(monkeypatch):
    """stop_at(n, signal): this process really gets that signal, in the n-th batch from now on (of training or test)."""
    add, left = train.Tally.add, {}

    def counting(self, *args):
        add(self, *args)
        left['n'] = left.get('n', 0) - 1
        if left['n'] == 0:
            left['act']()

    monkeypatch.setattr(train.Tally, 'add', counting)

    def stop_at(n, number=signal.SIGTERM, act=None):
        left.update(n=n, act=act or (lambda: os.kill(os.getpid(), number)))

    return stop_at


# 23 batches to train and 6 to test an epoch: at a step, at an epoch's last one, in a test, and a step behind it
@pytest.mark.parametrize(
    'step, number',
    [
        (1, signal.SIGINT),
        (7, signal.SIGTERM),
        (23, signal.SIGTERM),
        (26, signal.SIGINT),
        (30, signal.SIGTERM),
        (29 * 3 + 22, signal.SIGTERM),
    ],
)
def test_signal_stops_and_resume_is_exact(step, number, whole, tmp_path, stop_at, call):
    stop_at(step, number)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    result = call(train.main, *DIGITS, '--save', tmp_path / 'run', '--resume', 'auto')
    assert result.status == 128 + number and result.err == ''
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    command = result.out.splitlines()[-1].strip()
    assert (
        command == f'python train.py --resume {tmp_path / "run"}'
        and signal.Signals(number).name in result.out.splitlines()[-2]
    )
    found = checkpoint.load(tmp_path / 'run')
    assert (found.epoch, found.progress['step']) == (step // 29, min(step % 29, 23))
    train.main(
        shlex.split(command)[2:]
        if step % 2
        else [*DIGITS, '--save', str(tmp_path / 'run'), '--resume', 'auto']
    )
    assert same(whole, tmp_path / 'run')
    assert without_times(whole) == without_times(tmp_path / 'run')


@pytest.mark.parametrize('workers', [0, 2])
def test_stopped_amid_image_files(workers, image_folder, tmp_path, stop_at):
    (image_folder / 'train' / 'flower' / '9.jpg').write_text('no image')
    options = [
        '--dataset',
        'folder',
        '--dataroot',
        str(image_folder),
        '--image_size',
        '64',
        '--batch_size',
        '2',
        '--epochs',
        '2',
        '--width',
        '0.25',
        '--nthread',
        str(workers),
    ]
    broken = train.Broken.SHARE
    train.Broken.SHARE = 1
    try:
        train.main([*options, '--save', str(tmp_path / 'whole')])
        for step in (3, 5):
            stop_at(step)
            with pytest.raises(SystemExit):
                train.main([*options, '--save', str(tmp_path / 'cut'), '--resume', 'auto'])
        train.main([*options, '--save', str(tmp_path / 'cut'), '--resume', 'auto'])
    finally:
        train.Broken.SHARE = broken
    assert same(tmp_path / 'whole', tmp_path / 'cut')
    assert without_times(tmp_path / 'whole') == without_times(tmp_path / 'cut')
    assert [line['train_broken'] for line in read_log(tmp_path / 'cut')] == [1, 1]


def test_killed_again_and_again(whole, tmp_path):
    """SIGKILL to real processes, which save at every step; the last goes on to a further end than the first."""
    command = [
        'train.py',
        *DIGITS,
        '--save',
        tmp_path / 'run',
        '--resume',
        'auto',
        '--checkpoint_minutes',
        '0',
    ]
    command[command.index('--epochs') + 1] = '3'

    def saved():
        """When the newest checkpoint was, wherever it is between its two renamings."""
        try:
            return (tmp_path / 'run' / 'model.pt7').stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    places = []
    for _ in range(3):
        began = saved()
        process = start(*command)
        while saved() <= began:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        found = checkpoint.load(tmp_path / 'run')
        places.append((found.epoch, (found.progress or {'step': 0})['step']))
    assert places == sorted(places) and (0, 0) < places[0] < places[-1] < (4, 0), places
    train.main(['--resume', str(tmp_path / 'run'), '--epochs', '4', '--checkpoint_minutes', '10'])
    assert same(whole, tmp_path / 'run')
    drop = ('epochs', 'checkpoint_minutes')
    lines = [
        [
            {key: value for key, value in line.items() if key not in drop}
            for line in without_times(folder)
        ]
        for folder in (whole, tmp_path / 'run')
    ]
    assert lines[0] == lines[1]


def test_a_signal_that_is_repeated(whole, tmp_path, stop_at, call, monkeypatch):
    """torchrun sends it to a process that may have it already: at once, and while it is saving."""
    write = checkpoint.write

    def signalled(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        write(*args, **kwargs)

    stop_at(
        7,
        act=lambda: [
            (
                os.kill(os.getpid(), signal.SIGTERM),
                monkeypatch.setattr(checkpoint, 'write', signalled),
            )
            for _ in range(2)
        ],
    )
    assert call(train.main, *DIGITS, '--save', tmp_path / 'run').status == 143
    monkeypatch.undo()
    assert checkpoint.load(tmp_path / 'run').progress['step'] == 7
    train.main(['--resume', str(tmp_path / 'run')])
    assert same(whole, tmp_path / 'run')


def test_output_that_can_not_be_written(tmp_path):
    """A full disk behind it is no reason to stop training; a reader that is gone is one."""
    with open('/dev/full', 'w') as full:
        subprocess.run(
            [sys.executable, 'train.py', *DIGITS, '--save', tmp_path / 'run'],
            cwd=ROOT,
            stdout=full,
            stderr=full,
        )
    assert [line['epoch'] for line in read_log(tmp_path / 'run')] == [1, 2, 3, 4]
    result = subprocess.run(
        f'{sys.executable} train.py {shlex.join(DIGITS)} --epochs 5000 --save {tmp_path / "cut"} | head -n 1',
        shell=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert 'Traceback' not in result.stderr
    assert checkpoint.load(tmp_path / 'cut').progress


def test_worker_that_is_killed(image_folder, tmp_path, stop_at, refused):
    """As for want of memory."""
    import multiprocessing

    stop_at(2, act=lambda: [child.kill() for child in multiprocessing.active_children()])
    refused(
        1,
        ['a process that decodes images died', '--nthread'],
        train.main,
        '--dataset',
        'folder',
        '--dataroot',
        image_folder,
        '--image_size',
        64,
        '--batch_size',
        1,
        '--epochs',
        3,
        '--width',
        0.25,
        '--nthread',
        1,
        '--save',
        tmp_path / 'run',
    )


def test_as_a_process(tmp_path):
    process = start('train.py', *DIGITS, '--epochs', 500, '--save', tmp_path / 'run')
    while not (tmp_path / 'run' / 'model.pt7').exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143 and err == ''
    assert f'    python train.py --resume {tmp_path / "run"}\n' in out
    assert len(read_log(tmp_path / 'run')) == checkpoint.load(tmp_path / 'run').epoch > 0


def test_auto(whole, tmp_path, call, refused):
    refused(2, ['--resume auto', '--save'], train.main, *DIGITS, '--resume', 'auto')
    result = call(train.main, *DIGITS, '--resume', 'auto', '--save', whole)
    assert result.status == 0 and 'all its 4 epochs' in result.out
    refused(
        2, ['--seed', '3', '4'], train.main, *DIGITS[:-1], '4', '--resume', 'auto', '--save', whole
    )
    # Killed before its first checkpoint: a log, and no checkpoint.
    folder = tmp_path / 'run'
    folder.mkdir()
    for name in ('log.txt', 'run.json', 'model.pt7.tmp'):
        (folder / name).write_text('')
    refused(2, folder, train.main, *DIGITS, '--save', folder)
    train.main([*DIGITS, '--epochs', '1', '--save', str(folder), '--resume', 'auto'])
    assert [line['epoch'] for line in read_log(folder)] == [1] and len(
        json.loads((folder / 'run.json').read_text())
    ) == 1


def test_one_training_in_a_folder(tmp_path, refused, monkeypatch):
    folder = tmp_path / 'run'
    process = start('train.py', *DIGITS, '--epochs', 1000, '--save', folder)
    try:
        while not (folder / 'model.pt7').exists():
            assert process.poll() is None
            time.sleep(0.05)
        monkeypatch.setattr(runs.RunFolder, 'PATIENCE', 0.3)
        refused(1, ['another process', folder], train.main, '--resume', folder)
    finally:
        process.kill()
        process.communicate()


def test_two_begun_at_once(tmp_path):
    """One of them trains; the other doesn't touch what it made."""
    commands = [['train.py', *DIGITS[:-1], seed, '--save', tmp_path / 'run'] for seed in ('1', '2')]
    processes = [start(*command) for command in commands]
    ends = [(process.communicate(timeout=120)[1], process.returncode) for process in processes]
    assert sorted(status for _, status in ends) in ([0, 1], [0, 2]), ends
    log = read_log(tmp_path / 'run')
    assert [line['epoch'] for line in log] == [1, 2, 3, 4] and len(
        {line['seed'] for line in log}
    ) == 1


def test_a_copied_checkpoint_trains_elsewhere(whole, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / 'a')
    shutil.copy(whole / 'model.pt7', tmp_path / 'a' / 'b.pt7')
    shutil.copy(whole / 'model.pt7', tmp_path / 'model.pt7')
    before = {file.name: file.read_bytes() for file in (tmp_path / 'a').iterdir()}
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / 'a' / 'b.pt7', tmp_path / 'model.pt7'):
        train.main(['--resume', str(path), '--epochs', '5'])
        [folder] = (tmp_path / 'logs').iterdir()
        assert [line['epoch'] for line in read_log(folder)] == [1, 2, 3, 4, 5]
        shutil.rmtree(folder)
    assert (
        before == {file.name: file.read_bytes() for file in (tmp_path / 'a').iterdir()}
        and not (tmp_path / 'log.txt').exists()
    )


# --- files that are broken -------------------------------------------------------------------------------------------


@pytest.fixture
def stopped(whole, tmp_path, stop_at):
    """A copy of a run that was stopped in its third epoch; its previous checkpoint is of the end of the second."""
    stop_at(29 * 2 + 9)
    with pytest.raises(SystemExit):
        train.main([*DIGITS, '--save', str(tmp_path / 'stopped')])
    return tmp_path / 'stopped'


@pytest.mark.parametrize('fault', ['truncated', 'flipped', 'empty', 'missing'])
def test_broken_newest_gives_way_to_the_one_before(fault, whole, stopped, call):
    newest = stopped / 'model.pt7'
    content = bytearray(newest.read_bytes())
    if fault == 'flipped':
        content[len(content) // 2] ^= 4
    newest.write_bytes(
        {'truncated': content[: len(content) * 2 // 3], 'empty': b''}.get(fault, content)
    )
    if fault == 'missing':  # killed between two renamings
        newest.unlink()
    good = (stopped / 'previous.pt7').read_bytes()
    result = call(train.main, '--resume', stopped)
    [line] = result.err.splitlines()
    assert str(newest) in line and str(stopped / 'previous.pt7') in line and 'epoch 2' in line
    assert same(whole, stopped)
    assert without_times(whole) == without_times(stopped)
    # The first save after it did not put the broken one in the good one's place: that has been overtaken only by a good one.
    assert (stopped / 'previous.pt7').read_bytes() != good and checkpoint._load(
        stopped / 'previous.pt7'
    ).epoch == 3


def test_both_broken(stopped, refused):
    for name in ('model.pt7', 'previous.pt7'):
        (stopped / name).write_bytes((stopped / name).read_bytes()[:-1000])
    refused(1, ['model.pt7', 'previous.pt7'], train.main, '--resume', stopped)


def test_every_flipped_bit_is_noticed_or_of_no_consequence(whole, tmp_path):
    content = (whole / 'model.pt7').read_bytes()
    expected = torch.load(whole / 'model.pt7', weights_only=True)
    random, noticed = np.random.default_rng(0), 0
    for place in random.integers(0, len(content), 300):
        flipped = bytearray(content)
        flipped[place] ^= 1 << random.integers(0, 8)
        (tmp_path / 'model.pt7').write_bytes(flipped)
        try:
            found = checkpoint.load(tmp_path / 'model.pt7')
        except checkpoint.UserError:
            noticed += 1
            continue
        assert all(
            torch.equal(found.params[key], tensor) for key, tensor in expected['params'].items()
        )  # in padding, or a date
        assert all(
            torch.equal(found.optimizer['state'][i]['momentum_buffer'], state['momentum_buffer'])
            for i, state in expected['optimizer']['state'].items()
        )
    assert noticed > 200
    shutil.copy(whole / 'previous.pt7', tmp_path / 'previous.pt7')
    for length in [
        *range(0, 300, 3),
        *random.integers(0, len(content), 200),
        *range(len(content) - 300, len(content), 3),
    ]:
        (tmp_path / 'model.pt7').write_bytes(content[:length])
        assert checkpoint.load(tmp_path / 'model.pt7').path == tmp_path / 'previous.pt7', length


def test_bombs(tmp_path, refused):
    """Archives that unpack to far more than they are."""
    zeros = io.BytesIO()
    with zipfile.ZipFile(zeros, 'w', zipfile.ZIP_DEFLATED) as archive:
        with archive.open('archive/data.pkl', 'w', force_zip64=True) as entry:
            for _ in range(100):
                entry.write(bytes(10**7))
    nested = zeros.getvalue()
    for _ in range(3):
        outer = io.BytesIO()
        with zipfile.ZipFile(outer, 'w', zipfile.ZIP_DEFLATED) as archive:
            for i in range(10):
                archive.writestr(f'archive/data/{i}', nested)
        nested = outer.getvalue()
    stored = io.BytesIO()
    with zipfile.ZipFile(stored, 'w') as archive:
        archive.writestr('archive/data/0', nested)
    limit = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + 2e8
    for content in (zeros.getvalue(), nested, stored.getvalue()):
        (tmp_path / 'bomb.pt7').write_bytes(content)
        refused(1, 'bomb.pt7', train.main, '--resume', tmp_path / 'bomb.pt7')
        refused(1, 'bomb.pt7', train.main, '--evaluate', tmp_path / 'bomb.pt7')
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < limit


@pytest.mark.parametrize(
    'part, value',
    [
        ('network', []),
        ('network', {'depth': 10}),
        ('network', 'width'),
        ('classes', 3),
        ('preprocessing', {'channels': 1}),
        ('epoch', 'four'),
        ('epoch', -1),
        ('optimizer', {'state': 3}),
        ('progress', {'step': 2}),
        ('progress', {'step': 2, 'tally': {}, 'time': 1.0, 'broken': {}}),
        ('log', [3]),
        ('params', {3: torch.zeros(2)}),
        ('params', {'conv': 'no tensor'}),
        ('params', 'nan'),
    ],
)
def test_well_formed_files_of_wrong_contents(part, value, whole, tmp_path, refused):
    content = torch.load(whole / 'model.pt7', weights_only=True)
    if value == 'nan':
        content['params']['fc.bias'][0] = float('nan')
    else:
        content[part] = {**content['network'], 'width': 1e5} if value == 'width' else value
    torch.save(content, tmp_path / 'model.pt7')
    what = (
        ['--evaluate', tmp_path / 'model.pt7']
        if value == 'width'
        else ['--resume', tmp_path / 'model.pt7', '--epochs', 9]
    )
    refused(1, tmp_path / 'model.pt7', train.main, *what, '--save', tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_another_network_is_told_apart(whole, refused):
    """By the first keys that differ, both shapes, and the flags that would fit."""
    fits = '--model diracnet --depth 10 --width 1 --dataset digits'
    for option, value, words in (
        ('--depth', 16, ['16', '10', 'group0.block2.conv', 'missing', '(16, 16, 3, 3)']),
        ('--width', 2, ['2', '1', 'conv is (16, 1, 3, 3) there and (32, 1, 3, 3)']),
        (
            '--model',
            'plain',
            ['plain', 'diracnet', 'group0.block0.alpha is (16,) there and missing'],
        ),
        ('--dataset', 'CIFAR10', ['CIFAR10', 'digits', '(16, 3, 3, 3)']),
        ('--depth', 12, ['12', '10']),
    ):
        for main in ('--resume', '--evaluate'):
            refused(2, [option, *words, fits], train.main, main, whole, option, value)


# --- a disk that is full, or read-only -------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 4 MB, where this user may mount one."""
    folder = tmp_path / 'disk'
    folder.mkdir()
    if (
        sys.platform != 'linux'
        or subprocess.run(
            ['mount', '-t', 'tmpfs', '-o', 'size=4m', 'none', folder], capture_output=True
        ).returncode
    ):
        pytest.skip('needs the right to mount')
    yield folder
    subprocess.run(['umount', '-l', folder], check=True)


@pytest.mark.parametrize('fault', ['full', 'read-only'])
def test_disk(fault, whole, small_disk, call, monkeypatch):
    end = train.Training.on_end_epoch

    def on_end_epoch(self, state):
        if state['epoch'] == 2:
            if fault == 'full':
                with pytest.raises(OSError), open(small_disk / 'other', 'wb') as file:
                    file.write(bytes(5_000_000))
            else:
                subprocess.run(['mount', '-o', 'remount,ro', small_disk], check=True)
        end(self, state)

    monkeypatch.setattr(train.Training, 'on_end_epoch', on_end_epoch)
    folder = small_disk / 'run'
    result = call(train.main, *DIGITS, '--save', folder)
    assert result.status == 1
    assert (
        'epoch 4/4' in result.out and 'done' not in result.out
    )  # it went on, and it doesn't call it a success
    assert (
        str(folder / 'model.pt7') in result.err
        and {'full': 'No space left', 'read-only': 'Read-only'}[fault] in result.err
    )
    assert 'epoch 1 stands' in result.err
    found = checkpoint.load(folder)
    assert found.epoch == 1 and not list(folder.glob('*.tmp'))
    monkeypatch.undo()
    if fault == 'full':
        (small_disk / 'other').unlink()
    else:
        subprocess.run(['mount', '-o', 'remount,rw', small_disk], check=True)
    train.main(['--resume', str(folder)])
    assert same(whole, folder)
    assert without_times(whole) == without_times(folder)


def test_disk_full_from_the_start(small_disk, refused):
    with pytest.raises(OSError), open(small_disk / 'other', 'wb') as file:
        file.write(bytes(5_000_000))
    refused(1, ['run.json', 'No space left'], train.main, *DIGITS, '--save', small_disk / 'run')


def test_checkpoint_larger_than_files_may_be(tmp_path):
    """A write that fails midway, without the right to mount: the limit on a file's size."""
    result = subprocess.run(
        [sys.executable, 'train.py', *DIGITS, '--save', tmp_path / 'run'],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)),
    )
    assert result.returncode == 1 and 'Traceback' not in result.stderr
    assert (
        'model.pt7 can not be written (File too large), and there is no checkpoint yet'
        in result.stderr
    )
    assert sorted(file.name for file in (tmp_path / 'run').iterdir()) == ['log.txt', 'run.json']


# --- losses that are no numbers --------------------------------------------------------------------------------------


def test_loss_that_is_not_finite(tmp_path, refused):
    """A learning rate that rises to 1e30 in the third epoch."""
    options = [
        '--dataset',
        'digits',
        '--depth',
        '10',
        '--lr',
        '1e-3',
        '--lr_decay_ratio',
        '1e33',
        '--epoch_step',
        '[3]',
    ]
    result = refused(
        1,
        ['the loss is', 'of epoch 3', str(tmp_path / 'run' / 'model.pt7'), 'epoch 2'],
        train.main,
        *options,
        '--epochs',
        '6',
        '--save',
        tmp_path / 'run',
        '--checkpoint_minutes',
        '0.001',
    )
    found = checkpoint.load(tmp_path / 'run')
    assert found.place in result.err
    assert all(tensor.isfinite().all() for tensor in found.params.values())
    assert [line['epoch'] for line in read_log(tmp_path / 'run')] == [1, 2]
    shutil.copytree(tmp_path / 'run', tmp_path / 'again')
    refused(
        1,
        ['the loss is', 'of epoch 3', str(tmp_path / 'again')],
        train.main,
        '--resume',
        tmp_path / 'again',
    )  # from there: to the same end


def test_help_says_so():
    text = python('train.py', '--help').out
    assert 'auto' in text and '--checkpoint_minutes' in text and 'torchrun' in text

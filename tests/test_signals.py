"""lab/runs/signals.py: runs that are stopped or killed lose nothing, and resume exactly."""

import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
from data_helpers import run_folder

import train
from conftest import ROOT, SHORT_RUN, read_log, same, start, without_times
from lab.runs import checkpoint
from lab.training.broken_images import BrokenImages


# An epoch has 23 training and 6 test batches: in an epoch, at its last step, in a test, and in the
# last epoch.
@pytest.mark.parametrize(
    'batch, number',
    [(7, signal.SIGINT), (23, signal.SIGTERM), (26, signal.SIGINT), (109, signal.SIGTERM)],
)
def test_signal_stops_and_resume_is_exact(batch, number, short_run, tmp_path, stop_at, call):
    folder = tmp_path / 'run'
    options = [*SHORT_RUN, '--save', str(folder), '--resume', 'auto']
    stop_at(batch, number)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    result = call(train.main, *options)
    assert result.status == 128 + number and result.err == ''
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers

    message, command = result.out.splitlines()[-2:]
    assert signal.Signals(number).name in message
    assert command.strip() == f'python train.py --resume {folder}'
    loaded = checkpoint.load(folder)
    assert (loaded.epoch, loaded.progress['step']) == (batch // 29, min(batch % 29, 23))

    train.main(shlex.split(command)[2:] if batch % 2 else options)
    assert same(short_run, folder)
    assert without_times(short_run) == without_times(folder)


def test_stopped_within_image_files(image_folder, tmp_path, stop_at, monkeypatch):
    """Broken images are counted and replaced as in an undisturbed run."""
    (image_folder / 'train' / 'flower' / '9.jpg').write_text('not an image')
    monkeypatch.setattr(BrokenImages, 'LIMIT', 1)
    options = '--dataset folder --image_size 64 --batch_size 2 --epochs 2 --width 0.25'
    data = ('--dataroot', str(image_folder), '--nthread', '2')
    command = [*options.split(), *data]
    whole, cut = tmp_path / 'whole', tmp_path / 'cut'
    train.main([*command, '--save', str(whole)])
    for batch in (3, 5):
        stop_at(batch)
        with pytest.raises(SystemExit):
            train.main([*command, '--save', str(cut), '--resume', 'auto'])
    train.main([*command, '--save', str(cut), '--resume', 'auto'])
    assert same(whole, cut)
    assert without_times(whole) == without_times(cut)
    assert [line['train_broken'] for line in read_log(cut)] == [1, 1]


def test_killed_repeatedly(short_run, tmp_path):
    """SIGKILL to processes that save at every step; the last one trains for one epoch more."""
    folder = tmp_path / 'run'
    command = ['train.py', *SHORT_RUN, '--epochs', '3', '--checkpoint_minutes', '0']
    command += ['--save', folder, '--resume', 'auto']

    def saved_at():
        try:
            return (folder / 'model.pt7').stat().st_mtime_ns
        except FileNotFoundError:  # between two renamings, or not yet
            return 0

    positions = []
    for _ in range(2):
        before = saved_at()
        process = start(*command)
        while saved_at() <= before:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        loaded = checkpoint.load(folder)
        positions.append((loaded.epoch, loaded.progress['step'] if loaded.progress else 0))
    assert positions == sorted(positions), positions
    assert (0, 0) < positions[0] < positions[-1] < (4, 0), positions

    train.main(['--resume', str(folder), '--epochs', '4', '--checkpoint_minutes', '10'])
    assert same(short_run, folder)
    lines = {path: without_times(path) for path in (short_run, folder)}
    for line in (*lines[short_run], *lines[folder]):
        del line['epochs'], line['checkpoint_minutes']
    assert lines[short_run] == lines[folder]


def test_repeated_signal(short_run, tmp_path, stop_at, call, monkeypatch):
    """torchrun sends a signal to a process that may have it already: at once, and during the
    save."""
    save = checkpoint.save

    def signal_and_save(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        save(*args, **kwargs)

    def signal_twice():
        monkeypatch.setattr(checkpoint, 'save', signal_and_save)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)

    stop_at(7, act=signal_twice)
    assert call(train.main, *SHORT_RUN, '--save', tmp_path / 'run').status == 143
    monkeypatch.undo()
    assert checkpoint.load(tmp_path / 'run').progress['step'] == 7
    train.main(['--resume', str(tmp_path / 'run')])
    assert same(short_run, tmp_path / 'run')


def test_output_that_cannot_be_written(tmp_path):
    """A full disk does not stop training, but is an error at its end; a reader of the output that
    has ended stops it."""
    command = [sys.executable, 'train.py', *SHORT_RUN, '--save']
    with open('/dev/full', 'w') as full:
        result = subprocess.run(
            [*command, tmp_path / 'run'], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert result.returncode == 1 and 'No space left' in result.stderr
    assert [line['epoch'] for line in read_log(tmp_path / 'run')] == [1, 2, 3, 4]
    line = shlex.join([*command, str(tmp_path / 'cut'), '--epochs', '5000'])
    result = subprocess.run(
        f'{line} | head -n 1', shell=True, cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert 'Traceback' not in result.stderr
    assert checkpoint.load(tmp_path / 'cut').progress


def test_worker_that_is_killed(image_folder, tmp_path, stop_at, refused):
    """As by a system that is out of memory."""

    def kill_workers():
        for child in multiprocessing.active_children():
            child.kill()

    stop_at(2, act=kill_workers)
    command = '--dataset folder --image_size 64 --batch_size 1 --epochs 3 --width 0.25 --nthread 1'
    data = ('--dataroot', image_folder, '--save', tmp_path / 'run')
    refused(1, ['decodes images', '--nthread'], train.main, *command.split(), *data)


@pytest.mark.parametrize('number, begun', [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_signal_to_all_processes(number, begun, many_files, tmp_path):
    """As schedulers and terminals send it: the processes that decode images leave it to the main
    process, which saves, and they end with it. Also if it comes while they start."""
    folder = tmp_path / 'run'
    options = ('--epochs', 500, '--nthread', 4)
    process = start('train.py', *run_folder(many_files, folder, *options), start_new_session=True)
    while begun and not (folder / 'model.pt7').exists():
        assert process.poll() is None
        time.sleep(0.05)
    while not begun and 'learning rate' not in process.stdout.readline():
        assert process.poll() is None
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (128 + number, '') and 'stopped by' in out
    assert checkpoint.load(folder).position in out
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)

"""lab/distributed.py: several real processes that get signals or die, and resume."""

import json
import os
import signal

from torchrun_helpers import DIGITS, end, needs_proc, processes_of, torchrun, until

import train
from conftest import python, read_log, same, start, without_times
from lab.runs import checkpoint


def test_ngpu_stops_at_a_signal_and_resumes_in_one_process(tmp_path):
    """A run of python train.py --ngpu 2 gets a signal, resumes in one process, and is tested by
    three."""
    folder = tmp_path / 'run'
    process = start('train.py', *DIGITS, '--epochs', 300, '--save', folder, '--ngpu', 2)
    until(lambda: (folder / 'log.txt').exists() and len(read_log(folder)) >= 2, process)
    process.send_signal(signal.SIGTERM)
    text = end(process, 143)
    assert f'    python train.py --resume {folder} --device cpu --ngpu 2\n' in text
    assert text.count('stopped by SIGTERM') == 1

    loaded = checkpoint.load(folder)
    assert loaded.progress and loaded.epoch >= 2
    resume = ['--resume', str(folder), '--device', 'cpu', '--epochs']
    train.main([*resume, str(loaded.epoch + 1)])
    train.main([*resume, str(loaded.epoch + 2), '--sync_bn'])  # for one process, the same
    log = read_log(folder)
    assert [line['epoch'] for line in log] == list(range(1, loaded.epoch + 3))
    assert (log[0]['ngpu'], log[-1]['ngpu']) == (2, 1)

    text = end(torchrun('train.py', '--evaluate', folder, '--device', 'cpu', n=3))
    [line] = [line for line in text.splitlines() if line.startswith('json_stats')]
    assert f'"test_acc": {log[-1]["test_acc"]}' in line and '"n": 360' in line


@needs_proc
def test_restart_of_a_killed_worker(tmp_path):
    """With --max-restarts the run ends as if it had not been killed."""
    whole, killed = tmp_path / 'whole', tmp_path / 'killed'
    options = '--epochs 6 --resume auto --checkpoint_minutes 0.005 --save'
    command = ['train.py', *DIGITS, *options.split()]
    end(torchrun(*command, whole))
    process = torchrun('--max-restarts=1', *command, killed)
    until(lambda: (killed / 'log.txt').exists() and len(read_log(killed)) >= 2, process)
    os.kill(processes_of(killed)[1], signal.SIGKILL)
    end(process)
    assert len(json.loads((killed / 'run.json').read_text())) == 2  # it was started twice
    assert same(whole, killed)
    assert without_times(whole) == without_times(killed)


def test_ngpu_ends_with_one_line(tmp_path):
    """1437 samples are two batches of 718 and one of 1, too small for two processes."""
    command = ('train.py', *DIGITS, '--batch_size', 718, '--save', tmp_path / 'run', '--ngpu', 2)
    result = python(*command)
    assert result.status == 2 and result.err.count('\n') == 1, result.err
    assert result.err.startswith('train.py: --batch_size 718') and not (tmp_path / 'run').exists()


def endless_run(begin, folder, *options, **kwargs):
    """A running torchrun with two processes, that has saved its first checkpoint."""
    command = ('train.py', *DIGITS, '--epochs', '5000', '--save', folder, *options)
    process = begin(*command, **kwargs)
    until(lambda: (folder / 'model.pt7').exists(), process)
    return process


@needs_proc
def test_a_rank_that_dies_ends_the_others(tmp_path):
    folder = tmp_path / 'run'
    process = endless_run(start, folder, '--ngpu', 2)
    os.kill(processes_of(folder)[0], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and not processes_of(folder)
    lines = err.splitlines()  # of the other rank, and of the one that started both
    assert 1 <= len(lines) <= 2 and all(line.startswith('train.py') for line in lines), err
    assert checkpoint.load(folder).is_run


@needs_proc
def test_a_signal_to_one_rank_saves_all(tmp_path):
    """With a slow disk: the others wait for rank 0, and torchrun, which repeats the signal, does
    not cut its save short."""
    folder, slow = tmp_path / 'run', tmp_path / 'slow'
    slow.mkdir()
    (slow / 'sitecustomize.py').write_text(
        'import os, time\n'
        'fsync = os.fsync\n'
        'os.fsync = lambda file: (time.sleep(0.5), fsync(file))\n'
    )
    process = endless_run(torchrun, folder, path=slow)
    os.kill(processes_of(folder)[0], signal.SIGTERM)
    text = end(process, 1, timeout=60)
    assert text.count('stopped by SIGTERM') == 1
    assert f'torchrun --nproc_per_node=2 train.py --resume {folder}' in text
    assert checkpoint.load(folder).progress and not list(folder.glob('*.tmp'))


@needs_proc
def test_workers_do_not_outlive_torchrun(tmp_path):
    """They save, and end."""
    folder = tmp_path / 'run'
    process = endless_run(torchrun, folder)
    process.kill()
    out, _ = process.communicate(timeout=30)  # their pipes close when the last one ends
    assert not processes_of(folder)
    assert 'stopped by SIGTERM' in out and checkpoint.load(folder).progress

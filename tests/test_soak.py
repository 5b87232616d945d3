"""Trainings that are killed at random moments, until they finish, end as if nothing had happened.

    python -m pytest -n 0 -m slow      # some minutes

A run is killed and resumed until one start reaches its last epoch. Sometimes its newest checkpoint
is cut off in between. tests/test_signals.py stops runs with images in files, and
tests/test_folder.py fills the disk.
"""

import os
import random
import signal
import subprocess
import time

import pytest
from torchrun_helpers import DIGITS, needs_proc, processes_of, torchrun

from conftest import read_log, same, start, without_times

RUN = ['train.py', *DIGITS, '--epochs', '60', '--epoch_step', '[30,50]', '--randomcrop_pad', '1']
RUN += ['--resume', 'auto']
MINUTES = ('0', '0.005', '10')  # checkpoints at every step; every 0.3 s; after epochs only
PATIENCE = 90  # seconds in which all processes of a killed run must have ended


def log_of(folder):
    """The epochs in a run's log without what may differ."""
    lines = without_times(folder) if (folder / 'log.txt').exists() else []
    return [{**line, 'checkpoint_minutes': 0} for line in lines]


def kill(process, folder, chance):
    """SIGKILL to one of the processes of a run; the others have to end as well."""
    victims = [process.pid, *processes_of(folder).values()]
    os.kill(chance.choice(victims), signal.SIGKILL)
    process.communicate(timeout=PATIENCE)  # their pipes close when the last one ends


def survives(process, seconds):
    """Whether a process is still running after this time; if not, it has succeeded."""
    try:
        _, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return True
    assert process.returncode == 0, err
    return False


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize('begin', [start, torchrun])
def test_killed_at_random_moments(begin, tmp_path):
    seed = random.randrange(10**6)
    print(f'seed {seed}')
    chance = random.Random(seed)
    whole, killed = tmp_path / 'whole', tmp_path / 'killed'
    began = time.monotonic()
    assert not survives(begin(*RUN, '--save', whole), seconds=600)
    duration = time.monotonic() - began

    kills = 0
    while True:
        process = begin(*RUN, '--checkpoint_minutes', chance.choice(MINUTES), '--save', killed)
        if not survives(process, chance.uniform(0, 0.7 * duration)):
            break
        kill(process, killed, chance)
        kills += 1
        log = log_of(killed)
        assert log == log_of(whole)[: len(log)]
        newest = killed / 'model.pt7'
        if newest.exists() and (killed / 'previous.pt7').exists() and chance.random() < 0.15:
            os.truncate(newest, chance.randrange(newest.stat().st_size))
    assert kills > 0
    assert same(whole, killed) and log_of(whole) == log_of(killed)
    assert [line['epoch'] for line in read_log(killed)] == list(range(1, 61))

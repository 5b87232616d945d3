"""The soak: it finds what differs, and damages what it means to."""

import os
import random
import shutil
import signal
import subprocess

import pytest
import torch
from torchrun_helpers import needs_proc, until

from lab.data import datasets
from lab.errors import UserError
from lab.runs import checkpoint
from tools.soak import __main__ as soak
from tools.soak import cases, killing

CASE = cases.CASES['one']


def test_differences(digits_run, tmp_path):
    other = tmp_path / 'other'
    shutil.copytree(digits_run, other)
    assert killing.differences(digits_run, other) == []
    content = torch.load(other / 'model.pt7', weights_only=True)
    content['params']['fc.bias'][0] += 1e-6
    content['optimizer']['state'][0]['momentum_buffer'].view(-1)[0] += 1e-6
    torch.save(content, other / 'model.pt7')
    log = (other / 'log.txt').read_text().splitlines(keepends=True)
    (other / 'log.txt').write_text(''.join(log[:-1]))
    assert killing.differences(digits_run, other) == ['fc.bias', 'momentum 0', 'log.txt']


@pytest.mark.parametrize('seed', range(4))
def test_damage(digits_run, tmp_path, seed):
    path = tmp_path / 'damaged.pt7'
    shutil.copy(digits_run / 'model.pt7', path)
    before = path.read_bytes()
    kind = killing.damage(path, random.Random(seed))
    after = path.read_bytes()
    flipped = sum((a ^ b).bit_count() for a, b in zip(before, after))
    if len(after) < len(before):
        assert (kind, flipped) == ('cut off', 0)
    else:
        assert (kind, flipped) == ('one bit flipped', 1)
    with pytest.raises(UserError, match='damaged.pt7'):
        checkpoint.load(path)


@pytest.fixture
def worker(digits_run, tmp_path, monkeypatch):
    """A Soak in its first run's first start, which damages nothing."""
    monkeypatch.setattr(killing, 'DAMAGE_PROBABILITY', 0)
    worker = killing.Soak(CASE, 0, tmp_path / 'work', digits_run, duration=1)
    worker.starts.append(1)
    return worker


def test_a_killed_run_is_checked(worker, digits_run, tmp_path):
    killed = tmp_path / 'killed'
    killed.mkdir()
    assert worker.check_position(killed, (0, 0)) == (0, 0)  # killed before the first checkpoint
    for name in ('model.pt7', 'log.txt'):
        shutil.copy(digits_run / name, killed)
    assert worker.check_position(killed, (7, 3)) == (8, 0)
    assert worker.check_position(killed, (8, 0)) == (8, 0)
    worker.check_log(killed)
    assert list(worker.counts.values()) == [1, 1, 1]
    assert worker.faults == []
    assert worker.check_position(killed, (8, 1)) == (8, 0)  # progress was lost
    lines = (killed / 'log.txt').read_text().splitlines(keepends=True)
    (killed / 'log.txt').write_text(''.join(lines[1:]))
    worker.check_log(killed)
    (killed / 'model.pt7').write_bytes(b'')
    assert worker.check_position(killed, (8, 0)) == (8, 0)
    assert [fault.split(':')[0] for fault in worker.faults] == ['run 1, start 1'] * 3
    for fault, word in zip(worker.faults, ('(8, 1)', 'log.txt', 'model.pt7')):
        assert word in fault


def test_damage_makes_the_run_resume_earlier(worker, digits_run, tmp_path, monkeypatch):
    monkeypatch.setattr(killing, 'DAMAGE_PROBABILITY', 1)
    killed = tmp_path / 'killed'
    shutil.copytree(digits_run, killed)
    assert worker.check_position(killed, (8, 0)) == (7, 0)
    assert worker.check_position(killed, (7, 0)) == (7, 0)  # not damaged twice
    assert sum(n for event, n in worker.counts.items() if 'damaged' in event) == 1


def test_summary(worker, digits_run, monkeypatch):
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    worker.counts['kills'] = 3
    worker.compare(digits_run)
    text = soak.summary(CASE, [worker], '--kills 3', minutes=2.4)
    assert '| kills | 3 |' in text
    assert '| faults | 0 |' in text
    worker.add_fault('exit status 1')
    assert '- run 1, start 1: exit status 1' in soak.summary(
        CASE, [worker], '--kills 3', minutes=2.4
    )


def test_a_training_that_fails(tmp_path, call, monkeypatch):
    monkeypatch.setitem(soak.CASES, 'one', cases.Case(f'{CASE.command} --lr fast'))
    result = call(soak.main, 'one', '--kills', 1)
    assert result.status == 1
    assert '--lr' in result.err


# --- the means to disturb --------------------------------------------------------------------


@needs_proc
def test_family():
    """A process, the two that it started, and the one that one of these started."""
    process = subprocess.Popen(['sh', '-c', 'sleep 60 & sh -c "sleep 60 & wait" & wait'])
    until(lambda: len(cases.family(process.pid)) == 4, process)
    first, *others = cases.family(process.pid)
    assert first == process.pid
    process.kill()
    for member in others:
        os.kill(member, signal.SIGKILL)
    process.wait()
    assert cases.family(process.pid) == [process.pid]


def test_a_run_that_outlives_the_kill(worker, monkeypatch):
    monkeypatch.setattr(killing, 'PATIENCE', 0.2)
    process = subprocess.Popen(
        ['sleep', '60'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    worker.wait_for_all(process, [process.pid])
    assert process.returncode == -signal.SIGKILL and len(worker.faults) == 1


def test_a_disk_that_fills(worker, digits_run, monkeypatch, tmp_path):
    monkeypatch.setattr(worker, 'case', cases.CASES['disk'])
    folder = worker.work
    try:
        with cases.small_disk(folder):
            worker.fill_disk()
            with pytest.raises(OSError):
                (folder / 'more').write_bytes(bytes(1_000_000))
            assert worker.judge_end(1, 'model.pt7: No space left on device')
            assert not worker.faults and not worker.judge_end(1, 'Traceback') and worker.faults
    except UserError as error:
        pytest.skip(str(error))
    assert not list(folder.iterdir())


def test_images(tmp_path):
    cases.write_images(tmp_path, n=3)
    data = datasets.load('folder', tmp_path, image_size=64)
    assert len(data.train) == len(data.test) == 30 and len(data.classes) == 10

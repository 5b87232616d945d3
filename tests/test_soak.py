"""The soak: it finds what differs, and damages what it means to."""

import random
import shutil

import pytest
import torch

from lab.errors import UserError
from lab.runs import checkpoint
from tools import soak

TRAINING = 'train.py --dataset digits --depth 10 --epochs 4 --epoch_step [3] --device cpu'


def test_differences(digits_run, tmp_path):
    other = tmp_path / 'other'
    shutil.copytree(digits_run, other)
    assert soak.differences(digits_run, other) == []
    content = torch.load(other / 'model.pt7', weights_only=True)
    content['params']['fc.bias'][0] += 1e-6
    content['optimizer']['state'][0]['momentum_buffer'].view(-1)[0] += 1e-6
    torch.save(content, other / 'model.pt7')
    log = (other / 'log.txt').read_text().splitlines(keepends=True)
    (other / 'log.txt').write_text(''.join(log[:-1]))
    assert soak.differences(digits_run, other) == ['fc.bias', 'momentum 0', 'log.txt']


@pytest.mark.parametrize('seed', range(4))
def test_damage(digits_run, tmp_path, seed):
    path = tmp_path / 'damaged.pt7'
    shutil.copy(digits_run / 'model.pt7', path)
    before = path.read_bytes()
    kind = soak.damage(path, random.Random(seed))
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
    monkeypatch.setattr(soak, 'DAMAGE_PROBABILITY', 0)
    worker = soak.Soak(0, tmp_path / 'work', digits_run, duration=1)
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
    monkeypatch.setattr(soak, 'DAMAGE_PROBABILITY', 1)
    killed = tmp_path / 'killed'
    shutil.copytree(digits_run, killed)
    assert worker.check_position(killed, (8, 0)) == (7, 0)
    assert worker.check_position(killed, (7, 0)) == (7, 0)  # not damaged twice
    assert sum(n for event, n in worker.counts.items() if 'damaged' in event) == 1


def test_summary(worker, digits_run, monkeypatch):
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    worker.counts['kills'] = 3
    worker.compare(digits_run)
    text = soak.summary([worker], '--kills 3', minutes=2.4)
    assert '| kills | 3 |' in text
    assert '| faults | 0 |' in text
    worker.add_fault('exit status 1')
    assert '- run 1, start 1: exit status 1' in soak.summary([worker], '--kills 3', minutes=2.4)


def test_a_training_that_fails(tmp_path, call, monkeypatch):
    monkeypatch.setattr(soak, 'TRAINING', f'{TRAINING} --lr fast')
    result = call(soak.main, '--kills', 1)
    assert result.status == 1
    assert '--lr' in result.err

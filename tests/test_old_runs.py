"""Run folders that earlier code wrote, in fixtures/, still evaluate, resume and fold."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import train
from conftest import ROOT, evaluate, read_log, same, train_digits, without_times
from lab.data import datasets
from lab.runs import checkpoint
from test import relative_error

FIXTURES = Path(__file__).parent / 'fixtures'
# Stopped in epoch 2 of 3, after 32 of its 69 steps.
INTERRUPTED = 'diracnet-10-interrupted'
OPTIONS = '--depth 10 --width 0.25 --epochs 3 --epoch_step [2] --randomcrop_pad 1 --seed 7'


@pytest.fixture
def old_run(tmp_path):
    """old_run(name): a copy of a fixture."""

    def old_run(name):
        return Path(shutil.copytree(FIXTURES / name, tmp_path / name))

    return old_run


@pytest.fixture
def one_thread():
    """The fixtures were computed with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_runs_evaluate(old_run, call):
    folder = old_run('resnet-8')
    last = read_log(folder)[-1]
    stats = evaluate(call, folder)
    assert (stats['dataset'], stats['n']) == ('digits', 360)
    assert stats['test_acc'] == last['test_acc'] == 80
    assert stats['test_loss'] == pytest.approx(last['test_loss'], rel=1e-5)

    stats = evaluate(call, old_run(INTERRUPTED))
    assert stats['n'] == 360 and 0 <= stats['test_acc'] <= stats['test_top5'] <= 100


def test_finished_run_trains_further(old_run):
    folder = old_run('resnet-8')
    train.main(['--resume', str(folder), '--epochs', '3', '--device', 'cpu'])
    log = read_log(folder)
    assert log[:2] == read_log(FIXTURES / 'resnet-8')
    assert [line['epoch'] for line in log] == [1, 2, 3]
    assert log[2]['train_loss'] < log[1]['train_loss'] < log[0]['train_loss']
    assert len(json.loads((folder / 'run.json').read_text())) == 2


def test_interrupted_run_resumes(old_run, tmp_path, one_thread):
    """It ends as an undisturbed run of today's code with the same options."""
    folder = old_run(INTERRUPTED)
    loaded = checkpoint.load(folder)
    assert (loaded.epoch, loaded.progress['step']) == (1, 9)
    train.main(['--resume', str(folder), '--device', 'cpu'])
    train_digits(tmp_path / 'whole', f'{OPTIONS} --device cpu')
    log, expected = without_times(folder), without_times(tmp_path / 'whole')
    assert log[0] == without_times(FIXTURES / INTERRUPTED)[0]
    assert [line['epoch'] for line in log] == [1, 2, 3]
    # Today's code has more options than the code that wrote the first line.
    assert set(log[0]) < set(expected[0])
    assert all(set(line) == set(other) for line, other in zip(log[1:], expected[1:]))
    # Another processor may round differently, which training amplifies from step to step.
    for line, other in zip(log, expected):
        assert line['train_loss'] == pytest.approx(other['train_loss'], rel=0.02)
    first = {name: expected[0][name] for name in log[0]}
    if log[0] == first:  # the same arithmetic as where the fixture was computed
        assert same(tmp_path / 'whole', folder)
        assert log[1:] == expected[1:]


def test_run_without_its_optimizer(tmp_path, call):
    """The notebook's checkpoints have none: they evaluate, and a new training can start there."""
    folder = shutil.copytree(ROOT / 'logs' / 'reference' / 'notebook-diracnet', tmp_path / 'run')
    assert evaluate(call, folder)['test_acc'] > 90
    result = call(
        *(train.main, '--resume', folder, '--save', tmp_path / 'new', '--device', 'cpu'),
        *('--depth', '22', '--dataset', 'digits', '--epochs', '31', '--lr', '0.01'),
    )
    assert result.status == 0 and read_log(tmp_path / 'new')[-1]['epoch'] == 31


def test_interrupted_run_folds(old_run):
    loaded = checkpoint.load(old_run(INTERRUPTED))
    module, folded = loaded.module(), loaded.fold()
    inputs, _ = next(iter(datasets.load('digits', '.').batches(False, batch_size=360)))
    with torch.no_grad():
        assert relative_error(folded(inputs), module(inputs)) <= 1e-5

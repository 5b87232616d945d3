"""lab/training/passes.py: the progress bar, and the lines where there is none."""

import io
import re
import sys
from types import SimpleNamespace

import pytest

import train
from lab.training.passes import ProgressBar

METERS = SimpleNamespace(
    batches=1,
    topk=(1, 5),
    flush=lambda: None,
    loss=SimpleNamespace(value=lambda: (0.1234,)),
    accuracy=SimpleNamespace(value=lambda k: 95.31),
)


class Batches(SimpleNamespace):
    def __len__(self):
        return -(-self.n // self.batch_size)


BATCHES = Batches(n=50_000, batch_size=128, start=0)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize('columns', [60, 80, 120])
def test_bar_shows_loss_and_accuracy(columns, monkeypatch):
    monkeypatch.setenv('COLUMNS', str(columns))
    monkeypatch.setenv('LINES', '20')
    monkeypatch.setattr(sys, 'stderr', Terminal())
    bar = ProgressBar('epoch 120/200', BATCHES, METERS)
    bar.shown = 0
    bar.update(20_000)
    bar.bar.refresh()
    last = sys.stderr.getvalue().split('\r')[-1]
    bar.close()
    assert len(last) <= columns
    assert all(text in last for text in ('epoch 120/200', '40%', 'loss 0.123', 'acc 95.3 %'))
    assert len(last.split('|')[1]) >= 8


def test_lines_where_the_output_is_no_terminal(tmp_path, call, monkeypatch):
    """One at every interval, here at each step, in training, recalibration and test."""
    monkeypatch.setattr(ProgressBar, 'INTERVAL', 0)
    options = '--dataset digits --depth 10 --epochs 1 --recalibrate_bn'
    result = call(train.main, *options.split(), '--save', tmp_path / 'run')
    number = r'[\d.]+'
    measured = rf'loss {number}, accuracy {number} %, '
    rest = r'[\d,]+ images/s, \d\d:\d\d left'
    for step in range(1, 24):
        [line] = re.findall(rf'epoch 1/1: step {step} of 23, .*', result.out)
        assert re.fullmatch(rf'epoch 1/1: step {step} of 23, {measured}{rest}', line), line
    assert re.search(rf'recalibrate: step 23 of 23, {rest}', result.out)
    assert re.search(rf'test: step 6 of 6, {measured}[\d,]+ images/s, 00:00 left', result.out)
    monkeypatch.undo()
    result = call(train.main, *options.split(), '--save', tmp_path / 'silent')
    assert ' step ' not in result.out

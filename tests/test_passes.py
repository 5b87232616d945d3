"""lab/training/passes.py: the progress bar."""

import io
import sys
from types import SimpleNamespace

import pytest

from lab.training.passes import ProgressBar

METERS = SimpleNamespace(
    batches=1,
    topk=(1, 5),
    flush=lambda: None,
    loss=SimpleNamespace(value=lambda: (0.1234,)),
    accuracy=SimpleNamespace(value=lambda k: 95.31),
)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize('columns', [60, 80, 120])
def test_bar_shows_loss_and_accuracy(columns, monkeypatch):
    monkeypatch.setenv('COLUMNS', str(columns))
    monkeypatch.setenv('LINES', '20')
    monkeypatch.setattr(sys, 'stderr', Terminal())
    bar = ProgressBar('epoch 120/200', 50_000, METERS)
    bar.update(20_000)
    bar.bar.refresh()
    last = sys.stderr.getvalue().split('\r')[-1]
    bar.close()
    assert len(last) <= columns
    assert all(text in last for text in ('epoch 120/200', '40%', 'loss 0.123', 'acc 95.3 %'))
    assert len(last.split('|')[1]) >= 8

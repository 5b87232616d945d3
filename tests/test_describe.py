"""What a run says after its first step and after each epoch."""

from types import SimpleNamespace

import pytest
import torch

from lab import cuda
from lab.runs.describe import describe_epoch
from lab.runs.recorder import Recorder

STATS = {
    **{'epoch': 2, 'epochs': 2, 'num_classes': 10, 'recalibrate_bn': False},
    **{'train_loss': 0.5, 'train_acc': 80.0, 'train_time': 61.0, 'train_images_per_second': 1234.5},
    **{'test_loss': 0.25, 'test_acc': 90.0, 'test_top5': 99.5, 'test_time': 2.26},
}


@pytest.mark.parametrize(
    'stats, present, absent',
    [
        ({}, ['0.5000', '80.00 %', '90.00 %', 'top-5 99.50 %', '63.3 s', '1,234 im'], []),
        # as many classes as top-k has, or fewer
        ({'num_classes': 5, 'test_top5': 100.0}, ['90.00 %'], ['top']),
        ({'num_classes': 2, 'test_top5': 100.0}, ['90.00 %'], ['top']),
        # numbers that two decimals would round to 0 or 100
        ({'train_acc': 100 * (1 - 1 / 60000)}, ['99.99 %'], ['100.00']),
        ({'train_acc': 100.0, 'test_acc': 0.0}, ['100.00 %', ' 0.00 %'], []),
        ({'train_loss': 0.00003}, ['3.0e-05'], ['0.0000']),
        ({'train_time': 0.02, 'test_time': 0.01}, ['0.030 s'], []),
        ({'train_images_per_second': 0.375}, ['0.38 images/s'], []),
    ],
)
def test_an_epoch(stats, present, absent):
    line = describe_epoch(STATS | stats, SimpleNamespace(batches=range(100)))
    assert all(text in line for text in present) and not any(text in line for text in absent), line


@pytest.mark.parametrize(
    'name, expected', [('cuda:0', ['0.42 GB of memory on cuda:0']), ('cpu', [])]
)
def test_memory_after_the_first_step(name, expected, monkeypatch):
    monkeypatch.setattr(cuda, 'peak_memory', lambda device: 4.2e8)
    parameters, lines = [SimpleNamespace(device=torch.device(name))], []
    state = SimpleNamespace(module=SimpleNamespace(parameters=lambda: iter(parameters)))
    metadata = {
        'network': {
            'model': 'diracnet',
            'depth': 10,
            'width': 1,
            'dataset': 'digits',
            'in_channels': 1,
        },
        'options': {'checkpoint_minutes': 10},
        'preprocessing': {'image_size': 8},
    }
    recorder = Recorder(None, SimpleNamespace(signal=0, say=lines.append), state, metadata, [])
    for _ in range(2):
        recorder.save_or_exit_if_due(SimpleNamespace(meters=SimpleNamespace(diverged=None)))
    assert lines == expected

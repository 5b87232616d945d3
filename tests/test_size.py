"""lab/training/size.py: sizes by arithmetic are those of the networks themselves."""

import os
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from conftest import ROOT
from diracparams import DATASETS
from lab.errors import OptionError
from lab.models import registry
from lab.training import size
from lab.training.optimizers import OPTIMIZERS, STATES, is_decayed, make_optimizer
from lab.training.options import complete

CIFAR = [(model, depth, 'digits') for model in registry.MODELS for depth in (22, 40)]
IMAGENET = [(model, 18, 'folder') for model in registry.MODELS if model != 'wrn']


def arguments_of(model, depth, dataset, width=0.25):
    if model in ('resnet', 'resnet-dirac') and dataset == 'digits':
        depth -= 2
    return {
        'model': model,
        'depth': depth,
        'width': width,
        'dataset': dataset,
        'num_classes': 7,
        'in_channels': DATASETS[dataset][1],
        **registry.own_options(model),
    }


@pytest.mark.parametrize('model, depth, dataset', [*CIFAR, *IMAGENET, ('wrn', 50, 'folder')])
def test_sizes(model, depth, dataset):
    """Deeper networks than 28 layers are not measured, but computed."""
    arguments = arguments_of(model, depth, dataset)
    pixels = 8 if dataset == 'digits' else 64
    found = size.network_size(arguments, 3, pixels)
    f, params = registry.define(**arguments)
    learned = [tensor for tensor in params.values() if tensor.requires_grad]
    decayed = sum(tensor.numel() for tensor in learned if is_decayed(tensor, model))
    assert found.parameters == sum(tensor.numel() for tensor in learned)
    assert found.decayed == decayed
    assert found.parameters + found.buffers == sum(tensor.numel() for tensor in params.values())
    inputs = torch.randn(3, DATASETS[dataset][1], pixels, pixels)
    kept = inputs.numel() + size._kept_for_backward(f, params, inputs)
    assert kept == pytest.approx(found.activations, rel=0.01)


def test_deep_networks():
    arguments = arguments_of('diracnet', 10_000, 'digits', width=1)
    assert size.network_size({**arguments, 'num_classes': 10}, 64, 8).parameters == 162_686_010
    with pytest.raises(ValueError, match='10001'):
        size.network_size({**arguments, 'depth': 10_001}, 64, 8)


def test_states_of_optimizers():
    for name in OPTIMIZERS:
        weight = torch.nn.Linear(8, 8, bias=False)
        optimizer = make_optimizer(weight, {'optim': name, 'lr': 0.1, 'weight_decay': 0.0})
        weight(torch.ones(1, 8)).sum().backward()
        optimizer.step()
        [state] = optimizer.state.values()
        assert {key for key in state if key != 'step'} == set(STATES[name])
        assert all(state[key].shape == (8, 8) for key in STATES[name])


def needed(**given):
    """The least bytes with which a DiracNet-16 is trained on 64 digits, and its parameters."""
    found = size.network_size(arguments_of('diracnet', 16, 'digits'), 64, 8)
    options = complete({'dataset': 'digits', **given})
    return size.step_memory(options, found, 64 * 8 * 8)[0], found.parameters


def test_memory():
    usual, n = needed()
    # The weights, their momentum, and 12 blocks of 4, 8 and 16 channels, each before and after its
    # batch norm.
    activations = 64 * 2 * 4 * (4 * 64 + 8 * 16 + 16 * 4)
    assert 1 < usual / (4 * (2 * n + activations)) < 1.5
    assert needed(dtype='double')[0] == 2 * usual
    assert needed(optim='adamw')[0] == usual + 4 * n
    assert needed(dtype='bfloat16')[0] < usual
    assert needed(recompute=True)[0] < usual - 4 * n


def test_limit(monkeypatch):
    """What just fits is trained; what does not is refused."""
    usual, n = needed()
    arguments = arguments_of('diracnet', 16, 'digits')
    images = SimpleNamespace(image_size=8)
    for samples, memory, fits in ((96, usual, True), (96, usual - 1, False), (32, usual - 1, True)):
        data = SimpleNamespace(train=(None, range(samples)), preprocessing=images, in_memory=False)
        monkeypatch.setattr(size, 'total_memory', lambda memory=memory: memory)
        check = partial(
            size.check_memory, complete({'dataset': 'digits'}), arguments, data, torch.device('cpu')
        )
        if fits:
            assert check().parameters == n
        else:
            with pytest.raises(OptionError, match=f'{n:,} parameters'):
                check()


def test_memory_that_runs_out(tmp_path):
    """A limit on the process, which the check does not know: 500 MB more than after the imports."""
    pytest.importorskip('resource')
    script = """
import resource, sys
import train
from lab.errors import run
pages = int(open('/proc/self/statm').read().split()[0])
limit = pages * resource.getpagesize() + 500_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
run(lambda: train.main(sys.argv[1:]), 'train.py')
"""
    options = '--dataset digits --device cpu --depth 10 --width 8 --batch_size 1400 --save'
    result = subprocess.run(
        [sys.executable, '-c', script, *options.split(), tmp_path / 'run'],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
    )
    assert result.returncode == 1, result.stderr
    assert result.stderr.count('\n') == 1 and '--batch_size' in result.stderr

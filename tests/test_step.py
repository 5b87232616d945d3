"""lab/training/step.py: batches in parts, and steps that a CUDA graph replays.

On the CPU, what surrounds a graph is tested with a stand-in for it, which calls the function again.
"""

import contextlib

import pytest
import torch
import torch.nn.functional as F

import train
from conftest import same, train_digits
from diracnet import Network, define_diracnet
from lab import cuda
from lab.training import step as steps
from lab.training.options import complete
from test import randomized


@pytest.fixture
def captures(monkeypatch):
    """A list that grows with each capture. A stand-in for lab.cuda replays by calling again."""
    captures = []

    def capture(function):
        state = [(tensor, tensor.clone()) for tensor in networks[-1].buffers()]
        outputs = function()  # a real capture computes nothing
        for tensor, value in state:
            tensor.copy_(value)
        captures.append(function)

        def replay():
            for old, new in zip(flat(outputs), flat(function())):
                old.copy_(new)

        return replay, outputs

    networks = []
    make_step = steps.make_step

    def make_observed_step(model, *args):
        networks.append(model)
        return make_step(model, *args)

    monkeypatch.setattr(cuda, 'capture', capture)
    monkeypatch.setattr(cuda, 'beside', contextlib.nullcontext)
    monkeypatch.setattr(train, 'make_step', make_observed_step)
    monkeypatch.setattr(train, 'choose_device', lambda options: torch.device('cpu'))
    monkeypatch.setattr(train, 'set_up', lambda options, device: None)
    return captures


def flat(outputs):
    loss, logits, gradients = outputs
    return [loss, logits, *gradients]


# Batches of digits are 11 of 128 and one of 29.
OPTIONS = [
    '',
    '--schedule linear --warmup ramp:5 --clip 1',
    '--ema --label_smoothing 0.1 --accumulate 2',
    '--dtype bfloat16 --bn_momentum 0.3 --recalibrate_bn',
    '--dtype half',  # with its scaler
]


@pytest.mark.parametrize('options', OPTIONS)
def test_a_replayed_training_is_the_same(options, captures, tmp_path):
    options = f'--depth 10 --epochs 2 --batch_size 128 {options}'
    train_digits(tmp_path / 'plain', options)
    assert not captures
    train_digits(tmp_path / 'graphed', f'{options} --graph')
    assert len(captures) == 1
    assert same(tmp_path / 'plain', tmp_path / 'graphed')


def test_a_replayed_training_resumes(captures, tmp_path, stop_at):
    options = '--depth 10 --epochs 2 --batch_size 128'
    train_digits(tmp_path / 'plain', options)
    stop_at(7)
    with pytest.raises(SystemExit):
        train_digits(tmp_path / 'graphed', f'{options} --graph')
    train.main(['--resume', str(tmp_path / 'graphed')])
    assert len(captures) == 2
    assert same(tmp_path / 'plain', tmp_path / 'graphed')


@pytest.mark.parametrize('options', ['--model wrn --dropout 0.3', '--bn_momentum cumulative'])
def test_what_a_graph_cannot_hold_is_said(options, captures, tmp_path, capfd):
    train_digits(tmp_path / 'run', f'--depth 10 --epochs 1 --graph {options}')
    assert not captures and options.split()[-2] in capfd.readouterr().out


def test_a_capture_that_fails(captures, tmp_path, monkeypatch, capfd):
    def fail(function):
        raise RuntimeError('CUDA error: operation not permitted\nwhen stream is capturing')

    monkeypatch.setattr(cuda, 'capture', fail)
    options = '--depth 10 --epochs 1 --batch_size 128'
    train_digits(tmp_path / 'graphed', f'{options} --graph')
    out = capfd.readouterr().out
    assert len([line for line in out.splitlines() if 'not permitted' in line]) == 1
    train_digits(tmp_path / 'plain', options)
    assert same(tmp_path / 'plain', tmp_path / 'graphed')


def test_graph_needs_cuda(tmp_path, refused):
    arguments = ['--dataset', 'digits', '--device', 'cpu', '--save', tmp_path / 'run']
    refused(2, ['--graph', 'cpu'], train.main, *arguments, '--graph')
    train_digits(tmp_path / 'run', '--depth 10 --epochs 1 --device cpu --no_graph')


@pytest.mark.parametrize('n', [1, 3, 100])
def test_parts_of_a_batch_have_its_gradients(n):
    """Up to rounding, where batch norm has no part in it."""
    f, params = define_diracnet(10, 1, 'digits')
    module = Network(f, randomized(params)).double().eval()
    options = {**complete({'dataset': 'digits', 'dtype': 'double'}), 'accumulate': n}
    scaler = torch.amp.GradScaler(enabled=False)
    step = steps.make_step(module, options, scaler, 7, print)
    inputs, targets = torch.randn(7, 1, 8, 8, dtype=torch.double), torch.arange(7)
    step(inputs.flip(0), targets)  # the gradients of the batch before do not count
    loss, logits = step(inputs, targets)
    expected = module(inputs)
    mean = F.cross_entropy(expected, targets)
    torch.testing.assert_close((loss, logits), (mean.detach(), expected.detach()))
    for parameter, gradient in zip(
        module.parameters(), torch.autograd.grad(mean, module.parameters())
    ):
        torch.testing.assert_close(parameter.grad, gradient)

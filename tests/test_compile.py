"""--compile: the same training, computed by torch.compile."""

import shutil
from functools import partial

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F

import diracnet
import train
from conftest import same, train_digits
from diracnet import Network, define_diracnet
from lab.models import registry
from lab.training import network
from lab.training.network import BatchNorm, compiled
from test import randomized

# It traces forward and backward pass as the usual backend does, but does not compile them, which
# takes half a minute.
TRACING = 'aot_eager'
CHANGED = {'bn_momentum': 0.05, 'sync_bn': False, 'freeze': 'stem'}


def results(f, params, batch_size=8):
    """Logits, gradients and running statistics of a step in double precision, in which rounding
    turns no unit on or off."""
    torch.manual_seed(0)
    params = {
        key: tensor.detach().double().requires_grad_(tensor.requires_grad)
        for key, tensor in params.items()
    }
    net = Network(f, {key: tensor.clone() for key, tensor in params.items()})
    logits = net(torch.randn(batch_size, 1, 8, 8, dtype=torch.double))
    F.cross_entropy(logits, torch.arange(batch_size)).backward()
    tensors = net.params().values()
    return [logits, *(t.grad if t.requires_grad else t for t in tensors)]


def assert_same_results(f, params, **compiler):
    torch._dynamo.reset()
    pairs = zip(results(compiled(f, 8, **compiler), params), results(f, params))
    for actual, expected in pairs:
        assert (actual - expected).abs().max() <= 1e-10 * expected.abs().max()


@pytest.mark.skipif(
    not any(map(shutil.which, ('c++', 'g++', 'clang++'))),
    reason='torch.compile needs a C++ compiler',
)
def test_compiling():
    f, params = define_diracnet(10, 0.25, 'digits')
    assert_same_results(f, randomized(params))


@pytest.mark.parametrize('model', registry.MODELS)
def test_all_models_are_traced(model):
    f, params = registry.define(model, 8 if 'resnet' in model else 10, 0.25, 'digits')
    assert_same_results(f, randomized(params), backend=TRACING)


def gated_block(x, params, name, mode, norm):
    gate = params[f'{name}.bn.bias'].view(1, -1, 1, 1)
    return diracnet.relu_conv_bn(x.clone(), params, name, mode, norm) + gate * x[:, :1]


def test_what_a_user_changes_is_traced():
    """Another block, and another function of batch norm."""
    f, params = define_diracnet(10, 0.25, 'digits')
    params['bn.weight'].requires_grad_(False)
    chain = partial(diracnet.chain, block=gated_block)
    f = partial(f, compute=chain, norm=BatchNorm(CHANGED))
    assert_same_results(f, randomized(params), backend=TRACING)


def test_only_full_training_batches_are_compiled():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    f, params = define_diracnet(10, 0.25, 'digits')
    f = compiled(f, 8, backend=TRACING)
    for batch_size in (8, 3, 8):
        results(f, params, batch_size)
    f(torch.randn(8, 1, 8, 8), params, False)
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 1


def test_learns_and_resumes_exactly(monkeypatch, tmp_path):
    """With a smaller last batch, and with tests of averages."""
    monkeypatch.setattr(network, 'NOT_COMPILED', ())
    monkeypatch.setattr(torch, 'compile', partial(torch.compile, backend=TRACING))
    whole, cut, options = tmp_path / 'whole', tmp_path / 'cut', '--compile --depth 10 --ema 0.9'
    lines = train_digits(whole, f'{options} --epochs 4 --epoch_step [3]')
    assert lines[-1]['test_acc'] > 85
    train_digits(cut, f'{options} --epochs 2 --epoch_step [3]')
    train.main(['--resume', str(cut), '--epochs', '4'])
    assert same(whole, cut)


def branching_block(x, params, name, mode, norm):
    return diracnet.relu_conv_bn(x if x.sum() > 0 else -x, params, name, mode, norm)


def test_a_block_that_cannot_be_compiled_ends_with_one_line(monkeypatch, refused, tmp_path):
    monkeypatch.setattr(network, 'NOT_COMPILED', ())
    monkeypatch.setattr(diracnet.chain, '__defaults__', (F.batch_norm, branching_block))
    command = ('--dataset', 'digits', '--depth', 10, '--compile', '--save', tmp_path / 'run')
    refused(1, '--compile', train.main, *command)

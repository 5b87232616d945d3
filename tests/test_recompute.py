"""lab/training/recompute.py and --dtype: the same training with less memory, or in other
floating-point types."""

import pytest
import torch
import torch.nn.functional as F

import diracnet
import train
from conftest import same, train_digits
from diracnet import Network, define_diracnet
from lab.models import registry
from lab.runs import checkpoint
from lab.training import recompute
from lab.training.recompute import recomputed
from test import randomized


@pytest.mark.parametrize('options', ['--dtype bfloat16', '--dtype double', '--recompute'])
def test_learns_and_resumes_exactly(options, tmp_path):
    whole, cut = tmp_path / 'whole', tmp_path / 'cut'
    options += ' --epoch_step [3] --lr 0.1'
    lines = train_digits(whole, f'{options} --epochs 4')
    assert lines[-1]['test_acc'] > 85
    train_digits(cut, f'{options} --epochs 2')
    train.main(['--resume', str(cut), '--epochs', '4'])
    assert same(whole, cut)
    dtype = torch.double if 'double' in options else torch.float
    assert {tensor.dtype for tensor in checkpoint.load(whole).params.values()} == {dtype}


def copied(params, dtype=None):
    """Leaves with the values of params."""
    return {
        key: tensor.detach().clone().to(dtype or tensor.dtype).requires_grad_(tensor.requires_grad)
        for key, tensor in params.items()
    }


def leaky(x):
    return F.leaky_relu(x, 0.1, inplace=True)


@pytest.mark.parametrize('activation', [diracnet.relu, leaky, F.silu])
@pytest.mark.parametrize(
    'depth, width, dataset, size', [(16, 1, 'digits', 8), (18, 0.125, 'ImageNet', 64)]
)
def test_recomputing(depth, width, dataset, size, activation, device, monkeypatch):
    """It keeps about half as much for the backward pass, and gives the same logits, gradients and
    running statistics, whatever `diracnet.relu` is."""
    for module in (diracnet, recompute):  # an edit of diracnet.py reaches both
        monkeypatch.setattr(module, 'relu', activation)
    f, params = define_diracnet(depth, width, dataset)
    n_channels = params['conv'].shape[1]
    x = torch.randn(8, n_channels, size, size, device=device)
    randomized(params)
    kept_bytes, results = [], []
    for function in (f, recomputed(f, params, n_channels)):
        net = Network(function, copied(params)).to(device)
        logits, n_bytes = forward_and_kept_bytes(net, x)
        F.cross_entropy(logits, torch.arange(8, device=device)).backward()
        kept_bytes.append(n_bytes)
        tensors = net.params().values()
        results.append([logits, *(t.grad if t.requires_grad else t for t in tensors)])
    weight_bytes = sum(tensor.nbytes for tensor in params.values())
    assert kept_bytes[1] - 2 * weight_bytes < 0.6 * (kept_bytes[0] - 2 * weight_bytes)
    for expected, actual in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def forward_and_kept_bytes(net, x):
    """net(x), and the size of all that it keeps for the backward pass."""
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = net(x)
    return logits, sum(kept.values())


# --- other blocks are refused ----------------------------------------------------------------


def leaky_block(x, params, name, mode, norm):
    x = F.conv2d(leaky(x), params[f'{name}.conv'], padding=1)
    return diracnet.batch_norm(x, params, f'{name}.bn', mode, norm)


def scaled_block(x, params, name, mode, norm):
    """In training, batch norm hides the factor, but for the running statistics."""
    x = 0.5 * F.conv2d(diracnet.relu(x), params[f'{name}.conv'], padding=1)
    return diracnet.batch_norm(x, params, f'{name}.bn', mode, norm)


def gated_block(x, params, name, mode, norm, block=diracnet.relu_conv_bn):
    """Its gate is 0 until it is trained."""
    gate = params[f'{name}.bn.bias'].view(1, -1, 1, 1)
    return block(x.clone(), params, name, mode, norm) + gate * x[:, :1]


@pytest.mark.parametrize('block', [leaky_block, scaled_block, gated_block])
def test_a_changed_block_is_refused(block, monkeypatch, refused, tmp_path):
    """As after an edit of `diracnet.relu_conv_bn`."""
    monkeypatch.setattr(diracnet.chain, '__defaults__', (F.batch_norm, block))
    command = ('--dataset', 'digits', '--depth', 10, '--recompute', '--save', tmp_path / 'run')
    refused(2, '--recompute', train.main, *command)


@pytest.mark.parametrize('model', sorted({*registry.MODELS} - {*registry.CHAINS}))
def test_models_with_other_blocks_are_refused(model, refused, tmp_path):
    depth = 8 if 'resnet' in model else 10
    command = ('--dataset', 'digits', '--model', model, '--depth', depth, '--recompute')
    refused(2, '--recompute', train.main, *command, '--save', tmp_path / 'run')

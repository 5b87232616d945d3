"""lab/models/diracnet_v1.py and its plain chain: their formulas, and the folded network."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lab.models.diracnet_v1 import (
    DiracNetV1,
    block_conv,
    block_weight,
    define_diracnet_v1,
    fold_v1,
    ncrelu,
    tiled_delta,
)
from lab.models.plain import define_plain_ncrelu
from lab.models.resnet import define_resnet
from test import randomized, relative_error


def batch_norm(x, params, name):
    """Batch norm in evaluation mode."""
    parts = ('running_mean', 'running_var', 'weight', 'bias')
    return F.batch_norm(x, *(params[f'{name}.{part}'] for part in parts))


def test_tiled_delta_after_ncrelu_is_the_identity():
    x = torch.randn(2, 6, 5, 5)
    delta = tiled_delta(torch.zeros(6, 12, 3, 3))
    assert torch.equal(F.conv2d(ncrelu(x), delta, padding=1), x)


@pytest.mark.parametrize(
    'out, inside, rows, columns',
    [(4, 4, 1, 1), (8, 4, 2, 1), (4, 8, 1, 2), (7, 3, 2, 1), (3, 7, 1, 2), (5, 4, 1, 1)],
)
def test_tiled_delta_repeats_the_identity(out, inside, rows, columns):
    n, expected = min(out, inside), np.zeros((out, inside))
    tiles = np.tile(np.eye(n), (rows, columns))
    expected[: rows * n, : columns * n] = tiles
    delta = tiled_delta(torch.zeros(out, inside, 3, 3)).numpy()
    assert (delta[:, :, 1, 1] == expected).all()
    assert delta.sum() == expected.sum()


@pytest.mark.parametrize('out, inside', [(4, 8), (8, 8), (8, 4), (7, 3), (3, 7), (5, 4)])
def test_sixteen_bits_keep_what_the_identity_would_absorb(out, inside):
    x = torch.randn(2, inside, 5, 5)
    weight = torch.randn(out, inside, 3, 3)
    params = {'conv': weight, 'alpha': torch.tensor([5.0]), 'beta': torch.tensor([1e-3])}
    identity = 5 * F.conv2d(x, tiled_delta(weight), padding=1)
    expected = F.conv2d(x, block_weight(params, ''), padding=1) - identity
    with torch.autocast('cpu', torch.bfloat16):
        found = block_conv(x, params, '') - identity
    assert found.dtype == torch.float32
    assert relative_error(found, expected) < 0.01  # bfloat16 has 8 bits


@pytest.mark.parametrize('define', [define_diracnet_v1, define_plain_ncrelu])
def test_initialization(define):
    params = define(10, 1, 'CIFAR10')[1]
    if define is define_diracnet_v1:
        assert params['group1.block0.alpha'].tolist() == [5.0]
        assert params['group1.block0.beta'].tolist() == [pytest.approx(1e-3)]
        std = 0.1
    else:
        assert not any(key.endswith(('alpha', 'beta')) for key in params)
        std = (2 / (128 * 9)) ** 0.5  # Kaiming normal, for twice 64 channels
    assert params['group2.block1.conv'].detach().std() == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize('define', [define_diracnet_v1, define_plain_ncrelu])
def test_network_equals_its_formula(define):
    f, params = define(10, 1, 'CIFAR10')
    randomized(params)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        x = batch_norm(F.conv2d(images, params['conv'], padding=1), params, 'bn')
        for g in range(3):
            if g > 0:
                x = F.max_pool2d(x, 2)
            for b in range(2):
                name = f'group{g}.block{b}'
                weight = params[f'{name}.conv']
                if define is define_diracnet_v1:
                    norms = torch.stack([row.norm() for row in weight])[:, None, None, None]
                    identity = params[f'{name}.alpha'] * tiled_delta(weight)
                    weight = identity + params[f'{name}.beta'] * weight / norms
                x = torch.cat([x.relu(), -(-x).relu()], 1)
                x = batch_norm(F.conv2d(x, weight, padding=1), params, f'{name}.bn')
        expected = F.linear(x.relu().mean((2, 3)), params['fc.weight'], params['fc.bias'])
        assert relative_error(f(images, params, False), expected) <= 1e-5


def test_folded_network_is_the_chain_that_the_original_printed():
    f, params = define_diracnet_v1(18, 0.75, 'ImageNet')
    n_parameters = sum(tensor.numel() for tensor in params.values() if tensor.requires_grad)
    assert round(n_parameters / 1e6, 1) == 12.8
    randomized(params)
    folded = DiracNetV1.from_state_dict(fold_v1(params)).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert relative_error(folded(images), f(images, params, False)) <= 1e-5

    leaves = {name: part for name, part in folded.named_modules() if not list(part.children())}
    names, convs = ['conv', 'max_pool0'], {'conv': (3, 48)}
    channels = 48
    for g, width in enumerate((48, 96, 192, 384)):
        if g > 0:
            names.append(f'max_pool{g}')
        for b in range(4):
            names += [f'group{g}.block{b}.ncrelu', f'group{g}.block{b}.conv']
            convs[f'group{g}.block{b}.conv'] = (2 * channels, width)
            channels = width
    assert list(leaves) == [*names, 'relu', 'avg_pool', 'view', 'fc']
    assert convs == {
        name: (part.in_channels, part.out_channels)
        for name, part in leaves.items()
        if isinstance(part, nn.Conv2d)
    }
    stem = folded.conv
    assert (stem.kernel_size, stem.stride, stem.padding) == ((7, 7), (2, 2), (3, 3))
    assert (folded.fc.in_features, folded.fc.out_features) == (384, 1000)


def test_other_networks_do_not_fold():
    with pytest.raises(ValueError, match='not the parameters'):
        fold_v1(define_resnet(20, 1, 'CIFAR10')[1])


def test_missing_parameters_are_named():
    params = define_diracnet_v1(10, 1, 'digits')[1]
    del params['group1.block1.bn.bias']
    with pytest.raises(ValueError, match='group1.block1.bn.bias'):
        fold_v1(params)

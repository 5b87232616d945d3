"""lab/models/diracnet_v1.py and its plain chain: their formulas, and the folded network."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

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
from test import constants, count_learned, randomized, relative_error
from tools.benchmark.references import batch_norm


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
    expected[: rows * n, : columns * n] = np.tile(np.eye(n), (rows, columns))
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
        rest = block_conv(x, params, '') - identity
    assert rest.dtype == torch.float32
    assert relative_error(rest, expected) < 0.01  # bfloat16 has 8 bits


@pytest.mark.parametrize(
    'define, std', [(define_diracnet_v1, 0.1), (define_plain_ncrelu, (2 / (128 * 9)) ** 0.5)]
)
def test_initialization(define, std):
    """The paper's values; Kaiming normal, for twice 64 channels."""
    params = define(10, 1, 'CIFAR10')[1]
    assert params['group2.block1.conv'].detach().std() == pytest.approx(std, rel=0.05)
    scales = {key: tensor.item() for key, tensor in params.items() if key.endswith(('pha', 'eta'))}
    names = [f'group{g}.block{b}' for g in range(3) for b in range(2)]
    expected = {f'{name}.alpha': 5.0 for name in names} | {f'{name}.beta': 1e-3 for name in names}
    assert scales == pytest.approx(expected if define is define_diracnet_v1 else {})


@pytest.mark.parametrize('define', [define_diracnet_v1, define_plain_ncrelu])
def test_network_equals_its_formula(define):
    f, params = define(10, 1, 'CIFAR10')
    params = constants(randomized(params))
    images = torch.randn(3, 3, 32, 32)
    x = batch_norm(F.conv2d(images, params['conv'], padding=1), params, 'bn', False)
    for name in [key.removesuffix('.conv') for key in params if key.endswith('.conv')]:
        if name in ('group1.block0', 'group2.block0'):
            x = F.max_pool2d(x, 2)
        weight = params[f'{name}.conv']
        if define is define_diracnet_v1:
            norms = torch.stack([row.norm() for row in weight])[:, None, None, None]
            identity = params[f'{name}.alpha'] * tiled_delta(weight)
            weight = identity + params[f'{name}.beta'] * weight / norms
        x = F.conv2d(torch.cat([x.relu(), -(-x).relu()], 1), weight, padding=1)
        x = batch_norm(x, params, f'{name}.bn', False)
    expected = F.linear(x.relu().mean((2, 3)), params['fc.weight'], params['fc.bias'])
    assert relative_error(f(images, params, False), expected) <= 1e-5


def test_folded_network_is_the_chain_that_the_original_printed():
    f, params = define_diracnet_v1(18, 0.75, 'ImageNet')
    assert round(count_learned(params) / 1e6, 1) == 12.8
    params = constants(randomized(params))
    folded = DiracNetV1.from_state_dict(fold_v1(params)).eval()
    images = torch.randn(1, 3, 64, 64)
    assert relative_error(folded(images), f(images, params, False)) <= 1e-5

    names, shapes, channels = ['conv', 'max_pool0'], [(48, 3, 7, 7)], 48
    for g, width in enumerate((48, 96, 192, 384)):
        names += [f'max_pool{g}'] * (g > 0)
        for b in range(4):
            names += [f'group{g}.block{b}.ncrelu', f'group{g}.block{b}.conv']
            shapes.append((width, 2 * channels, 3, 3))
            channels = width
    leaves = {name: part for name, part in folded.named_modules() if not list(part.children())}
    assert list(leaves) == [*names, 'relu', 'avg_pool', 'view', 'fc']
    assert [tuple(p.shape) for p in folded.parameters() if p.ndim == 4] == shapes

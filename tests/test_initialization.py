"""lab/models/initialization.py: the weights that --init gives, against their formulas."""

import pytest
import torch
import torch.nn.functional as F

import train
from lab.models.diracnet_v1 import ncrelu
from lab.models.initialization import STEMS
from lab.models.registry import MODELS, define


def convolutions(params):
    """The weights of all convolutions but the stem, in double precision."""
    return {
        key: tensor.detach().double()
        for key, tensor in params.items()
        if tensor.ndim == 4 and key not in STEMS
    }


def is_semi_orthogonal(matrix):
    """Whether the rows are orthonormal, or the columns if they are fewer."""
    gram = matrix @ matrix.T if len(matrix) <= matrix.shape[1] else matrix.T @ matrix
    return torch.allclose(gram, torch.eye(len(gram), dtype=gram.dtype), atol=1e-5)


@pytest.mark.parametrize(
    'init, std',
    [
        (None, (2 / 576) ** 0.5),  # the network's own
        ('kaiming', (2 / 576) ** 0.5),
        ('xavier', (2 / (576 + 576)) ** 0.5),
        ('normal', 0.01),
        ('orthogonal', (1 / 576) ** 0.5),
    ],
)
def test_random_weights(init, std):
    """64 filters of 64 * 9 numbers."""
    torch.manual_seed(0)
    weight = define('plain', 16, 1, 'CIFAR10', init=init)[1]['group2.block1.conv'].detach()
    assert weight.std() == pytest.approx(std, rel=0.02)
    assert is_semi_orthogonal(weight.flatten(1).double()) == (init == 'orthogonal')


@pytest.mark.parametrize('dataset', ['digits', 'ImageNet'])
@pytest.mark.parametrize('model', MODELS)
def test_delta_orthogonal(model, dataset):
    """Orthogonal matrices at the central taps, zeros elsewhere, and an orthogonal stem."""
    depth = 14 if model.startswith('resnet') else 16
    if dataset == 'ImageNet':
        depth = 50 if model == 'wrn' else 18
    params = define(model, depth, 0.25, dataset, init='delta-orthogonal')[1]
    weights = convolutions(params)
    assert weights
    for key, weight in weights.items():
        size = weight.shape[-1] // 2
        matrix = weight[:, :, size, size].clone()
        assert is_semi_orthogonal(matrix), key
        weight[:, :, size, size] = 0
        assert not weight.any(), key
    stem = next(params[key] for key in STEMS if key in params).detach().double()
    assert is_semi_orthogonal(stem.flatten(1))


def test_looks_linear():
    """Each convolution has two equal halves, so that conv(ncrelu(x)) = W x. The product of the W
    of one group, orthogonal matrices that differ, is the map of the group at each pixel."""
    params = define('plain-ncrelu', 16, 1, 'CIFAR10', init='looks-linear')[1]
    assert is_semi_orthogonal(params['conv'].detach().double().flatten(1))
    weights = convolutions(params)
    assert len(weights) == 12
    for g in range(3):
        group = [weight for key, weight in weights.items() if key.startswith(f'group{g}.')]
        assert all(torch.equal(*weight.chunk(2, 1)) for weight in group)
        matrices = [weight.chunk(2, 1)[0][:, :, 1, 1] for weight in group]
        assert all(map(is_semi_orthogonal, matrices))
        assert (matrices[1] - matrices[2]).norm() > 1
        x = y = torch.randn(2, group[0].shape[1] // 2, 6, 6, dtype=torch.double)
        for weight in group:
            y = F.conv2d(ncrelu(y), weight, padding=1)
        expected = torch.einsum('oi,nihw->nohw', torch.linalg.multi_dot(matrices[::-1]), x)
        torch.testing.assert_close(y, expected)


def test_looks_linear_needs_ncrelu(refused, tmp_path):
    arguments = '--dataset digits --model plain --init looks-linear --save'
    refused(2, ['looks-linear', 'plain-ncrelu'], train.main, *arguments.split(), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()

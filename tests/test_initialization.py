"""lab/models/initialization.py: the weights that --init gives, against their formulas."""

import pytest
import torch
import torch.nn.functional as F

import train
from lab.models.diracnet_v1 import ncrelu
from lab.models.initialization import INITS, STEMS, delta_orthogonal, initialize_convolutions
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


def deep(model, init, dataset='CIFAR10'):
    return define(model, 14 if model.startswith('resnet') else 16, 1, dataset, init=init)


def test_random_weights():
    """plain's own weights, and each init for them."""
    weights = {}
    for init in (None, 'kaiming', 'xavier', 'normal', 'orthogonal'):
        torch.manual_seed(0)
        weights[init] = deep('plain', init)[1]['group2.block1.conv'].detach()
    fan = 64 * 9
    for init, std in (
        (None, (2 / fan) ** 0.5),
        ('kaiming', (2 / fan) ** 0.5),
        ('xavier', (2 / (2 * fan)) ** 0.5),
        ('normal', 0.01),
    ):
        assert weights[init].std() == pytest.approx(std, rel=0.02)
    assert is_semi_orthogonal(weights['orthogonal'].flatten(1).double())
    structured = {'delta-orthogonal', 'looks-linear'}  # tested below
    assert set(INITS) == {init for init in weights if init} | structured


@pytest.mark.parametrize('dataset', ['digits', 'ImageNet'])
@pytest.mark.parametrize('model', MODELS)
def test_delta_orthogonal(model, dataset):
    """Orthogonal matrices at the central taps, zeros elsewhere."""
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


def test_delta_orthogonal_weights_differ():
    weights = convolutions(deep('plain', 'delta-orthogonal')[1])
    first, second = weights['group2.block1.conv'], weights['group2.block2.conv']
    assert (first - second).norm() > 1


def test_delta_orthogonal_keeps_lengths():
    weight = torch.empty(24, 16, 3, 3, dtype=torch.double)
    delta_orthogonal(weight)
    x = torch.randn(2, 16, 5, 5, dtype=torch.double)
    torch.testing.assert_close(F.conv2d(x, weight, padding=1).norm(dim=1), x.norm(dim=1))


def test_looks_linear():
    """[W, W] with a delta-orthogonal W, and an orthogonal stem."""
    params = deep('plain-ncrelu', 'looks-linear')[1]
    for key, weight in convolutions(params).items():
        left, right = weight.chunk(2, 1)
        assert torch.equal(left, right), key
        assert is_semi_orthogonal(left[:, :, 1, 1]), key
        assert left.count_nonzero() == left[:, :, 1, 1].count_nonzero(), key
    assert is_semi_orthogonal(params['conv'].detach().double().flatten(1))


def test_looks_linear_blocks_are_linear():
    """All of them: conv(ncrelu(x)) = W x, so f(x + 2 y) = f(x) + 2 f(y). The products of all
    matrices of one group are the map of the group, at each pixel."""
    weights = convolutions(deep('plain-ncrelu', 'looks-linear')[1])
    assert len(weights) == 12
    for g in range(3):
        group = [weight for key, weight in weights.items() if key.startswith(f'group{g}.')]
        x, y = torch.randn(2, 2, group[0].shape[1] // 2, 6, 6, dtype=torch.double)

        def chain(x, group=group):
            for weight in group:
                x = F.conv2d(ncrelu(x), weight, padding=1)
            return x

        torch.testing.assert_close(chain(x + 2 * y), chain(x) + 2 * chain(y))
        matrix = torch.linalg.multi_dot([w[:, : w.shape[1] // 2, 1, 1] for w in group[::-1]])
        expected = torch.einsum('oi,nihw->nohw', matrix, x)
        torch.testing.assert_close(chain(x), expected)
        torch.testing.assert_close(chain(x).norm(), x.norm(), rtol=1e-4, atol=0)


def test_other_chains_are_not_linear():
    weights = convolutions(deep('plain-ncrelu', 'delta-orthogonal')[1])
    weight = weights['group1.block1.conv']
    x, y = torch.randn(2, 2, weight.shape[1] // 2, 6, 6, dtype=torch.double)
    one, two, both = (F.conv2d(ncrelu(z), weight, padding=1) for z in (x, y, x + y))
    assert (both - one - two).norm() > 0.1 * both.norm()


@pytest.mark.parametrize('model', [model for model in MODELS if model != 'plain-ncrelu'])
def test_looks_linear_needs_plain_ncrelu(model, refused, tmp_path):
    with pytest.raises(ValueError, match='looks-linear.*plain-ncrelu'):
        deep(model, 'looks-linear', 'digits')
    words = ['--init looks-linear', f'--model {model}', 'plain-ncrelu']
    arguments = ['--dataset', 'digits', '--model', model, '--init', 'looks-linear']
    refused(2, words, train.main, *arguments, '--save', tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match='zeros.*delta-orthogonal'):
        initialize_convolutions({}, 'zeros')
    with pytest.raises(ValueError, match='zeros'):
        define('plain', 10, 1, 'digits', init='zeros')

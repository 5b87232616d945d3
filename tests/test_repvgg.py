"""lab/models/repvgg.py: its formula, its fold, and training with it."""

import pytest
import torch
import torch.nn.functional as F

import train
from conftest import same, train_digits
from diracnet import DiracNet
from lab.models.repvgg import define_repvgg, fold_repvgg
from test import constants, randomized, relative_error

NETWORKS = [  # depth, width, data set, size of the images
    (10, 1, 'digits', 8),
    (16, 0.7, 'CIFAR10', 12),
    (18, 0.125, 'ImageNet', 64),
]


def textbook_norm(x, params, name, mode):
    """Batch norm, entry by entry."""
    mean, var = params[f'{name}.running_mean'], params[f'{name}.running_var']
    if mode:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    column = (slice(None), None, None)
    x = (x - mean[column]) / (var[column] + 1e-5).sqrt()
    return x * params[f'{name}.weight'][column] + params[f'{name}.bias'][column]


def textbook(x, params, mode, dataset):
    """The formula of Ding et al., with the form of our chain, read off the keys of params."""
    large = dataset == 'ImageNet'
    x = F.conv2d(x, params['conv'], None, *((2, 3) if large else (1, 1)))
    x = textbook_norm(x, params, 'bn', mode)
    if large:
        x = F.max_pool2d(x, 3, 2, 1)
    for name in [key.removesuffix('.conv') for key in params if key.endswith('.conv')]:
        if name.endswith('.block0') and name != 'group0.block0':
            x = F.max_pool2d(x, 2)
        x = x.clamp(min=0)
        wide = F.conv2d(x, params[f'{name}.conv'], padding=1)
        narrow = torch.einsum('nihw,oi->nohw', x, params[f'{name}.conv1x1'][:, :, 0, 0])
        y = textbook_norm(wide, params, f'{name}.bn', mode)
        y = y + textbook_norm(narrow, params, f'{name}.bn1x1', mode)
        if x.shape[1] == y.shape[1]:
            y = y + textbook_norm(x, params, f'{name}.bn_identity', mode)
        x = y
    return x.clamp(min=0).mean((2, 3)) @ params['fc.weight'].T + params['fc.bias']


@pytest.mark.parametrize('network', NETWORKS)
def test_computes_its_formula_and_folds(network):
    *arguments, size = network
    f, params = define_repvgg(*arguments)
    params = constants(randomized(params), torch.double)
    images = torch.randn(4, params['conv'].shape[1], size, size, dtype=torch.double)
    expected = textbook(images, params, False, arguments[2])
    assert relative_error(f(images, params, False), expected) <= 1e-10
    net = DiracNet.from_state_dict(fold_repvgg(params))
    assert relative_error(net(images), expected) <= 1e-10
    expected = textbook(images, params, True, arguments[2])
    assert relative_error(f(images, params, True), expected) <= 1e-10


def test_initialization():
    params = define_repvgg(16, 1, 'CIFAR10')[1]
    scales = {key: tensor for key, tensor in params.items() if 'bn' in key}
    for key, tensor in scales.items():
        assert (tensor == (1 if key.endswith(('weight', 'var')) else 0)).all(), key
    for name, fan in (('conv', 64 * 9), ('conv1x1', 64)):
        std = params[f'group2.block1.{name}'].detach().std()
        assert std == pytest.approx((2 / fan) ** 0.5, rel=0.05)


def test_trains_and_resumes_exactly(tmp_path):
    whole, cut = tmp_path / 'whole', tmp_path / 'cut'
    recipe = '--model repvgg --depth 10 --lr 0.1 --epoch_step [3]'
    assert train_digits(whole, f'{recipe} --epochs 3')[-1]['test_acc'] > 85
    train_digits(cut, f'{recipe} --epochs 1')
    train.main(['--resume', str(cut), '--epochs', '3'])
    assert same(whole, cut)

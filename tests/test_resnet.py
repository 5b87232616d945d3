"""lab/models/resnet.py: ResNets and Wide ResNets against torchvision and against their papers."""

import pytest
import torch
import torch.nn.functional as F
import torchvision

from diracconv import dirac_weight
from diracnet import Network
from lab.models.registry import define
from lab.models.resnet import BLOCKS
from test import constants, randomized, relative_error
from tools.benchmark.references import batch_norm


@pytest.mark.parametrize(
    'model, depth, width, name',
    [
        ('resnet', 18, 1, 'resnet18'),
        ('resnet', 34, 1, 'resnet34'),
        ('wrn', 50, 2, 'wide_resnet50_2'),
    ],
)
def test_torchvision_state_dict_loads(model, depth, width, name):
    """Outputs are equal in both modes, and so are the running statistics."""
    theirs = getattr(torchvision.models, name)()
    state = randomized(theirs.state_dict())
    ours, images = Network(*define(model, depth, width, 'ImageNet')), torch.randn(2, 3, 64, 64)
    ours.load_state_dict({key: state[key] for key in state if 'num_batches' not in key})
    with torch.no_grad():
        for mode in (False, True):
            assert relative_error(ours.train(mode)(images), theirs.train(mode)(images)) <= 1e-5
    name = 'layer2.0.bn2.running_var'
    torch.testing.assert_close(ours.state_dict()[name], theirs.state_dict()[name])


def textbook_block(x, params, name, stride, end):
    """A block of a ResNet for small images, in evaluation mode."""

    def conv(x, name, stride=1):
        weight = params[f'{name}.weight']
        if f'{name}.alpha' in params:
            weight = dirac_weight(weight, params[f'{name}.alpha'], params[f'{name}.beta'])
        return F.conv2d(x, weight, stride=stride, padding=1)

    def norm(x, name):
        return batch_norm(x, params, name, False)

    y = norm(conv(x, f'{name}.conv1', stride), f'{name}.bn1').relu()
    y = conv(y, f'{name}.conv2')
    skip = F.avg_pool2d(x, 1, stride)
    zeros = torch.zeros(len(x), y.shape[1] - x.shape[1], *skip.shape[2:])
    skip = torch.cat([skip, zeros], 1)
    return {
        'bn-add-relu': (norm(y, f'{name}.bn2') + skip).relu(),
        'bn-add': norm(y, f'{name}.bn2') + skip,
        'add-bn-relu': norm(y + skip, f'{name}.bn2').relu(),
        'add-bn': norm(y + skip, f'{name}.bn2'),
    }[end]


@pytest.mark.parametrize('end', BLOCKS)
@pytest.mark.parametrize('model', ['resnet', 'resnet-dirac'])
def test_resnet_equals_the_textbook(model, end):
    f, params = define(model, 14, 1, 'CIFAR10', block=end)
    assert any(key.endswith('alpha') for key in params) == (model == 'resnet-dirac')
    params, images = constants(randomized(params)), torch.randn(3, 3, 32, 32)
    x = F.conv2d(images, params['conv1.weight'], padding=1)
    x = batch_norm(x, params, 'bn1', False).relu()
    for g in range(3):
        for b in range(2):
            stride = 2 if g > 0 and b == 0 else 1
            x = textbook_block(x, params, f'layer{g + 1}.{b}', stride, end)
    expected = F.linear(x.mean((2, 3)), params['fc.weight'], params['fc.bias'])
    assert relative_error(f(images, params, False), expected) <= 1e-5


def test_wide_resnet_is_preactivated():
    f, params = define('wrn', 10, 2, 'CIFAR10', dropout=0.3)
    params, images = constants(randomized(params)), torch.randn(4, 3, 32, 32)
    x = F.conv2d(images, params['conv1.weight'], padding=1)
    for g, stride in enumerate((1, 2, 2)):
        name = f'layer{g + 1}.0'
        y = batch_norm(x, params, f'{name}.bn1', False).relu()
        skip = F.conv2d(y, params[f'{name}.downsample.0.weight'], stride=stride)
        y = F.conv2d(y, params[f'{name}.conv1.weight'], stride=stride, padding=1)
        y = batch_norm(y, params, f'{name}.bn2', False).relu()
        x = F.conv2d(y, params[f'{name}.conv2.weight'], padding=1) + skip
    x = batch_norm(x, params, 'bn1', False).relu()
    expected = F.linear(x.mean((2, 3)), params['fc.weight'], params['fc.bias'])
    assert relative_error(f(images, params, False), expected) <= 1e-5


def test_dropout_applies_in_training_only():
    f, params = define('wrn', 10, 2, 'CIFAR10', dropout=0.3)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert not torch.equal(f(images, params, True), f(images, params, True))
        assert torch.equal(f(images, params, False), f(images, params, False))


@pytest.mark.parametrize(
    'model, depth, dataset, own_options',
    [
        ('resnet', 21, 'CIFAR10', {}),
        ('wrn', 20, 'digits', {}),
        ('resnet', 50, 'ImageNet', {}),
        ('wrn', 18, 'ImageNet', {}),
        ('resnet', 20, 'digits', {'block': 'relu'}),
        ('wrn', 50, 'ImageNet', {'dropout': 0.3}),
        ('wrn', 16, 'digits', {'dropout': 1.0}),
    ],
)
def test_impossible_choices(model, depth, dataset, own_options):
    with pytest.raises(ValueError, match=str([depth, *own_options.values()][-1])):
        define(model, depth, 1, dataset, **own_options)

"""lab/models/resnet.py: ResNets and Wide ResNets against torchvision and against their papers."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from diracconv import dirac_weight
from lab.models.registry import define
from lab.models.resnet import BLOCKS
from lab.runs import checkpoint
from test import randomized, relative_error


def batch_norm(x, params, name):
    """Batch norm in evaluation mode."""
    parts = ('running_mean', 'running_var', 'weight', 'bias')
    return F.batch_norm(x, *(params[f'{name}.{part}'] for part in parts))


@pytest.mark.parametrize(
    'model, depth, width, name',
    [
        ('resnet', 18, 1, 'resnet18'),
        ('resnet', 34, 1, 'resnet34'),
        ('wrn', 50, 2, 'wide_resnet50_2'),
    ],
)
def test_torchvision_state_dict_loads(model, depth, width, name, tmp_path):
    """Outputs are equal in both modes, and so are the running statistics."""
    theirs = getattr(torchvision.models, name)()
    randomized(theirs.state_dict())
    torch.save(theirs.state_dict(), tmp_path / 'theirs.pth')
    found = checkpoint.load(tmp_path / 'theirs.pth')
    network = found.network
    assert (network['model'], network['depth'], network['width']) == (model, depth, width)
    ours, images = found.module(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for mode in (False, True):
            assert relative_error(ours.train(mode)(images), theirs.train(mode)(images)) <= 1e-5
    torch.testing.assert_close(
        ours.state_dict()['layer2.0.bn2.running_var'],
        theirs.state_dict()['layer2.0.bn2.running_var'],
    )


class TextbookBlock(nn.Module):
    """A block of a ResNet for small images, written with torch's modules."""

    def __init__(self, params, name, stride, end):
        super().__init__()
        own = {
            key.removeprefix(f'{name}.'): tensor
            for key, tensor in params.items()
            if key.startswith(f'{name}.')
        }
        out, inside = own['conv1.weight'].shape[:2]
        self.conv1 = nn.Conv2d(inside, out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        for conv in ('conv1', 'conv2'):
            if f'{conv}.alpha' in own:
                weight, alpha, beta = (
                    own.pop(f'{conv}.{part}') for part in ('weight', 'alpha', 'beta')
                )
                own[f'{conv}.weight'] = dirac_weight(weight, alpha, beta)
        missing, unexpected = self.load_state_dict(own, strict=False)
        assert all('num_batches_tracked' in key for key in missing)
        assert not unexpected
        self.stride, self.end, self.out = stride, end, out

    def forward(self, x):
        y = self.conv2(self.bn1(self.conv1(x)).relu())
        skip = F.avg_pool2d(x, 1, self.stride)
        zeros = torch.zeros(len(x), self.out - x.shape[1], *skip.shape[2:])
        skip = torch.cat([skip, zeros], 1)
        if self.end == 'bn-add-relu':
            return (self.bn2(y) + skip).relu()
        if self.end == 'bn-add':
            return self.bn2(y) + skip
        if self.end == 'add-bn-relu':
            return self.bn2(y + skip).relu()
        return self.bn2(y + skip)


@pytest.mark.parametrize('end', BLOCKS)
@pytest.mark.parametrize('model', ['resnet', 'resnet-dirac'])
def test_resnet_equals_the_textbook(model, end):
    f, params = define(model, 14, 1, 'CIFAR10', block=end)
    assert any(key.endswith('alpha') for key in params) == (model == 'resnet-dirac')
    randomized(params)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        x = F.conv2d(images, params['conv1.weight'], padding=1)
        x = batch_norm(x, params, 'bn1').relu()
        for g in range(3):
            for b in range(2):
                stride = 2 if g > 0 and b == 0 else 1
                x = TextbookBlock(params, f'layer{g + 1}.{b}', stride, end).eval()(x)
        expected = F.linear(x.mean((2, 3)), params['fc.weight'], params['fc.bias'])
        assert relative_error(f(images, params, False), expected) <= 1e-5


def test_wide_resnet_is_preactivated():
    f, params = define('wrn', 10, 2, 'CIFAR10', dropout=0.3)
    randomized(params)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        x = F.conv2d(images, params['conv1.weight'], padding=1)
        for g, stride in enumerate((1, 2, 2)):
            name = f'layer{g + 1}.0'
            y = batch_norm(x, params, f'{name}.bn1').relu()
            skip = F.conv2d(y, params[f'{name}.downsample.0.weight'], stride=stride)
            y = F.conv2d(y, params[f'{name}.conv1.weight'], stride=stride, padding=1)
            y = batch_norm(y, params, f'{name}.bn2').relu()
            x = F.conv2d(y, params[f'{name}.conv2.weight'], padding=1) + skip
        x = batch_norm(x, params, 'bn1').relu()
        expected = F.linear(x.mean((2, 3)), params['fc.weight'], params['fc.bias'])
        assert relative_error(f(images, params, False), expected) <= 1e-5


def test_dropout_applies_in_training_only():
    f, params = define('wrn', 10, 2, 'CIFAR10', dropout=0.3)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert not torch.equal(f(images, params, True), f(images, params, True))
        assert torch.equal(f(images, params, False), f(images, params, False))


@pytest.mark.parametrize(
    'model, depth, width, dataset, own_options, words',
    [
        ('resnet', 21, 1, 'CIFAR10', {}, ['21', '6n + 2', '20']),
        ('wrn', 20, 1, 'digits', {}, ['20', '6n + 4', '22']),
        ('resnet', 50, 1, 'ImageNet', {}, ['50', '18 or 34']),
        ('wrn', 18, 1, 'ImageNet', {}, ['18', '50']),
        ('resnet', 20, 1, 'digits', {'block': 'relu'}, ['relu', *BLOCKS]),
        ('resnet', 20, 0, 'digits', {}, ['width 0']),
        ('wrn', 50, 2, 'ImageNet', {'dropout': 0.3}, ['dropout 0.3']),
        ('wrn', 16, 2, 'digits', {'dropout': 1.0}, ['dropout 1.0']),
    ],
)
def test_impossible_choices(model, depth, width, dataset, own_options, words):
    with pytest.raises(ValueError) as caught:
        define(model, depth, width, dataset, **own_options)
    assert all(word in str(caught.value) for word in words), caught.value

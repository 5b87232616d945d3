"""lab/models/registry.py: every model by name, defined, recognized and folded."""

import inspect

import pytest
import torch

from lab.models.registry import (
    FOLDABLE,
    MODELS,
    define,
    fold,
    folded_module,
    infer,
    own_options,
)
from lab.models.resnet import BLOCKS
from test import relative_error


@pytest.mark.parametrize(
    'model, depth, width, dataset, expected',
    [
        ('resnet', 20, 1, 'CIFAR10', 269_722),
        ('resnet', 110, 1, 'CIFAR10', 1_727_962),
        ('resnet', 18, 1, 'ImageNet', 11_689_512),
        ('resnet', 34, 1, 'ImageNet', 21_797_672),
        ('wrn', 28, 10, 'CIFAR10', 36_479_194),
        ('wrn', 28, 10, 'CIFAR100', 36_536_884),
        ('wrn', 50, 2, 'ImageNet', 68_883_240),
        # Each channel of a Dirac convolution has an alpha and a beta.
        ('plain', 16, 1, 'CIFAR10', 173_402 - 2 * 4 * (16 + 32 + 64)),
        ('resnet-dirac', 20, 1, 'CIFAR10', 269_722 + 2 * 6 * (16 + 32 + 64)),
        # 1x1 kernels with their batch norms, and batch norms where the channels stay.
        (
            'repvgg',
            16,
            1,
            'CIFAR10',
            173_402
            - 2 * 4 * (16 + 32 + 64)
            + (4 * 16 * 16 + 16 * 32 + 3 * 32 * 32 + 32 * 64 + 3 * 64 * 64)
            + 2 * 4 * (16 + 32 + 64)
            + 2 * (4 * 16 + 3 * 32 + 3 * 64),
        ),
    ],
)
def test_parameter_counts(model, depth, width, dataset, expected):
    """They are those of the papers (0.27 M, 1.7 M, 36.5 M) and of torchvision."""
    params = define(model, depth, width, dataset)[1]
    assert sum(tensor.numel() for tensor in params.values() if tensor.requires_grad) == expected


def test_own_options_are_those_of_the_definitions():
    expected = {
        'resnet': {'block': BLOCKS[0]},
        'resnet-dirac': {'block': BLOCKS[0]},
        'wrn': {'dropout': 0.0},
    }
    assert {model: own_options(model) for model in MODELS} == {
        model: expected.get(model, {}) for model in MODELS
    }
    for model, definition in MODELS.items():
        assert list(inspect.signature(definition).parameters)[:3] == ['depth', 'width', 'dataset']
        for name, value in own_options(model).items():
            define(model, 14 if 'resnet' in model else 10, 1, 'digits', **{name: value})


@pytest.mark.parametrize('model', MODELS)
@pytest.mark.parametrize(
    'dataset, width', [('digits', 2), ('CIFAR100', 0.5), ('ImageNet', 0.25), ('folder', 0.125)]
)
def test_infer_recognizes_params(model, dataset, width):
    if dataset in ('ImageNet', 'folder'):
        depth = 50 if model == 'wrn' else 18
    else:
        depth = 14 if model.startswith('resnet') else 16
    num_classes = 3 if dataset == 'folder' else None
    params = define(model, depth, width, dataset, num_classes=num_classes)[1]
    expected = {
        'model': model,
        'depth': depth,
        'width': width,
        'dataset': 'ImageNet' if dataset == 'folder' else dataset,
        'num_classes': len(params['fc.bias']),
        'in_channels': 1 if dataset == 'digits' else 3,
    }
    assert infer(params) == expected
    if model in FOLDABLE:
        # The convolutions of a folded network are ordinary ones, so its Dirac model is named.
        version_1 = model in ('diracnet-v1', 'plain-ncrelu')
        folded_model = 'diracnet-v1' if version_1 else 'plain'
        assert infer(fold(model, params)) == {**expected, 'model': folded_model}


@pytest.mark.parametrize(
    'params',
    [
        {},
        {'weight': torch.zeros(3, 3)},
        {'conv1.weight': torch.zeros(16, 3, 3, 3), 'fc.weight': torch.zeros(10, 64)},
    ],
)
def test_infer_of_other_tensors_is_none(params):
    assert infer(params) is None


@pytest.mark.parametrize('model', MODELS)
def test_fold(model):
    depth = 14 if model.startswith('resnet') else 10
    f, params = define(model, depth, 1, 'digits')
    if model not in FOLDABLE:
        with pytest.raises(ValueError, match=model):
            fold(model, params)
        return
    images = torch.randn(2, 1, 8, 8)
    module = folded_module(model, fold(model, params))
    assert not module.training
    with torch.no_grad():
        expected, actual = f(images, params, False), module(images)
    assert relative_error(actual, expected) <= 1e-5

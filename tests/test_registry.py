"""lab/models/registry.py: every model by name, defined, recognized and folded."""

import inspect
from functools import partial

import pytest
import torch

import diracnet
from lab.models.registry import (
    CHAINS,
    FOLDABLE,
    MODELS,
    define,
    fold,
    folded_module,
    infer,
    own_options,
    recognize,
    shapes,
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
    for model, definition in MODELS.items():
        own = own_options(model)
        assert own == {**own, **expected.get(model, {})}
        assert not {'num_classes', 'in_channels', 'form', 'dirac', 'bn_init', 'alpha'} & set(own)
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
        'form': 'imagenet' if dataset in ('ImageNet', 'folder') else 'cifar',
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


def small(model):
    return dict(define(model, 14 if model.startswith('resnet') else 10, 0.25, 'digits')[1])


@pytest.mark.parametrize('model', MODELS)
def test_every_tensor_counts(model):
    """Tensors with one too few, one too many or one of another shape are no network's; the message
    names it."""
    params = small(model)
    for key, tensor in params.items():
        for changed in (
            {name: other for name, other in params.items() if name != key},
            {**params, key: tensor[None]},
            {**params, key: tensor.long()},
        ):
            assert infer(changed) is None, key
            if model in FOLDABLE:
                with pytest.raises(ValueError, match='not the parameters'):
                    fold(model, changed)
    with pytest.raises(ValueError, match='more.bias'):
        recognize({**params, 'more.bias': torch.ones(1)})
    # The original stored identities next to the parameters.
    assert recognize({**params, 'eye4_4_3_3': torch.zeros(1)}) == recognize(params)


@pytest.mark.parametrize('model', FOLDABLE)
def test_every_folded_tensor_counts(model):
    folded = fold(model, small(model))
    for key in folded:
        changed = {name: other for name, other in folded.items() if name != key}
        assert infer(changed) is None, key
        with pytest.raises(ValueError):
            folded_module(model, changed)
    assert infer({**folded, 'features.more': torch.ones(1)}) is None


@pytest.mark.parametrize('model', ['diracnet', 'diracnet-v1', 'resnet-dirac'])
def test_networks_of_two_kinds_of_blocks(model):
    params = small(model)
    scales = [key for key in params if key.endswith(('.alpha', '.beta'))]
    for pair in zip(scales[::2], scales[1::2]):
        changed = {key: tensor for key, tensor in params.items() if key not in pair}
        with pytest.raises(ValueError, match='alpha'):
            recognize(changed)
        if model in FOLDABLE:
            with pytest.raises(ValueError, match='alpha'):
                fold(model, changed)


@pytest.mark.parametrize('model', [model for model in FOLDABLE if model != 'repvgg'])
@pytest.mark.parametrize('key', ['conv1x1', 'bn1x1.weight', 'bn_identity.running_var', 'other'])
def test_no_branch_is_left_out(model, key):
    """Folding the others alone would make another network."""
    params = {**small(model), f'group0.block1.{key}': torch.ones(4)}
    functions = [partial(fold, model)]
    if model in CHAINS:
        functions.append(diracnet.fold)
    for function in functions:
        with pytest.raises(ValueError):
            function(params)


def test_nothing_of_a_network_is_made():
    """An architecture is read off shapes alone."""
    params = {'conv': torch.empty(1, 1, 3, 3), 'fc.weight': torch.empty(10, 2**45, device='meta')}
    assert infer(params) is None
    stem = torch.empty(64, 3, 7, 7)
    assert infer({'conv1.weight': stem, 'fc.weight': torch.empty(10, 2**50, device='meta')}) is None
    state = torch.get_rng_state()
    for model in MODELS:
        assert shapes(model=model, depth=50 if model == 'wrn' else 18, width=2, dataset='ImageNet')
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize('width', [0.25, 0.7, 1.01, 2.3])
@pytest.mark.parametrize('model, depth', [('wrn', 50), ('resnet', 18), ('diracnet', 34)])
def test_widths_that_are_truncated(model, depth, width):
    expected = shapes(model=model, depth=depth, width=width, dataset='ImageNet')
    found = shapes(**recognize(expected))
    assert {key: t.shape for key, t in found.items()} == {k: t.shape for k, t in expected.items()}


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

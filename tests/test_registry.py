"""lab/models/registry.py: every model by name, defined, folded, and recognized by its tensors."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

import diracnet
from diracparams import chain_params, make_architecture
from lab.errors import UserError
from lab.models import registry
from lab.models.plain import plain_conv_params
from lab.models.registry import (
    CHAINS,
    FOLDS,
    MODELS,
    VERSION_1,
    define,
    fold,
    folded_module,
    recognize,
    shapes,
)
from lab.runs import checkpoint
from test import constants, count_learned, randomized, relative_error
from tools import export, predict, propagation

RECOGNIZED = (*CHAINS, *VERSION_1)


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
        # Per convolution a 1x1 kernel and a second batch norm, as large as alpha and beta; batch
        # norms of the identity where the channels stay.
        ('repvgg', 16, 1, 'CIFAR10', 173_402 + 4 * 16**2 + 3 * (32**2 + 64**2) + 2560 + 704),
    ],
)
def test_parameter_counts(model, depth, width, dataset, expected):
    """They are those of the papers (0.27 M, 1.7 M, 36.5 M) and of torchvision."""
    assert count_learned(define(model, depth, width, dataset)[1]) == expected


@pytest.mark.parametrize('model', MODELS)
def test_fold(model):
    f, params = define(model, 14 if model.startswith('resnet') else 10, 1, 'digits')
    if model not in FOLDS:
        with pytest.raises(ValueError, match=model):
            fold(model, params)
        return
    params = constants(randomized(params))
    images = torch.randn(2, 1, 8, 8)
    module = folded_module(model, fold(model, params))
    assert not module.training
    assert relative_error(module(images), f(images, params, False)) <= 1e-5


@pytest.mark.parametrize('model', RECOGNIZED)
@pytest.mark.parametrize(
    'depth, width, dataset, others',
    [
        (16, 2, 'digits', {}),
        (10, 0.5, 'CIFAR10', {'num_classes': 3, 'in_channels': 4}),  # which fit no data set
        (18, 0.25, 'ImageNet', {'num_classes': 5}),
        (34, 1.01, 'ImageNet', {}),  # the widths are truncated
        (34, 1, 'CIFAR10', {'widen_early': True}),
        (18, 1, 'ImageNet', {'widen_early': True}),
    ],
)
def test_published_and_bare_files_are_recognized(model, depth, width, dataset, others):
    params = shapes(model=model, depth=depth, width=width, dataset=dataset, **others)
    network = recognize({**params, 'eye16_16_3_3': torch.zeros(1)})  # the original's have those
    expected = {'model': model, 'depth': depth, 'dataset': dataset, **others}
    assert expected.items() <= network.items()
    again = shapes(**network)
    assert {key: tensor.shape for key, tensor in again.items()} == {
        key: tensor.shape for key, tensor in params.items()
    }
    # The convolutions of a folded network are ordinary ones.
    folded_model = 'diracnet-v1' if model in VERSION_1 else 'plain'
    assert recognize(fold(model, params)) == {**network, 'model': folded_model}


@pytest.mark.parametrize('folded', [False, True])
@pytest.mark.parametrize('model', RECOGNIZED)
def test_every_tensor_counts(model, folded):
    """Tensors with one too few, one too many or one of another shape are no network's."""
    params = shapes(model=model, depth=10, width=0.25, dataset='digits')
    params = fold(model, params) if folded else params
    for key, tensor in params.items():
        for changed in (
            {name: other for name, other in params.items() if name != key},
            {**params, key: tensor[None]},
            {**params, f'{key}.more': torch.ones(1)},
        ):
            with pytest.raises(ValueError):
                recognize(changed)


@pytest.mark.parametrize(
    'params',
    [
        {},
        {'weight': torch.zeros(3, 3)},
        {'conv1.weight': torch.zeros(16, 3, 3, 3), 'fc.weight': torch.zeros(10, 64)},
        {'conv': torch.zeros(1, 1, 3, 3), 'fc.weight': torch.empty(10, 2**45, device='meta')},
    ],
)
def test_other_tensors_are_not_recognized(params):
    with pytest.raises(ValueError):
        recognize(params)


@pytest.mark.parametrize('model', RECOGNIZED)
@pytest.mark.parametrize('other', ['repvgg', 'resnet'])
def test_the_params_of_another_model_do_not_fold(model, other):
    """Folding a part of them alone would make another network."""
    with pytest.raises(ValueError):
        fold(model, define(other, 20 if other == 'resnet' else 10, 0.25, 'digits')[1])


# --- a model of one's own ----------------------------------------------------------------------


def define_own(depth, width, dataset, *, slope=0.0, cap=1e9, dropout=0.0, scaled=False, **choices):
    """A plain chain with the tensors of plain, unless it is scaled."""

    def block(x, params, name, mode, norm):
        x = F.dropout(F.leaky_relu(x, slope).clamp(max=cap), dropout, mode)
        x = F.conv2d(x, params[f'{name}.conv'], padding=1) * params.get(f'{name}.scale', 1)
        return diracnet.batch_norm(x, params, f'{name}.bn', mode, norm)

    architecture = make_architecture(depth, width, dataset, **choices)
    params = chain_params(architecture, plain_conv_params)
    if scaled:
        params |= {
            f'{name}.scale': torch.full((), 2.0) for name, _, _ in sum(architecture.groups, [])
        }
    return partial(diracnet.chain, architecture, block=block), params


def define_shared(depth, width, dataset, **choices):
    """All layers have one convolution. Its name is one of a folded network."""
    params = {'features.conv': torch.randn(1, 1, 3, 3) / 9, 'head.weight': torch.randn(10, 1)}

    def f(inputs, params, mode, norm=F.batch_norm):
        for _ in range(depth):
            inputs = F.conv2d(inputs, params['features.conv'], padding=1)
        return F.linear(inputs.mean((2, 3)), params['head.weight'])

    return f, params


def load_own(path, **options):
    """The Checkpoint of a model called own, and its logits for `images`."""
    network = {'model': 'own', 'depth': 10, 'width': 0.25, 'dataset': 'digits', **options}
    network |= {'num_classes': 10, 'in_channels': 1}
    f, params = define(**network)
    params = constants(randomized(params))
    torch.save({'params': params, 'network': network}, path)
    images = torch.randn(5, 1, 8, 8)
    return checkpoint.load(path), images, f(images, params, False)


@pytest.mark.parametrize('definition', [partial(define_own, slope=0.1), define_shared])
def test_a_checkpoint_is_of_the_model_that_it_names(definition, tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, 'own', definition)
    loaded, images, logits = load_own(tmp_path / 'own.pt7')
    assert loaded.network['model'] == 'own' and not loaded.folded
    assert torch.equal(loaded.module()(images), logits)
    with pytest.raises(UserError, match='own'):
        loaded.fold()


@pytest.mark.parametrize('error', [TypeError, RuntimeError])
def test_a_mistake_in_a_definition_is_seen(error, monkeypatch):
    def define_wrong(depth, width, dataset):
        raise error('a mistake')

    monkeypatch.setitem(MODELS, 'own', define_wrong)
    with pytest.raises(error, match='a mistake'):
        shapes(model='own', depth=10, width=1, dataset='digits')


@pytest.mark.parametrize('options', [{}, {'slope': 0.0}, {'dropout': 0.5}])
def test_options_with_which_a_model_folds(options, tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, 'own', define_own)
    monkeypatch.setitem(registry.FOLDS, 'own', registry.FOLDS['plain'])
    loaded, images, logits = load_own(tmp_path / 'own.pt7', **options)
    assert relative_error(loaded.fold()(images), logits) <= 1e-5


@pytest.mark.parametrize(
    'options', [{'slope': 0.1}, {'cap': 3.0}, {'cap': 100.0}, {'scaled': True}]
)
def test_options_with_which_a_model_does_not_fold(options, tmp_path, refused, monkeypatch):
    monkeypatch.setitem(MODELS, 'own', define_own)
    monkeypatch.setitem(registry.FOLDS, 'own', registry.FOLDS['plain'])
    monkeypatch.setattr(propagation, 'MODELS', ('own',))
    path = tmp_path / 'own.pt7'
    loaded, images, logits = load_own(path, **options)
    assert torch.equal(loaded.module()(images), logits)
    refused(1, 'own', predict.main, path, tmp_path, '--dataset', 'digits')
    refused(1, 'own', export.main, path, tmp_path / 'own.pth', '--dataset', 'digits')
    assert 'own' in propagation.why_unmeasurable(loaded.network)

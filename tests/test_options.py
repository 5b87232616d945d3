"""lab/training/options.py and recipes.py: values, help, defaults, what a resumed run may change.
test_bad_inputs_options.py has the command lines that are refused."""

import json

import pytest

from conftest import python
from diracparams import DATASETS
from lab.errors import OptionError
from lab.models.registry import MODELS
from lab.training.options import (
    CHANGEABLE_ON_RESUME,
    DEFAULTS,
    OPTIONS,
    complete,
    default_in_words,
    options_table,
    parse,
)
from lab.training.recipes import CHANGES, CIFAR

# --- the command line ------------------------------------------------------------------------


@pytest.mark.parametrize(
    'arguments, expected',
    [
        ('', {}),
        ('--depth 34 --width 0.5 --lr 1e-2', {'depth': 34, 'width': 0.5, 'lr': 0.01}),
        ('--seed 18446744073709551615 --depth 6000003', {'seed': 2**64 - 1, 'depth': 6000003}),
        ('--batchSize 32 --weightDecay 0', {'batch_size': 32, 'weight_decay': 0.0}),
        ('--compile --cuda', {'compile': True, 'cuda': True}),
        ('--ema', {'ema': 0.998}),
        ('--ema 0.9', {'ema': 0.9}),
        ('--warmup 100', {'warmup': 100}),
        ('--warmup ramp:400', {'warmup': 'ramp:400'}),
        ('--warmup ramp:5.0e', {'warmup': 'ramp:5e'}),
        ('--epoch_step []', {'epoch_step': []}),
        ('--epoch_step [1,20]', {'epoch_step': [1, 20]}),
        ('--holdout 100', {'holdout': 100}),
        ('--holdout 12.5%', {'holdout': '12.5%'}),
        ('--bn_init shifted', {'bn_init': 'shifted'}),
        ('--bn_init 1,-0.25', {'bn_init': [1.0, -0.25]}),
        ('--bn_init [1,0.5]', {'bn_init': [1.0, 0.5]}),
        ('--alpha 2 --beta depth', {'alpha': 2.0, 'beta': 'depth'}),
        ('--bn_momentum 1', {'bn_momentum': 1.0}),
        ('--bn_momentum cumulative', {'bn_momentum': 'cumulative'}),
        ('--dataroot ~/a --save b', {'dataroot': '~/a', 'save': 'b'}),
    ],
)
def test_values(arguments, expected):
    options = parse(arguments.split())
    assert options == expected
    assert {name: type(options[name]) for name in options} == {
        name: type(value) for name, value in expected.items()
    }


def test_defaults_are_values_of_their_options():
    for defaults in (DEFAULTS, CIFAR, *CHANGES.values()):
        for name, value in defaults.items():
            if value is None or value is False:
                continue
            text = value if isinstance(value, str) else json.dumps(value)
            assert parse([f'--{name}', text]) == {name: value}
    assert not set(DEFAULTS) & set(CIFAR)


def test_help_and_manual_have_every_option_with_its_default():
    result = python('train.py', '--help')
    assert result.status == 0 and result.err == ''
    text = ''.join(result.out.split())  # argparse breaks lines at hyphens too
    rows = options_table().splitlines()[2:]
    assert len(rows) == len(OPTIONS)
    for row, name in zip(rows, OPTIONS):
        default = default_in_words(name)
        assert f'`--{name}`' in row and row.endswith(f' {default} |') and row.count('|') == 4
        assert f'--{name}' in text
        assert not default or f'(default{default})'.replace(' ', '') in text
    assert default_in_words('batch_size') == '128, digits 64, imagenet 256, pretrained imagenet 64'


# --- the defaults of a run -------------------------------------------------------------------

# Of the paper for CIFAR and ImageNet.
NAMES = 'depth epochs epoch_step lr lr_decay_ratio weight_decay batch_size randomcrop_pad'
CIFAR_RECIPE = (16, 200, [60, 120, 160], 0.1, 0.2, 5e-4, 128, 4)
IMAGENET_RECIPE = (18, 100, [30, 60, 90], 0.1, 0.1, 1e-4, 256, 0)
RECIPES = {
    'CIFAR10': CIFAR_RECIPE,
    'CIFAR100': CIFAR_RECIPE,
    'SVHN': CIFAR_RECIPE,
    'FashionMNIST': (16, 60, [20, 40, 50], 0.1, 0.2, 5e-4, 128, 0),
    'digits': (16, 60, [30, 45, 55], 0.2, 0.2, 5e-3, 64, 0),
    'ImageNet': IMAGENET_RECIPE,
    'folder': IMAGENET_RECIPE,
}
IN_ALL_RECIPES = {
    'width': 1,
    'dtype': 'float',
    'image_size': 224,
    'schedule': 'step',
    'warmup': 0,
    'label_smoothing': 0,
    'tta': 'none',
    'preprocess': 'meanstd',
    'bn_momentum': 0.1,
    'dataroot': './data',
    'seed': 1,
    'nthread': 4,
    'checkpoint_minutes': 10,
    **dict.fromkeys(('no_mirror', 'recompute', 'compile', 'sync_bn', 'recalibrate_bn'), False),
    **dict.fromkeys(('init', 'pretrained', 'freeze', 'clip', 'ema'), None),
    **dict.fromkeys(('holdout', 'cutout', 'per_class'), 0),
}
# depth on small images and on ImageNet, where it is not that of a DiracNet
DEPTHS = {'resnet': (20, 18), 'resnet-dirac': (20, 18), 'wrn': (16, 50)}
RATES = {'rmsprop': 0.01, 'adadelta': 1.0, 'adagrad': 0.1, 'adamw': 0.001}


def expected_defaults(model, dataset, optim):
    is_large = dataset in ('ImageNet', 'folder')
    expected = {**IN_ALL_RECIPES, **dict(zip(NAMES.split(), RECIPES[dataset]))}
    expected.update(model=model, dataset=dataset, optim=optim)
    if model in DEPTHS:
        expected['depth'] = DEPTHS[model][is_large]
    if model == 'wrn' and is_large:
        expected['width'] = 2
    if optim in RATES:
        expected['lr'] = RATES[optim]
    if dataset == 'ImageNet':
        expected['dataroot'] = '~/ILSVRC2012'
    return expected


def check(options, expected):
    assert {name: options[name] for name in expected} == expected
    assert [type(options[name]) for name in expected] == [type(v) for v in expected.values()]


@pytest.mark.parametrize('dataset', DATASETS)
def test_defaults(dataset):
    for model in MODELS:
        for optim in ('sgd', 'nesterov', *RATES):
            options = complete({'model': model, 'dataset': dataset, 'optim': optim})
            check(options, expected_defaults(model, dataset, optim))
    assert complete({}) == complete({'model': 'diracnet', 'dataset': 'CIFAR10', 'optim': 'sgd'})


FAST = {'epochs': 30, 'lr': 0.2, 'schedule': 'linear', 'epoch_step': [], 'warmup': 'ramp:200'}
FAST_DIGITS = {'epochs': 100, 'lr': 0.1, 'warmup': 'ramp:100', 'label_smoothing': 0.1}
FINE = {'epochs': 30, 'lr': 0.1, 'schedule': 'linear', 'epoch_step': []}


@pytest.mark.parametrize(
    'command, expected',
    [
        ('--recipe fast', {**FAST, 'bn_init': 'shifted', 'tta': 'flip', 'randomcrop_pad': 4}),
        ('--recipe fast --model repvgg', FAST),
        ('--recipe fast --model resnet', {**FAST, 'lr': 0.1, 'depth': 20}),
        ('--recipe fast --model wrn', {**FAST, 'lr': 0.1}),
        ('--recipe fast --optim adamw', {**FAST, 'lr': 0.001}),
        ('--recipe fast --no_mirror', {**FAST, 'tta': 'none'}),
        ('--recipe fast --schedule step', {'schedule': 'step', 'epoch_step': [15, 23, 27]}),
        ('--recipe fast --dataset FashionMNIST', {**FAST, 'randomcrop_pad': 2}),
        ('--recipe fast --dataset digits', {**FAST_DIGITS, 'tta': 'none', 'randomcrop_pad': 1}),
        ('--recipe fast --dataset folder --form cifar', {**FAST, 'image_size': 32}),
        ('--pretrained a --dataset folder', {**FINE, 'batch_size': 64}),
        ('--pretrained a --dataset folder --form cifar', {**FINE, 'batch_size': 128}),
        # what is given counts
        ('--dataset digits --optim adamw --lr 0.5 --width 2', {'lr': 0.5, 'width': 2}),
        ('--width 0.5', {'width': 0.5}),
        ('--dataset ImageNet --imagenetpath a', {'dataroot': 'a'}),
        ('--dataset ImageNet --imagenetpath a --dataroot b', {'dataroot': 'b'}),
        ('--dataset folder --imagenetpath a', {'dataroot': './data'}),
        # falls scale with the epochs
        ('--dataset digits --epochs 5', {'epoch_step': [3, 4, 5]}),
        ('--dataset digits --epochs 2', {'epoch_step': [2]}),
        ('--dataset digits --epochs 1', {'epoch_step': []}),
        ('--dataset digits --epochs 120', {'epoch_step': [60, 90, 110]}),
        ('--dataset ImageNet --epochs 10', {'epoch_step': [3, 6, 9]}),
        ('--epochs 10 --epoch_step [1]', {'epoch_step': [1]}),
    ],
)
def test_recipes_and_given_options(command, expected):
    check(complete(parse(command.split())), expected)


@pytest.mark.parametrize(('instructions', 'dtype'), [(True, 'bfloat16'), (False, 'float')])
def test_the_fast_recipe_uses_bfloat16_where_it_is_fast(instructions, dtype, monkeypatch):
    monkeypatch.setattr('lab.training.recipes.has_bfloat16', lambda: instructions)
    given = {'dataset': 'FashionMNIST', 'recipe': 'fast'}
    stored = complete(given)
    assert stored['dtype'] == dtype
    assert complete({'recipe': 'fast', 'dataset': 'digits'})['dtype'] == 'float'
    assert complete({**given, 'dtype': 'double'})['dtype'] == 'double'
    monkeypatch.setattr('lab.training.recipes.has_bfloat16', lambda: not instructions)
    assert complete({}, stored)['dtype'] == dtype  # a resumed run keeps it on another machine


def test_options_of_single_models():
    scales = {'bn_init': 'paper', 'alpha': None, 'beta': None}
    own = {
        'diracnet': scales,
        'diracnet-v1': scales,
        'plain': {'bn_init': 'paper'},
        'plain-ncrelu': {'bn_init': 'paper'},
        'repvgg': {},
        'resnet': {'block': 'bn-add-relu'},
        'resnet-dirac': {'block': 'bn-add-relu', 'alpha': None, 'beta': None},
        'wrn': {'dropout': 0.0},
    }
    for model, expected in own.items():
        check(complete({'model': model}), expected)
    for model, name in (('resnet', 'alpha'), ('wrn', 'block'), ('repvgg', 'bn_init')):
        assert name not in complete({'model': model})
        with pytest.raises(OptionError, match=f'--{name}.*{model}'):
            complete({'model': model, name: 1})


# --- a resumed run ---------------------------------------------------------------------------

STORED = complete({'dataset': 'digits', 'lr': 0.3, 'depth': 34, 'epoch_step': [1]})


def test_stored_options_hold():
    assert complete({}, STORED) == STORED
    assert complete(STORED, STORED) == STORED
    older = {name: value for name, value in STORED.items() if name != 'warmup'}
    assert complete({'epochs': 99}, older) == {**STORED, 'epochs': 99}  # the falls stay


@pytest.mark.parametrize(
    'name, value',
    [
        *(('save', 'b'), ('resume', 'b'), ('dataroot', 'b'), ('imagenetpath', 'b')),
        *(('nthread', 0), ('epochs', 99), ('checkpoint_minutes', 1.0), ('report', True)),
        *(
            ('tensorboard', True),
            ('device', 'cuda:1'),
            ('cuda', True),
            ('gpu_id', '1'),
            ('ngpu', 2),
        ),
    ],
)
def test_what_a_resumed_run_may_change(name, value):
    stored = {**STORED, 'save': 'a', 'resume': 'a', 'device': 'cpu', 'cuda': False, 'gpu_id': '0'}
    assert name in CHANGEABLE_ON_RESUME
    assert complete({name: value}, stored) == {**stored, name: value}


@pytest.mark.parametrize(
    'name, value',
    [('lr', 0.2), ('seed', 2), ('dataset', 'CIFAR10'), ('epoch_step', [2]), ('compile', True)],
)
def test_what_a_resumed_run_may_not_change(name, value):
    with pytest.raises(OptionError) as error:
        complete({name: value}, STORED)
    for word in (f'--{name}', json.dumps(value), json.dumps(STORED[name])):
        assert word in str(error.value)


def test_a_resumed_cosine_keeps_its_end():
    stored = complete({'dataset': 'digits', 'schedule': 'cosine', 'epochs': 5})
    assert stored['epoch_step'] == []
    assert complete({'epochs': 5}, stored) == stored
    with pytest.raises(OptionError, match='--epochs'):
        complete({'epochs': 6}, stored)

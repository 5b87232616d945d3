"""lab/training/options.py and option_table.py: the flags, the defaults, what a resumed run may
change, and bad command lines."""

import json
import re
import shlex

import pytest

import train
from conftest import python
from diracparams import DATASETS
from lab.errors import OptionError
from lab.models.registry import MODELS, own_options
from lab.training.option import UNSET
from lab.training.option_table import OPTIONS
from lab.training.options import FREE_ON_RESUME, complete, options_table, parse

# A value of every option as on a command line, and as parsed; none is a default.
EXAMPLES = {
    'model': ('wrn', 'wrn'),
    'depth': ('34', 34),
    'width': ('0.5', 0.5),
    'dtype': ('bfloat16', 'bfloat16'),
    'block': ('bn-add', 'bn-add'),
    'dropout': ('0.3', 0.3),
    'init': ('xavier', 'xavier'),
    'bn_init': ('1,0.25', [1.0, 0.25]),
    'recipe': ('fast', 'fast'),
    'alpha': ('2', 2.0),
    'beta': ('depth', 'depth'),
    'bn_momentum': ('cumulative', 'cumulative'),
    'recalibrate_bn': (None, True),
    'dataset': ('CIFAR100', 'CIFAR100'),
    'dataroot': ('~/data', '~/data'),
    'imagenetpath': ('/images', '/images'),
    'nthread': ('0', 0),
    'form': ('imagenet', 'imagenet'),
    'image_size': ('64', 64),
    'no_mirror': (None, True),
    'preprocess': ('zca', 'zca'),
    'randomcrop_pad': ('2', 2),
    'cutout': ('4', 4),
    'per_class': ('10', 10),
    'holdout': ('100', 100),
    'epochs': ('3', 3),
    'epoch_step': ('[1,2]', [1, 2]),
    'schedule': ('cosine', 'cosine'),
    'pretrained': ('net.pth', 'net.pth'),
    'freeze': ('group1', 'group1'),
    'optim': ('adamw', 'adamw'),
    'lr': ('1e-2', 0.01),
    'warmup': ('ramp:400', 'ramp:400'),
    'lr_decay_ratio': ('0.5', 0.5),
    'batch_size': ('32', 32),
    'weight_decay': ('1e-4', 1e-4),
    'label_smoothing': ('0.1', 0.1),
    'clip': ('1', 1.0),
    'ema': ('0.9', 0.9),
    'tta': ('flip', 'flip'),
    'seed': ('0', 0),
    'recompute': (None, True),
    'compile': (None, True),
    'save': ('logs/run', 'logs/run'),
    'resume': ('auto', 'auto'),
    'checkpoint_minutes': ('0.5', 0.5),
    'evaluate': ('net.pth', 'net.pth'),
    'tensorboard': (None, True),
    'report': (None, True),
    'device': ('cuda:1', 'cuda:1'),
    'cuda': (None, True),
    'gpu_id': ('1', '1'),
    'ngpu': ('2', 2),
    'sync_bn': (None, True),
}
OTHER_SPELLINGS = {'batch_size': '--batchSize', 'weight_decay': '--weightDecay'}


def test_examples_are_complete():
    assert set(EXAMPLES) == set(OPTIONS)


@pytest.mark.parametrize('name', EXAMPLES)
def test_every_flag_is_accepted(name):
    text, value = EXAMPLES[name]
    for flag in (f'--{name}', OTHER_SPELLINGS.get(name, f'--{name}')):
        found = parse([flag] if text is None else [flag, text])
        assert found == {name: value} and type(found[name]) is type(value)
    assert parse([]) == {}


@pytest.fixture(scope='module')
def help_sections():
    """What `train.py --help` says of each option, by its name."""
    result = python('train.py', '--help')
    assert result.status == 0 and result.err == ''
    sections = re.split(r'\n  (?=--)', result.out)[1:]
    return {re.match(r'--(\w+)', section)[1]: section for section in sections}


def test_help_names_every_option_and_every_default(help_sections):
    assert set(help_sections) == set(OPTIONS)
    for name, option in OPTIONS.items():
        # Without white space, as argparse breaks lines at hyphens too.
        section = ''.join(help_sections[name].split())
        for value in (option.default, *option.defaults.values()):
            if value not in (UNSET, None, False):
                assert format_value(value) in section, (name, value)
        for choice in option.choices or ():
            assert choice in section, (name, choice)
    for name, flag in OTHER_SPELLINGS.items():
        assert flag in help_sections[name]
    assert 'auto' in help_sections['resume'] and 'torchrun' in help_sections['ngpu']


def format_value(value):
    if isinstance(value, list):
        return json.dumps(value, separators=(',', ':'))
    return value if isinstance(value, str) else f'{value:g}'


def test_table_for_the_manual():
    lines = options_table().splitlines()
    assert len(lines) == 2 + len(OPTIONS)
    for line, name in zip(lines[2:], OPTIONS):
        assert f'`--{name}`' in line and line.count('|') == 4


# --- the defaults of a run -------------------------------------------------------------------

# Of the paper for CIFAR and ImageNet: depth, epochs, epoch_step, lr, lr_decay_ratio,
# weight_decay, batch_size, randomcrop_pad.
CIFAR = (16, 200, [60, 120, 160], 0.1, 0.2, 5e-4, 128, 4)
IMAGENET = (18, 100, [30, 60, 90], 0.1, 0.1, 1e-4, 256, 0)
RECIPES = {
    'CIFAR10': CIFAR,
    'CIFAR100': CIFAR,
    'SVHN': CIFAR,
    'FashionMNIST': (16, 60, [20, 40, 50], 0.1, 0.2, 5e-4, 128, 0),
    'digits': (16, 60, [30, 45, 55], 0.2, 0.2, 5e-3, 64, 0),
    'ImageNet': IMAGENET,
    'folder': IMAGENET,
}
RECIPE_NAMES = 'depth epochs epoch_step lr lr_decay_ratio weight_decay batch_size randomcrop_pad'
GENERAL = {
    'dataroot': './data',
    'imagenetpath': '~/ILSVRC2012',
    'image_size': 224,
    'preprocess': 'meanstd',
    'dtype': 'float',
    'recipe': 'paper',
    'nthread': 4,
    'seed': 1,
    'holdout': 0,
    'no_mirror': False,
    'ngpu': 1,
    'recompute': False,
    'compile': False,
    'sync_bn': False,
    'checkpoint_minutes': 10,
    'init': None,
    'cutout': 0,
    'per_class': 0,
    'pretrained': None,
    'freeze': None,
    'schedule': 'step',
    'warmup': 0,
    'label_smoothing': 0,
    'clip': None,
    'ema': None,
    'tta': 'none',
    'bn_momentum': 0.1,
    'recalibrate_bn': False,
    'tensorboard': False,
    'report': False,
}
# depth on small images and on ImageNet, where it is not that of a DiracNet
DEPTHS = {'resnet': (20, 18), 'resnet-dirac': (20, 18), 'wrn': (16, 50)}
RATES = {'rmsprop': 0.01, 'adadelta': 1.0, 'adagrad': 0.1, 'adamw': 0.001}
SCALES = {'bn_init': 'paper', 'alpha': None, 'beta': None}
OWN_OPTIONS = {
    'diracnet': SCALES,
    'diracnet-v1': SCALES,
    'plain': {'bn_init': 'paper'},
    'plain-ncrelu': {'bn_init': 'paper'},
    'resnet': {'block': 'bn-add-relu'},
    'resnet-dirac': {'block': 'bn-add-relu', 'alpha': None, 'beta': None},
    'wrn': {'dropout': 0.0},
}


def expected_defaults(model, dataset, optim):
    large = dataset in ('ImageNet', 'folder')
    expected = {**GENERAL, **dict(zip(RECIPE_NAMES.split(), RECIPES[dataset])), 'width': 1}
    expected.update(OWN_OPTIONS.get(model, {}), model=model, dataset=dataset, optim=optim)
    if model in DEPTHS:
        expected['depth'] = DEPTHS[model][large]
    if model == 'wrn' and large:
        expected['width'] = 2
    if optim in RATES:
        expected['lr'] = RATES[optim]
    if dataset == 'ImageNet':
        expected['dataroot'] = '~/ILSVRC2012'
    return expected


@pytest.mark.parametrize('dataset', DATASETS)
@pytest.mark.parametrize('model', MODELS)
def test_defaults(model, dataset):
    for optim in ('sgd', 'nesterov', *RATES):
        options = complete({'model': model, 'dataset': dataset, 'optim': optim})
        assert options == expected_defaults(model, dataset, optim)
        assert {name: type(value) for name, value in options.items()} == {
            name: type(value) for name, value in expected_defaults(model, dataset, optim).items()
        }


def test_defaults_without_any_option():
    assert complete({}) == expected_defaults('diracnet', 'CIFAR10', 'sgd')


def test_given_options_replace_defaults():
    given = {'dataset': 'digits', 'optim': 'adamw', 'lr': 0.5, 'width': 2.0, 'depth': 28}
    options = complete(given)
    assert (options['lr'], options['depth']) == (0.5, 28)
    assert options['width'] == 2 and type(options['width']) is int
    assert complete({'width': 0.5})['width'] == 0.5


@pytest.mark.parametrize(
    'given, dataroot',
    [
        ({'imagenetpath': 'here'}, 'here'),
        ({'imagenetpath': 'here', 'dataroot': 'there'}, 'there'),
        ({'dataset': 'folder', 'imagenetpath': 'here'}, './data'),
    ],
)
def test_imagenetpath(given, dataroot):
    assert complete({'dataset': 'ImageNet', **given})['dataroot'] == dataroot


# --- a resumed run ---------------------------------------------------------------------------


def test_which_options_a_resumed_run_may_change():
    expected = (
        'resume save dataroot imagenetpath nthread epochs device cuda gpu_id ngpu '
        'checkpoint_minutes tensorboard report'
    )
    assert set(expected.split()) == FREE_ON_RESUME


# A run does not store `evaluate`. Its network decides about `form`.
@pytest.mark.parametrize('name', [name for name in EXAMPLES if name not in ('evaluate', 'form')])
def test_resume_check(name):
    """A changed value is refused unless it is free to change; the stored one is always accepted."""
    model = {'block': 'resnet', 'dropout': 'wrn'}.get(name, 'diracnet')
    new = complete({'dataset': 'digits', 'model': model})
    stored = {'save': 'a', 'resume': 'a', 'device': 'cpu', 'cuda': False, 'gpu_id': '0', **new}
    value = EXAMPLES[name][1]
    assert stored[name] != value
    assert complete({name: stored[name]}, stored) == stored
    if name in FREE_ON_RESUME:
        assert complete({name: value}, stored) == {**stored, name: value}
        return
    with pytest.raises(OptionError) as error:
        complete({name: value}, stored)
    for word in (f'--{name}', json.dumps(value), json.dumps(stored[name])):
        assert word in str(error.value)


def test_stored_options_hold():
    stored = complete({'dataset': 'digits', 'lr': 0.3, 'depth': 34, 'epoch_step': [1]})
    assert complete({}, stored) == stored
    old = {name: value for name, value in stored.items() if name != 'warmup'}
    assert complete({'epochs': 99}, old) == {**stored, 'epochs': 99}  # an older run has fewer


# --- bad command lines -----------------------------------------------------------------------


@pytest.mark.parametrize(
    'arguments, words',
    [
        ('--dept 34', '--dept'),
        ('--dep 34', '--dep'),
        ('--depth x', 'x'),
        ('--depth 0', '--depth'),
        ('--dataset MNIST', ['MNIST', 'digits']),
        ('--model vgg', ['vgg', 'diracnet']),
        ('--lr nan', ['--lr', 'nan']),
        ('--lr -1', '--lr'),
        ('--width 0', '--width'),
        ('--epochs 0', '--epochs'),
        ('--batch_size 1.5', '1.5'),
        ('--epoch_step 60', ['--epoch_step', '60']),
        ('--epoch_step [60,', ['--epoch_step', '[60,']),
        ('--epoch_step [60,30]', ['--epoch_step', '[60,30]']),
        ('--dtype int', 'int'),
        ('extra', 'extra'),
        ('--dataset digits --depth 20', ['20', '6n + 4']),
        ('--dataset digits --randomcrop_pad 8', '--randomcrop_pad 8'),
        ('--dataset digits --holdout 1437', '--holdout 1437'),
        ('--dataset digits --checkpoint_minutes -1', '--checkpoint_minutes'),
        # devices
        ('--dataset digits --device gpu', 'gpu'),
        ('--dataset digits --device cuda:99', 'cuda:99'),
        ('--dataset digits --device cpu --cuda', '--cuda'),
        ('--dataset digits --device cpu --gpu_id 0', '--gpu_id'),
        ('--dataset digits --device cpu --ngpu 0', '--ngpu'),
        ('--dataset digits --device cpu --dtype half', '--dtype half'),
        # what excludes each other
        ('--dataset digits --sync_bn --compile', ['--sync_bn', '--compile']),
        ('--dataset digits --recompute --compile', ['--recompute', '--compile']),
        (
            '--dataset digits --bn_momentum cumulative --compile',
            ['--bn_momentum cumulative', '--compile'],
        ),
        ('--dataset digits --model resnet --recompute', ['--recompute', '--model resnet']),
        ('--dataset digits --model wrn --compile', ['--compile', '--model wrn']),
        ('--dataset digits --block bn-add', ['--block', '--model diracnet', 'resnet-dirac']),
    ],
)
def test_bad_options(arguments, words, refused, tmp_path):
    folder = tmp_path / 'run'
    refused(2, words, train.main, *shlex.split(arguments), '--save', folder)
    assert not folder.exists()


def test_own_options_of_models_are_declared():
    for model in MODELS:
        for name, default in own_options(model).items():
            assert model in OPTIONS[name].models and OPTIONS[name].default == default

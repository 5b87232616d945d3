"""Training the models of lab/models with train.py, and the options of their comparison."""

import json

import pytest
import torch
import torch.nn.functional as F

import train
from conftest import same, train_digits, without_times
from diracnet import Network
from lab.data import datasets
from lab.models.registry import VERSION_1, define
from lab.runs import checkpoint
from lab.training.optimizers import make_optimizer
from lab.training.options import build_parser, complete
from test import relative_error
from tools import export

SHORT = '--epochs 5 --epoch_step [4] --lr 0.1 --weight_decay 0.0005'


@pytest.mark.parametrize(
    'options',
    [
        '--model diracnet-v1 --depth 10',
        '--model plain --depth 10',
        '--model resnet --depth 14',
        '--model resnet-dirac --depth 14 --block bn-add',
        '--model wrn --depth 10 --width 2 --dropout 0.3',
    ],
)
def test_trains_resumes_and_evaluates(options, tmp_path, call):
    whole, cut = tmp_path / 'whole', tmp_path / 'cut'
    lines = train_digits(whole, f'{SHORT} {options}')
    assert lines[-1]['test_acc'] > 85

    train_digits(cut, f'{SHORT} {options} --epochs 2 --bn_momentum 0.1')
    train.main(['--resume', str(cut), '--epochs', '5'])
    assert same(whole, cut)
    assert without_times(whole)[-1] == without_times(cut)[-1]

    printed = call(train.main, '--evaluate', whole).out
    assert json.loads(printed.removeprefix('json_stats: '))['test_acc'] == lines[-1]['test_acc']


@pytest.mark.parametrize(
    'options, facts',
    [
        ('--model diracnet-v1 --depth 10', ('diracnet-v1', 10, 1)),
        ('--model plain-ncrelu --depth 10', ('plain-ncrelu', 10, 1)),
        ('--model plain --depth 10', ('plain', 10, 1)),
        ('--model resnet --depth 14', ('resnet', 14, 1)),
        ('--model resnet-dirac --depth 14 --block bn-add', ('resnet-dirac', 14, 1)),
        ('--model wrn --depth 10 --width 2 --dropout 0.3', ('wrn', 10, 2)),
    ],
)
def test_trained_tensors_alone_tell_the_network(options, facts, tmp_path):
    train_digits(tmp_path / 'run', f'{options} --epochs 1')
    found = checkpoint.load(tmp_path / 'run')
    torch.save(found.params, tmp_path / 'bare.pth')
    for network in (found.network, checkpoint.load(tmp_path / 'bare.pth').network):
        assert (network['model'], network['depth'], network['width']) == facts


@pytest.mark.parametrize('model', VERSION_1)
def test_version_1_checkpoint_folds(model, tmp_path, refused):
    lines = train_digits(tmp_path / 'run', f'{SHORT} --model {model} --depth 10 --epochs 3')
    assert lines[-1]['test_acc'] > 70
    found = checkpoint.load(tmp_path / 'run')
    torch.save(found.fold().state_dict(), tmp_path / 'folded.pth')
    inputs, _ = next(iter(datasets.load('digits', '.').batches(False, batch_size=100)))
    with torch.no_grad():
        expected = found.module()(inputs)
        for folded in (found.fold(), checkpoint.load(tmp_path / 'folded.pth').fold()):
            assert relative_error(folded(inputs), expected) <= 1e-5
    refused(1, ['int8', 'NCReLU'], export.main, tmp_path / 'run', tmp_path / 'net.int8.onnx')


def test_residual_networks_do_not_fold(tmp_path, refused):
    train_digits(tmp_path / 'run', f'{SHORT} --model wrn --depth 10 --epochs 1')
    words = ['--model wrn', 'diracnet, plain']
    refused(1, words, export.main, tmp_path / 'run', tmp_path / 'net.pth')


@pytest.mark.parametrize(
    'model, free',
    [
        ('diracnet-v1', set()),
        ('plain-ncrelu', set()),
        ('resnet', {'weight', 'bias'}),
        ('resnet-dirac', {'weight', 'bias', 'alpha', 'beta'}),
    ],
)
def test_which_parameters_have_weight_decay(model, free):
    """Version 1: all of them. Others: the tensors of more than one dimension."""
    module = Network(*define(model, 10 if model in VERSION_1 else 14, 1, 'digits'))
    options = {'model': model, 'lr': 0.1, 'weight_decay': 5e-4}
    names = {id(tensor): name for name, tensor in module.named_parameters()}
    decay = {}
    for group in make_optimizer(module, options).param_groups:
        for tensor in group['params']:
            decay[names[id(tensor)]] = group['weight_decay']
    assert set(decay) == set(names.values())
    without_decay = {name for name, value in decay.items() if value == 0}
    assert {name.split('.')[-1] for name in without_decay} == free
    if free:
        flat = {name for name, tensor in module.named_parameters() if tensor.ndim == 1}
        assert without_decay == flat


@pytest.mark.parametrize(
    'name, kind, settings',
    [
        ('sgd', 'SGD', {'momentum': 0.9, 'nesterov': False}),
        ('nesterov', 'SGD', {'momentum': 0.9, 'nesterov': True}),
        ('rmsprop', 'RMSprop', {'lr': 1e-2}),
        ('adadelta', 'Adadelta', {'rho': 0.3, 'lr': 1.0}),
        ('adagrad', 'Adagrad', {'lr': 1e-1}),
        ('adamw', 'AdamW', {'lr': 1e-3}),
    ],
)
def test_optimizers(name, kind, settings, tmp_path):
    options = f'--depth 10 --optim {name} --epochs 3 --epoch_step [3] --weight_decay 0.0001'
    assert train_digits(tmp_path / 'run', options)[-1]['test_acc'] > 60
    module = Network(*define('diracnet', 10, 1, 'digits'))
    optimizer = make_optimizer(module, complete({'dataset': 'digits', 'optim': name}))
    assert type(optimizer).__name__ == kind
    group = optimizer.param_groups[0]
    assert {key: group[key] for key in settings} == settings
    assert complete({'dataset': 'digits', 'optim': name, 'lr': 0.5})['lr'] == 0.5


def test_warm_up(tmp_path, monkeypatch):
    """23 steps per epoch; the rate falls in epoch 3."""
    rates, step = [], torch.optim.SGD.step

    def recording_step(self, *args, **kwargs):
        rates.append(self.param_groups[0]['lr'])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, 'step', recording_step)
    train_digits(tmp_path / 'run', '--depth 10 --epochs 3 --epoch_step [3] --warmup 30')
    assert rates == [pytest.approx(0.002)] * 30 + [0.2] * 16 + [pytest.approx(0.04)] * 23


def test_cumulative_batch_norm_is_the_mean_over_an_epoch(tmp_path):
    """With a learning rate of 0, the stem's running mean is the mean over the epoch's batches."""
    running_means = {}
    for momentum in ('cumulative', '1.0'):
        folder = tmp_path / momentum
        train_digits(folder, f'--depth 10 --epochs 2 --lr 0 --bn_momentum {momentum}')
        params = checkpoint.load(folder).params
        running_means[momentum] = params['bn.running_mean']
    batches = datasets.load('digits', '.').batches(True, batch_size=64, seed=1)
    batches.epoch = 2
    means = [F.conv2d(inputs, params['conv'], padding=1).mean((0, 2, 3)) for inputs, _ in batches]
    mean = torch.stack(means).mean(0)
    torch.testing.assert_close(running_means['cumulative'], mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(running_means['1.0'], means[-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    'options, words',
    [
        ('--block bn-add', ['--block', 'resnet']),
        ('--model resnet --dropout 0.3', ['--dropout', 'wrn']),
        ('--model resnet --depth 16', ['16', '6n + 2']),
        ('--model wrn --recompute', ['--recompute']),
        ('--model wrn --dropout 1.5', ['1.5']),
        ('--bn_momentum 0', ['--bn_momentum']),
        ('--init zeros', ['zeros']),
    ],
)
def test_impossible_options(options, words, refused, tmp_path):
    arguments = ['--dataset', 'digits', *options.split(), '--save', tmp_path / 'run']
    refused(2, words, train.main, *arguments)


def test_default_depths():
    parsed = vars(build_parser(None).parse_args(['--model', 'wrn', '--dataset', 'ImageNet']))
    given = {name: value for name, value in parsed.items() if value is not None}
    assert complete(given)['depth'] == 50
    assert complete({'model': 'resnet', 'dataset': 'CIFAR10'})['depth'] == 20

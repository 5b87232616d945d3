"""--pretrained, --freeze and --per_class."""

import pytest
import torch

import train
from conftest import python, read_log, same
from diracnet import Network, fold
from lab.data import datasets
from lab.models import registry
from lab.runs import checkpoint
from lab.runs.pretrained import PUBLISHED, start_from
from test import randomized, relative_error

DIGITS = ('--dataset', 'digits', '--device', 'cpu')


def tune(call, network, save, *options):
    """The checkpoint of a fine-tuning."""
    result = call(train.main, *DIGITS, '--pretrained', network, '--save', save, *options)
    assert result.status == 0, result
    return checkpoint.load(save)


@pytest.fixture(scope='module')
def folded_file(digits_run, tmp_path_factory):
    path = tmp_path_factory.mktemp('folded') / 'folded.pth'
    torch.save(fold(checkpoint.load(digits_run).params), path)
    return path


@pytest.mark.parametrize('kind', ['run', 'folded'])
def test_starts_from_the_network(kind, digits_run, folded_file, tmp_path, call):
    """One step without learning: the run has the accuracy of the network that it started from."""
    network = digits_run if kind == 'run' else folded_file
    found = tune(call, network, tmp_path / 'run', '--epochs', 1, '--lr', 0, '--batch_size', 1437)
    assert found.epoch == 1 and found.network['depth'] == 16
    [stats] = read_log(tmp_path / 'run')
    assert stats['train_acc'] > 99 and stats['epoch'] == 1
    if kind == 'run':
        for key, tensor in checkpoint.load(digits_run).params.items():
            assert 'running' in key or torch.equal(found.params[key], tensor), key


@pytest.mark.parametrize('model', registry.CHAINS)
def test_a_folded_network_computes_the_same(model):
    torch.manual_seed(0)
    _, params = registry.define(model, 22, 0.5, 'digits')
    randomized(params)
    folded = fold(params)
    found = checkpoint.Checkpoint('folded', folded, True, {'num_classes': 10})
    data = datasets.load('digits', '.')
    net = Network(*registry.define(model, 22, 0.5, 'digits')).eval()
    start_from(net, found, data.classes, data.batches(True, batch_size=64))
    old = registry.folded_module(model, folded)
    [(inputs, _)] = data.batches(False, batch_size=360)
    with torch.no_grad():
        assert relative_error(net(inputs), old(inputs)) < 1e-3
    for key, tensor in net.state_dict().items():  # statistics of the data
        assert not key.endswith('running_var') or not torch.allclose(tensor, torch.ones(()))


def test_a_new_classifier_for_other_classes(digits_run, tmp_path):
    content = torch.load(digits_run / 'model.pt7', weights_only=True)
    bare = tmp_path / 'bare.pth'
    for names, kept in ((list('0123456789'), True), (list('abcdefghij'), False)):
        torch.save({'params': content['params'], 'classes': names}, bare)
        found = checkpoint.load(bare)
        net = Network(*registry.define('diracnet', 16, 1, 'digits'))
        start_from(net, found, list('0123456789'), None)
        assert torch.equal(net.state_dict()['fc.weight'], content['params']['fc.weight']) is kept
        assert torch.equal(net.state_dict()['conv'], content['params']['conv'])
    net = Network(*registry.define('diracnet', 16, 1, 'digits', num_classes=3))
    start_from(net, found, ['a', 'b', 'c'], None)
    assert torch.equal(net.state_dict()['conv'], content['params']['conv'])


@pytest.mark.parametrize('options', [(), ('--recompute',), ('--ema', '0.9', '--recalibrate_bn')])
def test_frozen_parts_stay(options, digits_run, tmp_path, call):
    old = checkpoint.load(digits_run).params
    flags = ('--freeze', 'group1', '--epochs', 1, '--per_class', 20, *options)
    found = tune(call, digits_run, tmp_path / 'run', *flags)
    for key, tensor in found.params.items():
        trained = key.startswith(('group2', 'fc.'))
        assert torch.equal(tensor, old[key]) is not trained, key
    table = (tmp_path / 'run' / 'parameters.txt').read_text()
    assert 'group2' in table and 'group1' not in table


def test_resume_to_the_bit(digits_run, tmp_path, call, stop_at):
    flags = ('--epochs', 2, '--freeze', 'stem', '--per_class', 50)
    tune(call, digits_run, tmp_path / 'whole', *flags)
    stop_at(11)
    command = (*DIGITS, '--pretrained', digits_run, '--save', tmp_path / 'run', *flags)
    assert call(train.main, *command).status == 143
    assert call(train.main, '--resume', tmp_path / 'run').status == 0
    assert checkpoint.load(tmp_path / 'run').epoch == 2
    assert same(tmp_path / 'run', tmp_path / 'whole')


def test_per_class():
    data = datasets.load('digits', '.').holdout(957)
    images, targets = data.per_class(7).train
    assert targets.bincount().tolist() == [7] * 10
    for c in range(10):
        expected = data.train[0][data.train[1] == c][:7]
        assert torch.equal(images[targets == c], expected)


def test_published_networks_come_from_the_cache(tmp_path, monkeypatch, call, refused):
    folder = tmp_path / 'hub' / 'checkpoints'
    folder.mkdir(parents=True)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    _, params = registry.define('diracnet', 18, 1, 'ImageNet')
    name = PUBLISHED['diracnet18'].rsplit('/', 1)[1]
    torch.save({'params': {key: tensor.detach() for key, tensor in params.items()}}, folder / name)
    arguments = ('--dataset', 'folder', '--dataroot', tmp_path / 'none', '--pretrained')
    refused(1, ['none'], train.main, *arguments, 'diracnet18')  # the network was read, data is not

    def fail(*args, **kwargs):
        raise OSError('no route')

    monkeypatch.setattr(torch.hub, 'download_url_to_file', fail)
    refused(1, ['diracnet34-v2_checkpoint.pth', 'no route'], train.main, *arguments, 'diracnet34')


def test_version_1_folded_is_refused(tmp_path, refused):
    _, params = registry.define('diracnet-v1', 10, 1, 'digits')
    torch.save(registry.fold('diracnet-v1', params), tmp_path / 'v1.pth')
    refused(2, ['version 1'], train.main, *DIGITS, '--pretrained', tmp_path / 'v1.pth')


@pytest.mark.parametrize(
    'options, words',
    [
        (('--dataset', 'CIFAR10'), ['1 channel', 'CIFAR10', '3']),
        (('--dataset', 'folder'), ['cifar', '--form']),
        (('--depth', '34'), ['--depth', '34', '16']),
        (('--model', 'resnet'), ['--model', 'resnet', 'diracnet']),
        (('--freeze', 'group3'), ['group3', 'group2']),
        (('--freeze', 'layer1'), ['layer1', 'group2']),
        (('--freeze', 'head'), ['head']),
        (('--per_class', '1000'), ['--per_class', '1000']),
    ],
)
def test_what_does_not_fit(options, words, digits_run, refused, tmp_path):
    arguments = ('--pretrained', digits_run, '--save', tmp_path / 'run', *options)
    if '--dataset' not in options:
        arguments += DIGITS
    refused(2, words, train.main, *arguments)
    assert not (tmp_path / 'run').exists()


def test_missing_file(refused, tmp_path):
    refused(1, 'none.pth', train.main, *DIGITS, '--pretrained', tmp_path / 'none.pth')


def test_two_processes(folded_file, tmp_path):
    """Both start from the batch norms that the first process measured."""
    result = python(
        *('train.py', *DIGITS, '--pretrained', folded_file, '--ngpu', 2, '--epochs', 1),
        *('--lr', 0, '--save', tmp_path / 'run'),
    )
    assert result.status == 0, result.err
    [line] = read_log(tmp_path / 'run')
    assert line['train_acc'] > 99

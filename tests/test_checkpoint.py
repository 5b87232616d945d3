"""lab/runs/checkpoint.py: every kind of file that loads."""

import json
from collections import OrderedDict

import cv2
import pytest
import torch
from torch import nn

import train
from conftest import read_log
from diracnet import Network, define_diracnet, fold
from lab.runs import checkpoint
from tools import predict


def saved(content, path, old=True):
    """The path of a file as torch.save writes it, or as it did in early 2018: not a zip archive."""
    torch.save(content, path, _use_new_zipfile_serialization=not old)
    assert (path.read_bytes()[:2] == b'PK') != old
    return path


def identities(params):
    """What the original stored next to the parameters: an identity per shape of convolution."""
    stored = {}
    for key, tensor in params.items():
        if key.endswith('.conv'):
            name = 'eye' + '_'.join(map(str, tensor.shape))
            stored[name] = nn.init.dirac_(torch.empty_like(tensor))
    return stored


def published(params):
    """The layout of the original's published checkpoints: running statistics apart."""
    statistics = {key: tensor for key, tensor in params.items() if 'running' in key}
    others = {key: tensor for key, tensor in params.items() if key not in statistics}
    return {
        'params': OrderedDict(others),
        'stats': OrderedDict({**statistics, **identities(params)}),
    }


OPTIMIZER = {'state': {}, 'param_groups': [{'lr': 0.1, 'momentum': 0.9, 'params': [140033]}]}


@pytest.fixture
def layouts(digits_run, tmp_path):
    """The network of digits_run in every layout, as a zip archive and in the old format: name to
    path."""
    params = torch.load(digits_run / 'model.pt7', weights_only=True)['params']
    contents = {
        'published': published(params),
        'later': {'params': {**params, **identities(params)}, 'epoch': 3, 'optimizer': OPTIMIZER},
        'flat': params,
        'module': OrderedDict(Network(*define_diracnet(16, 1, 'digits')).state_dict() | params),
        'folded': OrderedDict(fold(params)),
    }
    paths = {'run': digits_run}
    for name, content in contents.items():
        for label, old in ((name, False), (f'{name}-old', True)):
            (tmp_path / label).mkdir()
            paths[label] = saved(content, tmp_path / label / 'model.pt7', old)
    return paths


def test_every_layout_evaluates_folds_and_predicts(
    layouts, digits_run, tmp_path, call, photographs
):
    expected = read_log(digits_run)[-1]
    image = tmp_path / 'image.png'
    cv2.imwrite(str(image), photographs[0])
    answers = set()
    for name, path in layouts.items():
        result = call(train.main, '--evaluate', path, '--dataset', 'digits')
        assert result.status == 0, (name, result.err)
        stats = json.loads(result.out.removeprefix('json_stats: '))
        assert stats['test_acc'] == expected['test_acc'] and stats['n'] == 360, name
        result = call(predict.main, path, image, '--dataset', 'digits', '--top', 1)
        assert result.status == 0, (name, result.err)
        answers.add(result.out)
        loaded = checkpoint.load(path)
        assert loaded.fold().architecture.depth == 16 and loaded.network['depth'] == 16
    assert len(answers) == 1


def test_training_starts_from_other_files(layouts, tmp_path, call, refused):
    options, folder = '--dataset digits --epochs 5 --epoch_step [4] --lr 0.01', tmp_path / 'run'
    resume = ('--resume', layouts['later-old'], '--save', folder)
    result = call(train.main, *resume, *options.split())
    assert result.status == 0 and str(layouts['later-old']) in result.out
    assert 'new optimizer' in result.out
    log = read_log(folder)
    assert [line['epoch'] for line in log] == [4, 5]
    assert log[0]['train_acc'] > 95  # it had learned before

    options, folder = '--dataset digits --epochs 1 --lr 0.01', tmp_path / 'tuned'
    resume = ('--resume', layouts['published'], '--save', folder)
    result = call(train.main, *resume, *options.split())
    assert result.status == 0
    assert [line['train_acc'] > 95 for line in read_log(folder)] == [True]

    digits = ('--dataset', 'digits')
    refused(1, 'folded', train.main, '--resume', layouts['folded'])
    words = [layouts['later'], '3 epochs']
    refused(2, words, train.main, '--resume', layouts['later'], *digits, '--epochs', 3)


def test_published_imagenet_layout(tmp_path):
    """A whole unfolded DiracNet-18 as published in 2018, and its folded file."""
    f, params = define_diracnet(18, 0.25, 'ImageNet')
    params = {key: tensor.detach() for key, tensor in params.items()}
    path = saved(published(params), tmp_path / 'diracnet18-v2_checkpoint.pth')
    loaded = checkpoint.load(path)
    assert loaded.network == {
        'model': 'diracnet',
        'depth': 18,
        'width': 0.25,
        'dataset': 'ImageNet',
        'num_classes': 1000,
        'in_channels': 3,
        'form': 'imagenet',
    }
    x = torch.randn(2, 3, 64, 64)
    expected = f(x, params, False)
    assert torch.equal(loaded.module()(x), expected)
    torch.testing.assert_close(loaded.fold()(x), expected, rtol=1e-4, atol=1e-5)
    folded = checkpoint.load(saved(fold(params), tmp_path / 'diracnet18v2folded-00000000.pth'))
    assert folded.folded and torch.equal(folded.fold()(x), loaded.fold()(x))


@pytest.mark.parametrize(
    'option, value',
    [('--depth', 16), ('--width', 2), ('--model', 'plain'), ('--dataset', 'CIFAR10')],
)
@pytest.mark.parametrize('use', ['--resume', '--evaluate'])
def test_options_of_another_network(use, option, value, short_run, refused):
    """The line has the flags that fit."""
    fits = '--model diracnet --depth 10 --width 1 --dataset digits'
    refused(2, [option, value, fits], train.main, use, short_run, option, value)

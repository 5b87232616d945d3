"""lab/runs/checkpoint.py: every kind of file that loads."""

import json
from collections import OrderedDict

import cv2
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel

import train
from conftest import read_log
from diracnet import DiracNet, Network, define_diracnet, fold
from lab.data import datasets
from lab.errors import UserError
from lab.folded import load_folded
from lab.runs import checkpoint
from tools import export, predict


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
        'wrapped': {'net': {f'module.{key}': params[key] for key in params}, 'acc': 97.5},
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
        'widen_early': False,
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


# --- state dicts as people save them ---------------------------------------------------------


class Task(nn.Module):
    """A network within another module, as in Lightning."""

    def __init__(self, net):
        super().__init__()
        self.model = net


def zeros(net):
    return {key: torch.zeros_like(tensor) for key, tensor in net.state_dict().items()}


WRAPPED = {
    'DataParallel': lambda net: nn.DataParallel(net).state_dict(),
    'compile': lambda net: torch.compile(net).state_dict(),
    'both': lambda net: nn.DataParallel(torch.compile(net)).state_dict(),
    'AveragedModel': lambda net: AveragedModel(net).state_dict(),
    'net': lambda net: {'net': net.state_dict(), 'epoch': 3, 'optimizer': OPTIMIZER},
    'model': lambda net: {'model': net.state_dict(), 'loss': torch.tensor(0.1)},
    'model_state_dict': lambda net: {'model_state_dict': net.state_dict(), 'acc': 97.5},
    'nested': lambda net: {'model': {'state_dict': net.state_dict()}},
    'Lightning': lambda net: {'state_dict': Task(net).state_dict(), 'loops': {}},
    'a name': lambda net: {'state_dict': net.state_dict(), 'model': 'diracnet', 'net': {}},
    'averages alone': lambda net: {'model_ema': AveragedModel(net).state_dict()},
    'averages beside': lambda net: {'state_dict': net.state_dict(), 'state_dict_ema': zeros(net)},
    'parameters': lambda net: dict(net.named_parameters()) | dict(net.named_buffers()),
}


@pytest.mark.parametrize('folded', [False, True])
@pytest.mark.parametrize('kind', WRAPPED)
def test_a_wrapped_network_is_unwrapped(kind, folded, tmp_path):
    net = DiracNet(10, 0.5, 'digits') if folded else Network(*define_diracnet(10, 0.5, 'digits'))
    expected = net.state_dict()  # DataParallel may move the network to a GPU
    torch.save(WRAPPED[kind](net), tmp_path / 'net.pth')
    loaded = checkpoint.load(tmp_path / 'net.pth')
    assert loaded.folded is folded and loaded.params.keys() == expected.keys()
    assert all(torch.equal(loaded.params[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_weights_beside_floats_become_floats(dtype, tmp_path):
    _, params = define_diracnet(10, 0.5, 'digits')
    short = {
        key: t.detach() if 'running' in key else t.detach().to(dtype) for key, t in params.items()
    }
    torch.save(short, tmp_path / 'half.pth')
    loaded = checkpoint.load(tmp_path / 'half.pth')
    assert loaded.dtype is torch.float32
    assert all(torch.equal(loaded.params[key], tensor.float()) for key, tensor in short.items())


def test_safetensors(digits_run, tmp_path, refused):
    """The network of a run, and what is refused as in other files."""
    safetensors = pytest.importorskip('safetensors.torch')
    run, path = checkpoint.load(digits_run), tmp_path / 'net.safetensors'
    safetensors.save_file({f'module.{key}': run.params[key] for key in run.params}, path)
    loaded = checkpoint.load(path)
    assert loaded.params.keys() == run.params.keys() and loaded.network['depth'] == 16
    assert all(torch.equal(tensor, run.params[key]) for key, tensor in loaded.params.items())
    path.write_bytes(path.read_bytes()[:-1])
    refused(1, path, train.main, '--evaluate', path)
    safetensors.save_file({**run.params, 'fc.bias': torch.full((10,), torch.nan)}, path)
    refused(1, [path, 'fc.bias'], train.main, '--evaluate', path)


# --- state dicts of one's own images ---------------------------------------------------------


@pytest.mark.parametrize('n_classes', [2, 3, 10])
@pytest.mark.parametrize('form, depth', [('cifar', 10), ('imagenet', 18)])
def test_a_bare_state_dict_fits_a_folder(
    form, depth, n_classes, image_folder, tmp_path, call, refused
):
    """The folder has two classes."""
    f, params = define_diracnet(depth, 0.125, 'folder', num_classes=n_classes, form=form)
    path = tmp_path / 'own.pth'
    torch.save({key: tensor.detach() for key, tensor in params.items()}, path)
    folder = ('--dataset', 'folder', '--dataroot', image_folder)
    evaluate = (train.main, '--evaluate', path, '--image_size', 64, '--device', 'cpu', *folder)
    if n_classes != 2:
        refused(1, [path, f'{n_classes} instead of 2'], *evaluate)
        with pytest.raises(UserError, match='own.pth'):
            load_folded(checkpoint.load(path), 'folder', image_folder)
        return
    data = datasets.load('folder', image_folder, form=form, image_size=64)
    [(inputs, targets)] = data.batches(False, batch_size=6)
    loss = F.cross_entropy(f(inputs, params, False), targets).item()
    result = call(*evaluate)
    assert result.status == 0, result.err
    assert json.loads(result.out.removeprefix('json_stats: '))['test_loss'] == pytest.approx(loss)
    network = load_folded(checkpoint.load(path), 'folder', image_folder)
    assert network.preprocessing == datasets.load('folder', image_folder, form=form).preprocessing
    predicts = (predict.main, path, image_folder / 'val', '--dataset', 'folder')
    if form == 'cifar':  # the mean and std of its training images are not in the file
        refused(1, path, *predicts)
    else:
        assert call(*predicts).status == 0


def test_another_data_set_has_other_classes(tmp_path, refused):
    path = tmp_path / 'own.pth'
    torch.save(DiracNet(10, 0.5, 'CIFAR10', num_classes=3).state_dict(), path)
    fits = '--dataset folder --form cifar fits'
    for options, n in (((), 10), (('--dataset', 'CIFAR100'), 100)):
        refused(2, [path, '3 classes', str(n), fits], train.main, '--evaluate', path, *options)
    refused(2, [path, fits], train.main, '--evaluate', path, '--dataset', 'digits')
    for main, argument in ((predict.main, tmp_path), (export.main, tmp_path / 'out.pth')):
        refused(1, [path, '3 classes'], main, path, argument, '--dataset', 'CIFAR10')


def test_a_data_set_that_is_guessed_is_named(digits_run, tmp_path, call):
    path = tmp_path / 'bare.pth'
    torch.save(checkpoint.load(digits_run).params, path)
    for options, lines in (((), 1), (('--dataset', 'digits'), 0)):
        result = call(train.main, '--evaluate', path, *options)
        assert result.status == 0 and len(result.err.splitlines()) == lines
        assert lines == 0 or 'digits, FashionMNIST' in result.err


@pytest.mark.parametrize('dtype', [torch.half, torch.bfloat16])
def test_half_networks_are_folded_as_floats(dtype, digits_run, tmp_path, call):
    params = checkpoint.load(digits_run).params
    path, out = tmp_path / 'half.pth', tmp_path / 'out.pth'
    torch.save({key: tensor.to(dtype) for key, tensor in params.items()}, path)
    assert call(export.main, path, out, '--dataset', 'digits').status == 0
    rounded = {key: tensor.to(dtype).float() for key, tensor in params.items()}
    expected = fold(rounded)
    folded = torch.load(out, weights_only=True)['state_dict']
    assert all(torch.equal(folded[key], expected[key]) for key in expected)

"""Checkpoints that are broken, foreign or hostile: each is refused in one line that names it."""

from hypothesis_profiles import places  # noqa: I001
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import DataParallel
from torchvision.models import resnet18

import train
from diracnet import fold
from lab.errors import UserError
from lab.models.registry import define
from lab.runs import checkpoint
from tools import export, predict

# Torch warns about rare kinds of tensors and files when they are made here.
pytestmark = pytest.mark.filterwarnings('ignore::UserWarning', 'ignore::FutureWarning')
FIXTURES = Path(__file__).parent / 'fixtures'
BLOCK = 'group1.block0'


def run():
    return torch.load(FIXTURES / 'diracnet-10-interrupted' / 'model.pt7', weights_only=True)


def bare():
    return run()['params']


def folded():
    return dict(fold(bare()))


def without(content, key):
    return {name: value for name, value in content.items() if name != key}


def changed(key, change, kind=run):
    """A run, or bare or folded tensors, with another tensor."""
    content = kind()
    params = content.get('params', content)
    params[key] = change(params[key])
    return content


def within(name, **changes):
    """A run with other values in one of its dicts."""
    content = run()
    return {**content, name: {**content[name], **changes}}


def filled(value):
    """Put a number in the first place of a tensor."""
    return lambda tensor: tensor.index_fill(0, torch.tensor([0]), value)


def exported(**changes):
    content = run()
    names = ('network', 'classes', 'preprocessing')
    return {'state_dict': folded(), **{name: content[name] for name in names}, **changes}


def resnet():
    return resnet18(num_classes=10)


# Name of the file; its content; a word that the line must have.
CONTENTS = [
    # Tensors that are missing, or too many.
    ('run-no-alpha', lambda: {**run(), 'params': without(bare(), f'{BLOCK}.alpha')}, BLOCK),
    ('no-alpha', lambda: without(bare(), f'{BLOCK}.alpha'), BLOCK),
    ('no-conv', lambda: without(bare(), 'group0.block1.conv'), 'group0.block1.conv'),
    ('no-bias', lambda: without(bare(), 'fc.bias'), 'fc.bias'),
    ('no-variance', lambda: without(bare(), 'bn.running_var'), 'bn.running_var'),
    ('extra', lambda: {**bare(), 'extra': torch.zeros(3)}, 'extra'),
    ('none', lambda: {'params': {}}, ''),
    ('no-ema', lambda: {**run(), 'ema': without(bare(), 'fc.bias')}, 'fc.bias'),
    # Tensors of other types and shapes.
    ('int', lambda: changed(f'{BLOCK}.alpha', torch.Tensor.long), BLOCK),
    ('complex', lambda: changed('conv', lambda t: t.to(torch.complex64)), 'complex64'),
    ('sparse', lambda: changed('fc.weight', torch.Tensor.to_sparse), ''),
    ('text', lambda: changed('conv', str), 'conv'),
    ('double', lambda: changed('fc.bias', torch.Tensor.double), 'float64'),
    ('3d', lambda: changed('fc.weight', lambda t: t[..., None]), 'fc.weight'),
    ('huge', lambda: changed('conv', lambda t: t[:1].expand(10**9, 1, 3, 3)), 'repeats'),
    # Numbers that cannot be.
    ('nan', lambda: changed(f'{BLOCK}.bn.bias', filled(np.nan)), f'{BLOCK}.bn.bias'),
    ('inf', lambda: changed('bn.running_mean', filled(np.inf)), 'bn.running_mean'),
    ('variance', lambda: changed('bn.running_var', filled(-0.1)), 'bn.running_var'),
    ('folded-nan', lambda: changed('fc.bias', filled(np.nan), folded), 'fc.bias'),
    ('ema-nan', lambda: {**run(), 'ema': changed('conv', filled(np.nan), bare)}, 'conv'),
    # Other networks, or several.
    ('other', lambda: resnet().state_dict(), 'conv1.weight'),
    ('other-wrapped', lambda: {'model': DataParallel(resnet()).state_dict()}, 'conv1.weight'),
    ('two', lambda: {'net': bare(), 'model': bare()}, 'more than one'),
    # What is no dict of tensors.
    ('empty', dict, 'no tensors'),
    ('optimizer', lambda: run()['optimizer'], 'no tensors'),
    ('list', lambda: [1, 2], 'list'),
    ('tensor', lambda: torch.zeros(3), 'Tensor'),
    ('params', lambda: {'params': 'no tensor'}, ''),
    ('code', lambda: {'params': bare(), 'model': torch.nn.Linear(2, 2)}, 'run code'),
    # What it says of its network, and what goes in and out.
    ('deep', lambda: within('network', depth=60004), '60004'),
    ('wide', lambda: within('network', width=1e9), 'large'),
    ('plain', lambda: within('network', model='plain'), 'alpha'),
    ('unknown', lambda: within('network', model='mine'), 'its model is mine'),
    ('option', lambda: within('network', slope=0.1), 'the option slope'),
    ('no-dataset', lambda: exported(network=without(run()['network'], 'dataset')), 'no dataset'),
    ('imagenet', lambda: within('network', dataset='ImageNet'), 'ImageNet'),
    ('11-classes', lambda: within('network', num_classes=11), '11'),
    ('export', lambda: exported(network={**run()['network'], 'depth': 16}), 'group0'),
    ('export-names', lambda: exported(classes=list(range(10))), 'classes'),
    ('export-index', lambda: exported(classes={str(i): i for i in range(10)}), 'classes'),
    ('rgb', lambda: within('preprocessing', channels=3), 'preprocessing'),
    ('size', lambda: within('preprocessing', size=3), 'size'),
    ('epoch', lambda: {**run(), 'epoch': 'four'}, 'four'),
]  # fmt: skip


@pytest.mark.parametrize('name, content, word', CONTENTS, ids=[row[0] for row in CONTENTS])
def test_contents(name, content, word, tmp_path, refused):
    path = tmp_path / f'{name}.pth'
    torch.save(content(), path)
    refused(1, [path, word], train.main, '--evaluate', path, '--dataset', 'digits')


# Of a run: what is noticed when it resumes.
RESUMED = {
    'state': lambda: {**run(), 'optimizer': {'state': 3}},
    'no state': lambda: {**run(), 'optimizer': {'groups': []}},
    'progress': lambda: {**run(), 'progress': {'step': 2}},
    'tally': lambda: within('progress', tally={'n': 3}),
    'ema': lambda: within('options', ema=0.9),
    'width': lambda: within('options', width='wide'),
}


@pytest.mark.parametrize('name', RESUMED)
def test_what_is_used_to_resume(name, tmp_path, refused):
    path, folder = tmp_path / 'run.pth', tmp_path / 'run'
    torch.save(RESUMED[name](), path)
    refused(1, path, train.main, '--resume', path, '--save', folder, '--device', 'cpu')
    assert not folder.exists()


VALUES = st.sampled_from([None, -1, 10**400, math.nan, 'a', [], {}, torch.zeros(3), [1, 'a'], True])


@given(st.data())
def test_any_other_value_is_refused_or_leaves_the_network_as_it_was(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / 'changed.pt7'
    kind = data.draw(st.sampled_from([run, bare, folded, exported]))
    content, sound = kind(), kind()
    *way, last = data.draw(st.sampled_from([place for place in places(content) if place]))
    parent = content
    for key in way:
        parent = parent[key]
    parent[last] = data.draw(VALUES)
    torch.save(content, path)
    try:
        loaded = checkpoint.load(path)
    except UserError as error:
        assert str(path) in str(error)
        return
    params = sound.get('params', sound.get('state_dict', sound))
    assert loaded.params.keys() == params.keys()
    assert all(torch.equal(tensor, params[key]) for key, tensor in loaded.params.items())
    assert loaded.module().training is False


# --- files that are no checkpoints -----------------------------------------------------------


def make_program(path):
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))
    torch.export.save(program, path)


# Name of the file; what makes it; a word that the line must have.
FILES = [
    ('pipe', os.mkfifo, 'regular'),
    ('zero', lambda path: path.symlink_to('/dev/zero'), 'regular'),
    ('folder', Path.mkdir, 'model.pt7'),
    ('run', lambda path: (path / 'model.pt7').mkdir(parents=True), 'regular'),
    ('loop', lambda path: path.symlink_to(path), 'loop'),
    ('net.pt2', make_program, ''),
]


@pytest.mark.parametrize('name, make, word', FILES, ids=[row[0] for row in FILES])
def test_files(name, make, word, tmp_path, refused, deadline):
    path = tmp_path / name
    make(path)
    refused(1, [name, word], train.main, '--evaluate', path)
    refused(1, [name, word], predict.main, path, __file__)


def test_a_name_that_is_too_long(tmp_path, refused):
    refused(2, ['nnn', 'long'], predict.main, tmp_path / ('n' * 300), __file__)


def test_a_pipe_gives_way_to_the_previous_checkpoint(tmp_path, call, deadline):
    os.mkfifo(tmp_path / 'model.pt7')
    torch.save(run(), tmp_path / 'previous.pt7')
    result = call(train.main, '--evaluate', tmp_path)
    assert result.status == 0 and 'regular' in result.err and 'previous.pt7' in result.err


# --- sound files that do not fit, or whose numbers overflow later ------------------------------


def test_a_resnet_does_not_become_a_chain(tmp_path, refused):
    params = {
        key: tensor.detach() for key, tensor in define('resnet', 8, 0.25, 'digits')[1].items()
    }
    path = tmp_path / 'resnet.pt7'
    torch.save({**run(), 'params': params}, path)
    refused(1, path, train.main, '--evaluate', path)


def test_a_fold_that_overflows_its_type(tmp_path, refused):
    params = bare()
    params['bn.weight'] = torch.full_like(params['bn.weight'], 1e38)
    params['bn.running_var'] = torch.zeros_like(params['bn.running_var'])  # which is allowed
    path = tmp_path / 'large.pth'
    torch.save(params, path)
    words = [path, 'features.conv.weight', 'float32']
    refused(1, words, export.main, path, tmp_path / 'out.pth', '--dataset', 'digits')


def test_logits_that_overflow(tmp_path, call):
    path = tmp_path / 'large.pth'
    torch.save({**bare(), 'fc.weight': torch.full((10, 16), 3e38)}, path)
    result = call(export.main, path, tmp_path / 'out.pth', '--dataset', 'digits')
    assert result.status == 1 and 'finite' in result.err.splitlines()[-1], result
    assert not (tmp_path / 'out.pth').exists()


def test_small_images_of_another_size(tmp_path, refused):
    path = tmp_path / 'large.pt7'
    torch.save(within('preprocessing', image_size=16, resize=16), path)
    refused(1, [path, '16', '8'], train.main, '--evaluate', path)


@pytest.mark.parametrize('value', [-1.0, math.nan])
def test_folding_an_impossible_variance(value):
    params = bare()
    params[f'{BLOCK}.bn.running_var'][0] = value
    with pytest.raises(ValueError, match=f'{BLOCK}.bn.running_var'):
        fold(params)

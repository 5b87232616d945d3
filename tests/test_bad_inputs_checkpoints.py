"""Checkpoints that are broken or hostile: every program refuses them, each in one line."""

import math
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from diracnet import fold
from lab.models.registry import define
from tools import export, predict

# Torch warns about rare kinds of tensors and files when they are made here.
pytestmark = pytest.mark.filterwarnings('ignore::UserWarning', 'ignore::FutureWarning')
FIXTURES = Path(__file__).parent / 'fixtures'
BLOCK = 'group1.block0'


# --- contents of files -----------------------------------------------------------------------


def run():
    return torch.load(FIXTURES / 'diracnet-10-interrupted' / 'model.pt7', weights_only=True)


def resnet_run():
    return torch.load(FIXTURES / 'resnet-8' / 'model.pt7', weights_only=True)


def bare():
    return run()['params']


def folded():
    return dict(fold(bare()))


def without(content, *keys):
    return {key: value for key, value in content.items() if key not in keys}


def with_params(**changes):
    """The run with other tensors; the names have _ for the dots."""
    content = run()
    for key in content['params']:
        if key.replace('.', '_') in changes:
            content['params'][key] = changes[key.replace('.', '_')](content['params'][key])
    return content


def with_all(change):
    content = run()
    return {**content, 'params': {key: change(tensor) for key, tensor in content['params'].items()}}


def within(name, make=run, **changes):
    """A run with other values in one of its dicts."""
    content = make()
    content[name] = {**content[name], **changes}
    return content


def with_state(change):
    content = run()
    content['optimizer']['state'][0] = change(content['optimizer']['state'][0])
    return content


def with_tally(**changes):
    content = run()
    content['progress']['tally'].update(changes)
    return content


def filled(value):
    """Put a number in the first place of a tensor."""
    return lambda tensor: tensor.index_fill(0, torch.tensor([0]), value)


def quantized(tensor):
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


def of_another_model(model, key):
    """A tensor of a block of another model, among those of the run."""
    content = run()
    content['params'][key] = define(model, 10, 0.25, 'digits')[1][key].detach()
    return content


DIGIT = list('0123456789')
PIXEL = run()['preprocessing']
LOG = run()['log']

# Name of the file; its content; the words that the line must have.
CONTENTS = [
    # Tensors that are missing, or too many.
    ('no-alpha', lambda: {**run(), 'params': without(bare(), f'{BLOCK}.alpha')}, [BLOCK, 'alpha']),
    ('bare-no-alpha', lambda: without(bare(), f'{BLOCK}.alpha'), [BLOCK, 'alpha']),
    ('first-no-alpha', lambda: without(bare(), 'group0.block0.alpha'), ['group0.block0.alpha']),
    ('bare-no-beta', lambda: without(bare(), f'{BLOCK}.beta'), [BLOCK, 'beta']),
    ('no-bias', lambda: without(bare(), 'fc.bias'), ['fc.bias']),
    ('folded-no-bias', lambda: without(folded(), 'fc.bias'), ['fc.bias']),
    ('folded-no-stem', lambda: without(folded(), 'features.conv.weight'), ['features.conv.weight']),
    ('no-variance', lambda: without(bare(), 'bn.running_var'), ['bn.running_var']),
    ('no-conv', lambda: without(bare(), 'group0.block1.conv'), ['group0.block1.conv']),
    ('no-fc', lambda: without(bare(), 'fc.weight'), ['fc.weight']),
    ('two-kinds', lambda: without(bare(), f'{BLOCK}.alpha', f'{BLOCK}.beta'), [f'{BLOCK}.alpha']),
    ('alphas-alone', lambda: {k: t for k, t in bare().items() if 'beta' not in k}, ['beta']),
    ('extra', lambda: {**bare(), 'extra': torch.zeros(3)}, ['extra']),
    ('extra-folded', lambda: {**folded(), 'extra': torch.zeros(3)}, ['extra']),
    ('1x1', lambda: of_another_model('repvgg', f'{BLOCK}.conv1x1'), ['conv1x1']),
    ('resnet-with-alpha', lambda: {**resnet_run(), 'params': {
        **resnet_run()['params'], 'layer1.0.conv1.alpha': torch.ones(4)}}, ['alpha']),
    # Tensors of other types.
    ('int64', lambda: with_params(group1_block0_alpha=torch.Tensor.long), [BLOCK, 'int64']),
    ('int32', lambda: with_all(torch.Tensor.int), ['conv', 'int32']),
    ('complex', lambda: with_params(conv=lambda t: t.to(torch.complex64)), ['conv', 'complex64']),
    ('bool', lambda: with_params(fc_bias=torch.Tensor.bool), ['fc.bias', 'bool']),
    ('fp8', lambda: with_params(conv=lambda t: t.to(torch.float8_e4m3fn)), ['conv', 'float8']),
    ('sparse', lambda: with_params(fc_weight=torch.Tensor.to_sparse), ['fc.weight', 'sparse']),
    ('csr', lambda: with_params(fc_weight=torch.Tensor.to_sparse_csr), ['fc.weight', 'sparse']),
    ('meta', lambda: with_params(conv=lambda t: t.to('meta')), ['conv', 'meta']),
    ('quantized', lambda: with_params(fc_weight=quantized), ['fc.weight', 'qint8']),
    ('nested', lambda: with_params(conv=lambda t: torch.nested.nested_tensor([t[0]])), ['conv']),
    ('one-double', lambda: with_params(fc_bias=torch.Tensor.double), ['float32', 'float64']),
    ('all-double', lambda: with_all(torch.Tensor.double), ['float64', 'dtype']),
    # Tensors of other shapes.
    ('3d', lambda: with_params(fc_weight=lambda t: t[..., None]), ['fc.weight', '(10, 16, 1)']),
    ('1d', lambda: with_params(conv=torch.Tensor.flatten), ['not the parameters']),
    ('0d', lambda: with_params(fc_weight=torch.Tensor.sum), ['not the parameters']),
    ('expanded', lambda: with_params(fc_bias=lambda t: t.sum().expand(10)), ['fc.bias', 'repeats']),
    ('huge', lambda: with_params(conv=lambda t: t[:1].expand(10**9, 1, 3, 3)), ['conv', 'repeats']),
    # Numbers that cannot be.
    ('nan', lambda: with_params(group1_block0_bn_bias=filled(np.nan)), [f'{BLOCK}.bn.bias']),
    ('inf', lambda: with_params(bn_running_mean=filled(np.inf)), ['bn.running_mean', 'finite']),
    ('variance', lambda: with_params(bn_running_var=filled(-0.1)), ['bn.running_var', 'negative']),
    ('folded-nan', lambda: {**folded(), 'fc.bias': torch.full((10,), np.nan)}, ['fc.bias']),
    # Other dicts than those of tensors.
    ('list', lambda: [1, 2], ['list']),
    ('tensor', lambda: torch.zeros(3), ['Tensor']),
    ('empty', lambda: {'params': {}}, ['state dict']),
    ('numbers', lambda: {'params': {3: torch.zeros(2)}}, ['strings']),
    ('both', lambda: {'params': bare(), 'state_dict': bare()}, ['both']),
    ('twice', lambda: {'params': bare(), 'stats': {'conv': torch.zeros(2)}}, ['conv', 'both']),
    ('text', lambda: {'params': 'no tensor'}, ['params']),
    ('model', lambda: {'params': bare(), 'model': torch.nn.Linear(2, 2)}, ['run code']),
    # What it says of its network.
    ('deep', lambda: within('network', depth=60004), ['60004', '10']),
    ('digits', lambda: within('network', depth=10**5000), []),
    ('wide', lambda: within('network', width=1e9), ['width']),
    ('wide-text', lambda: within('network', width='wide'), ['width', 'wide']),
    ('of-resnet', lambda: within('network', model='plain'), ['plain', 'diracnet']),
    ('no-network', lambda: {**run(), 'network': []}, ['network']),
    ('no-model', lambda: within('network', model=[]), ['model']),
    ('of-imagenet', lambda: within('network', dataset='ImageNet'), ['imagenet', 'cifar']),
    ('11-classes', lambda: within('network', num_classes=11), ['num_classes', '11']),
    ('true-channels', lambda: within('network', in_channels=True), ['in_channels', 'True']),
    ('more-network', lambda: within('network', padding=1), ['network']),
    ('no-block', lambda: {**resnet_run(), 'network': without(
        resnet_run()['network'], 'block')}, ['block']),
    ('other-block', lambda: within('network', resnet_run, block='add-bn'), ['block', 'add-bn']),
    # Classes and preprocessing.
    ('9-names', lambda: {**run(), 'classes': DIGIT[:9]}, ['classes', '9', '10']),
    ('no-names', lambda: {**run(), 'classes': list(range(10))}, ['classes']),
    ('bare-names', lambda: {'params': bare(), 'classes': DIGIT[:9]}, ['classes', '9']),
    ('export-names', lambda: {'state_dict': folded(), 'network': run()['network'],
        'classes': [*DIGIT, 'a'], 'preprocessing': PIXEL}, ['classes', '11']),
    ('bare-export', lambda: {'state_dict': folded(), 'network': run()['network']},
        ['preprocessing']),
    ('std', lambda: within('preprocessing', std=[0.0]), ['std']),
    ('mean', lambda: within('preprocessing', mean=[np.nan]), ['mean']),
    ('mean-dict', lambda: within('preprocessing', mean={1: 2}), ['mean']),
    ('rgb', lambda: within('preprocessing', channels=3), ['channels', '3']),
    ('image', lambda: within('preprocessing', image_size=10**6), ['image_size']),
    ('tiny', lambda: within('preprocessing', image_size=1), ['image_size']),
    ('whitening', lambda: within('preprocessing', whitening={'mean': 3}), ['whitening']),
    # Options.
    ('nonsense', lambda: within('options', model='nonsense'), ['model', 'nonsense']),
    ('lr', lambda: within('options', lr='big'), ['lr', 'big']),
    ('lr-nan', lambda: within('options', lr=np.nan), ['lr', 'nan']),
    ('no-lr', lambda: {**run(), 'options': without(run()['options'], 'lr')}, ['lr', 'missing']),
    ('steps', lambda: within('options', epoch_step='x'), ['epoch_step']),
    ('seed', lambda: within('options', seed=2**64), ['seed']),
    ('flag', lambda: within('options', recompute=1), ['recompute']),
    ('learning', lambda: within('options', learning=3), ['learning', 'unknown']),
    ('another', lambda: within('options', depth=16), ['depth', '16', '10']),
    ('together', lambda: within('options', recompute=True, compile=True), ['--compile']),
    ('no-options', lambda: {**run(), 'options': 3}, ['options']),
    # The optimizer and its scaler.
    ('state', lambda: {**run(), 'optimizer': {'state': 3}}, ['optimizer']),
    ('momentum', lambda: with_state(lambda s: {'momentum_buffer': torch.zeros(4)}), ['momentum']),
    ('momentum-nan', lambda: with_state(
        lambda s: {'momentum_buffer': s['momentum_buffer'] * np.nan}), ['momentum', 'finite']),
    ('no-momentum', lambda: with_state(lambda s: {}), ['optimizer', 'sgd']),
    ('adam', lambda: within('options', optim='adamw'), ['adamw']),
    ('scaler', lambda: {**run(), 'scaler': {'scale': np.nan}}, ['scaler']),
    # The position.
    ('epoch-text', lambda: {**run(), 'epoch': 'four'}, ['epoch', 'four']),
    ('epoch-below', lambda: {**run(), 'epoch': -1}, ['epoch']),
    ('epoch-digits', lambda: {**run(), 'epoch': 10**400}, ['epoch']),
    ('epoch-later', lambda: {**run(), 'epoch': 2}, ['epoch']),
    ('epoch-99', lambda: {**resnet_run(), 'epoch': 99}, ['99', '2']),
    ('step', lambda: within('progress', step=10**6), ['step', '1000000']),
    ('no-step', lambda: {**run(), 'progress': {'step': 2}}, ['progress']),
    ('time', lambda: within('progress', time=-1.0), ['time']),
    ('tally', lambda: with_tally(n=10**9), ['tally']),
    ('tally-nan', lambda: with_tally(loss={**run()['progress']['tally']['loss'], 'sum': np.nan}),
        ['tally']),
    ('log-number', lambda: {**run(), 'log': [3]}, ['log']),
    ('log-list', lambda: {**run(), 'log': ['json_stats: [1, 2]']}, ['log']),
    ('log-twice', lambda: {**run(), 'log': [*LOG, *LOG]}, ['log']),
    ('log-lines', lambda: {**run(), 'log': [LOG[0] + '\n' + LOG[0]]}, ['log']),
    ('log-deep', lambda: {**run(), 'log': ['json_stats: ' + '[' * 10**5]}, ['log']),
    ('unknown', lambda: {**run(), 'progres': {}}, ['progres']),
]  # fmt: skip


def programs(path, tmp_path):
    return [
        (predict.main, path, __file__, '--dataset', 'digits'),
        (train.main, '--evaluate', path, '--dataset', 'digits'),
        (train.main, '--resume', path, '--dataset', 'digits', '--save', tmp_path / 'run'),
        (export.main, path, tmp_path / 'out.pth', '--dataset', 'digits'),
    ]


@pytest.mark.parametrize('name, content, words', CONTENTS, ids=[row[0] for row in CONTENTS])
def test_contents(name, content, words, tmp_path, refused):
    path = tmp_path / f'{name}.pth'
    torch.save(content(), path)
    lines = set()
    for main, *arguments in programs(path, tmp_path):
        result = refused(1, [path, *words], main, *arguments)
        lines.add(result.err)
    assert len(lines) == 1  # one reader
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


def test_sound_ones_are_accepted(tmp_path, call):
    for name, content in (('run', run()), ('bare', bare()), ('folded', folded())):
        path = tmp_path / f'{name}.pth'
        torch.save(content, path)
        result = call(train.main, '--evaluate', path, '--dataset', 'digits')
        assert result.status == 0, result.err


# --- files that are no checkpoints -----------------------------------------------------------


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def make_program(path):
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))
    torch.export.save(program, path)


def make_script(path):
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(path)


# Name of the file; what makes it; the words that the line must have.
FILES = [
    ('pipe', os.mkfifo, ['regular']),
    ('pipe.onnx.pth', os.mkfifo, ['regular']),
    ('socket', make_socket, ['regular']),
    ('zero', lambda path: path.symlink_to('/dev/zero'), ['regular']),
    ('full', lambda path: path.symlink_to('/dev/full'), ['regular']),
    ('folder', Path.mkdir, ['model.pt7']),
    ('run', lambda path: (path / 'model.pt7').mkdir(parents=True), ['regular']),
    ('loop', lambda path: path.symlink_to(path), ['loop']),
    ('nowhere', lambda path: path.symlink_to('/nowhere/else'), ['exist']),
    ('net.pt2', make_program, ['torch.export', '.pth']),
    ('net.pt', make_script, ['torch.jit', '.pth']),
]


@pytest.mark.parametrize('name, make, words', FILES, ids=[row[0] for row in FILES])
def test_files(name, make, words, tmp_path, refused, deadline):
    path = tmp_path / name
    make(path)
    for main, *arguments in programs(path, tmp_path):
        refused(1, [name, *words], main, *arguments)
    assert not (tmp_path / 'out.pth').exists()


def test_a_name_that_is_too_long(tmp_path, refused):
    refused(2, ['nnn', 'long'], predict.main, tmp_path / ('n' * 300), __file__)


def test_a_pipe_gives_way_to_the_previous_checkpoint(tmp_path, call, deadline):
    os.mkfifo(tmp_path / 'model.pt7')
    torch.save(run(), tmp_path / 'previous.pt7')
    result = call(train.main, '--evaluate', tmp_path)
    assert result.status == 0 and 'regular' in result.err and 'previous.pt7' in result.err


def test_a_link_to_a_checkpoint_is_read(tmp_path, call):
    (tmp_path / 'link.pt7').symlink_to(FIXTURES / 'resnet-8' / 'model.pt7')
    assert call(train.main, '--evaluate', tmp_path / 'link.pt7').status == 0


# --- sound files whose numbers overflow later ------------------------------------------------


def test_a_fold_that_overflows_its_type(tmp_path, refused):
    params = {key: tensor.half() for key, tensor in bare().items()}
    params['bn.weight'] = torch.full_like(params['bn.weight'], 60_000)
    params['bn.running_var'] = torch.zeros_like(params['bn.running_var'])  # which is allowed
    path = tmp_path / 'half.pth'
    torch.save(params, path)
    for main, *arguments in programs(path, tmp_path):
        if main is not train.main:
            refused(1, [path, 'features.conv.weight', 'float16'], main, *arguments)


def test_logits_that_overflow(tmp_path, refused):
    path = tmp_path / 'large.pth'
    torch.save({**bare(), 'fc.weight': torch.full((10, 16), 3e38)}, path)
    refused(1, 'finite', export.main, path, tmp_path / 'out.pth', '--dataset', 'digits')
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

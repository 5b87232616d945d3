"""lab/models/repvgg.py: its formula, its fold, how it is recognized, and its runs."""

import json

import pytest
import torch
import torch.nn.functional as F

import train
from conftest import same, train_digits
from diracnet import DiracNet, define_diracnet, fold
from diracparams import make_architecture
from lab.models import registry
from lab.models.plain import define_plain
from lab.models.repvgg import define_repvgg, fold_repvgg, infer_repvgg
from test import constants, randomized, relative_error
from tools import export

NETWORKS = [  # depth, width, data set, size of the images
    (10, 1, 'digits', 8),
    (16, 0.7, 'CIFAR10', 12),
    (18, 0.125, 'ImageNet', 64),
]


def textbook_norm(x, params, name, mode):
    """Batch norm, entry by entry."""
    mean, var = params[f'{name}.running_mean'], params[f'{name}.running_var']
    if mode:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    column = (slice(None), None, None)
    x = (x - mean[column]) / (var[column] + 1e-5).sqrt()
    return x * params[f'{name}.weight'][column] + params[f'{name}.bias'][column]


def textbook(x, params, mode, dataset):
    """The formula of Ding et al., with the form of our chain, read off the keys of params."""
    large = dataset == 'ImageNet'
    x = F.conv2d(x, params['conv'], None, *((2, 3) if large else (1, 1)))
    x = textbook_norm(x, params, 'bn', mode)
    if large:
        x = F.max_pool2d(x, 3, 2, 1)
    for g in range(4 if large else 3):
        if g > 0:
            x = F.max_pool2d(x, 2)
        b = 0
        while f'group{g}.block{b}.conv' in params:
            name, x = f'group{g}.block{b}', x.clamp(min=0)
            wide = F.conv2d(x, params[f'{name}.conv'], padding=1)
            narrow = torch.einsum('nihw,oi->nohw', x, params[f'{name}.conv1x1'][:, :, 0, 0])
            y = textbook_norm(wide, params, f'{name}.bn', mode)
            y = y + textbook_norm(narrow, params, f'{name}.bn1x1', mode)
            if x.shape[1] == y.shape[1]:
                y = y + textbook_norm(x, params, f'{name}.bn_identity', mode)
            x, b = y, b + 1
    return x.clamp(min=0).mean((2, 3)) @ params['fc.weight'].T + params['fc.bias']


def example(depth, width, dataset, size, dtype=torch.double):
    """f, params with trained-looking values, and images."""
    f, params = define_repvgg(depth, width, dataset)
    params = constants(randomized(params), dtype)
    return f, params, torch.randn(4, params['conv'].shape[1], size, size, dtype=dtype)


@pytest.mark.parametrize('mode', [False, True])
@pytest.mark.parametrize('network', NETWORKS)
def test_network_equals_its_formula(network, mode):
    f, params, images = example(*network)
    expected = textbook(images, params, mode, network[2])
    assert relative_error(f(images, params, mode), expected) <= 1e-10


@pytest.mark.parametrize('network', NETWORKS)
def test_number_of_parameters(network):
    depth, width, dataset, _ = network
    params = define_repvgg(depth, width, dataset)[1]
    large = dataset == 'ImageNet'
    widths = [int(base * width) for base in ((64, 128, 256, 512) if large else (16, 32, 64))]
    blocks = 4 if large else (depth - 4) // 3  # in each group
    channels, classes = params['conv'].shape[1], 1000 if large else 10
    expected = widths[0] * (channels * (49 if large else 9) + 2)
    for inside, out in zip([widths[0], *widths], widths):
        expected += out * (10 * inside + 4) + (blocks - 1) * out * (10 * out + 6)
        expected += 2 * out * (inside == out)
    expected += classes * (widths[-1] + 1)
    assert sum(tensor.numel() for tensor in params.values() if tensor.requires_grad) == expected


def test_initialization():
    params = define_repvgg(16, 1, 'CIFAR10')[1]
    for key, tensor in params.items():
        values = tensor.detach()
        if key.endswith(('.bias', '.running_mean')):
            assert not values.any()
        elif key.endswith('.running_var') or (key.endswith('.weight') and tensor.ndim == 1):
            assert (values == 1).all()
    for name, fan in (('conv', 64 * 9), ('conv1x1', 64)):
        std = params[f'group2.block1.{name}'].detach().std()
        assert std == pytest.approx((2 / fan) ** 0.5, rel=0.05)


def test_training_reaches_every_branch():
    """Every parameter gets a gradient, and all running statistics move to the batch's."""
    f, params = define_repvgg(10, 1, 'digits')
    start = {key: tensor.detach().clone() for key, tensor in params.items()}
    F.cross_entropy(f(torch.randn(8, 1, 8, 8), params, True), torch.arange(8)).backward()
    for key, tensor in params.items():
        if tensor.requires_grad:
            assert tensor.grad.abs().max() > 0, key
        else:
            assert not torch.equal(tensor, start[key]), key


# --- the fold --------------------------------------------------------------------------------


@pytest.mark.parametrize('dtype, tolerance', [(torch.double, 1e-10), (torch.float, 1e-4)])
@pytest.mark.parametrize('network', NETWORKS)
def test_folded_network_computes_the_same(network, dtype, tolerance):
    f, params, images = example(*network, dtype)
    before = {key: tensor.clone() for key, tensor in params.items()}
    folded = fold_repvgg(params)
    net = DiracNet(*network[:3]).to(dtype)
    net.load_state_dict(folded)
    with torch.no_grad():
        assert relative_error(net(images), f(images, params, False)) <= tolerance
    assert {tensor.dtype for tensor in folded.values()} == {dtype}
    for tensor in folded.values():
        tensor.zero_()  # new tensors: those of params do not change
    assert all(torch.equal(tensor, before[key]) for key, tensor in params.items())


def test_fold_of_one_block():
    """The taps of a folded kernel, one by one."""
    _, params, _ = example(10, 1, 'digits', 8)
    name = 'group1.block1'
    scale = {
        bn: params[f'{name}.{bn}.weight'] / (params[f'{name}.{bn}.running_var'] + 1e-5).sqrt()
        for bn in ('bn', 'bn1x1', 'bn_identity')
    }
    expected = scale['bn'][:, None, None, None] * params[f'{name}.conv']
    for o in range(32):
        expected[o, :, 1, 1] += scale['bn1x1'][o] * params[f'{name}.conv1x1'][o, :, 0, 0]
        expected[o, o, 1, 1] += scale['bn_identity'][o]
    bias = sum(
        params[f'{name}.{bn}.bias'] - params[f'{name}.{bn}.running_mean'] * scale[bn]
        for bn in scale
    )
    folded = fold_repvgg(params)
    torch.testing.assert_close(
        folded[f'features.{name}.conv.weight'], expected, rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(folded[f'features.{name}.conv.bias'], bias, rtol=1e-12, atol=1e-12)


# --- recognizing it --------------------------------------------------------------------------


@pytest.mark.parametrize('network', NETWORKS)
def test_its_architecture_is_recognized(network):
    depth, width, dataset, _ = network
    params = define_repvgg(depth, width, dataset)[1]
    state = torch.get_rng_state()
    found = infer_repvgg(params)
    assert torch.equal(torch.get_rng_state(), state)  # it draws no random numbers
    expected = make_architecture(depth, width, dataset)
    assert (found.form, found.groups) == (expected.form, expected.groups)
    assert (found.in_channels, found.num_classes) == (expected.in_channels, expected.num_classes)


@pytest.mark.parametrize(
    'params',
    [
        define_plain(10, 1, 'digits')[1],
        define_diracnet(10, 1, 'digits')[1],
        fold(define_plain(10, 1, 'digits')[1]),
        fold_repvgg(define_repvgg(10, 1, 'digits')[1]),
        {},
    ],
)
def test_other_parameters_are_refused(params):
    for function in (infer_repvgg, fold_repvgg):
        with pytest.raises(ValueError, match='not the parameters'):
            function(params)


@pytest.mark.parametrize(
    'key, shape',
    [
        ('group1.block0.conv1x1', None),
        ('group1.block1.bn_identity.running_var', None),
        ('fc.bias', None),
        ('group1.block0.conv1x1', (32, 16, 3, 3)),
        ('group1.block0.bn_identity.weight', (32,)),  # 16 channels become 32: no identity
    ],
)
def test_damaged_parameters_are_refused(key, shape):
    """The message names the tensor, and no other model takes them, above all not plain."""
    params = define_repvgg(10, 1, 'digits')[1]
    if shape is None:
        del params[key]
    else:
        params[key] = torch.zeros(shape)
    with pytest.raises(ValueError, match=key):
        fold_repvgg(params)
    assert registry.infer(params) is None


@pytest.mark.parametrize('model', [model for model in registry.FOLDABLE if model != 'repvgg'])
def test_other_models_do_not_fold_it(model):
    with pytest.raises(ValueError, match='group0.block0'):
        registry.fold(model, define_repvgg(10, 1, 'digits')[1])


@pytest.mark.parametrize(
    'arguments, word',
    [((17, 1, 'digits'), '17'), ((20, 1, 'ImageNet'), '20'), ((10, 0, 'digits'), 'width 0')],
)
def test_impossible_networks(arguments, word):
    with pytest.raises(ValueError, match=word):
        define_repvgg(*arguments)


# --- its runs --------------------------------------------------------------------------------


def test_trains_resumes_evaluates_and_exports(tmp_path, call):
    whole, cut = tmp_path / 'whole', tmp_path / 'cut'
    recipe = '--model repvgg --depth 10 --lr 0.1 --epoch_step [3]'
    lines = train_digits(whole, f'{recipe} --epochs 3')
    assert lines[-1]['test_acc'] > 85
    train_digits(cut, f'{recipe} --epochs 1')
    train.main(['--resume', str(cut), '--epochs', '3'])
    assert same(whole, cut)

    bare = tmp_path / 'bare.pth'
    torch.save(torch.load(whole / 'model.pt7', weights_only=True)['params'], bare)
    printed = call(train.main, '--dataset', 'digits', '--evaluate', bare).out
    assert json.loads(printed.removeprefix('json_stats: '))['test_acc'] == lines[-1]['test_acc']

    for name in ('onnx', 'onnxruntime', 'onnxscript'):
        pytest.importorskip(name)
    result = call(export.main, whole, tmp_path / 'net.int8.onnx')
    assert result.status == 0, result.err
    *_, row = (line for line in result.out.splitlines() if line.startswith('| '))
    _, error, top1, unfolded, *_ = (cell.strip() for cell in row.strip('|').split('|'))
    assert float(error) <= 0.3
    assert abs(float(top1.split()[0]) - float(unfolded.split()[0])) <= 2

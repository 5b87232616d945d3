"""The networks that DiracNets are compared with, and the options of the comparison."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from lab.runs import checkpoint
from lab.models import diracnet_v1
from lab.models import registry as resnet
import train
from conftest import read_log, same, without_times
from diracconv import dirac_weight
from diracnet import Network
from lab.models.diracnet_v1 import DiracNetV1, define_diracnet_v1, define_plain_ncrelu, fold_v1
from lab.training.options import build_parser, complete


def count(params):
    return sum(tensor.numel() for tensor in params.values() if tensor.requires_grad)


def randomize(params):
    """As after a training: statistics, scales and shifts that are not those of the start."""
    generator = torch.Generator().manual_seed(0)
    for key, tensor in params.items():
        if tensor.ndim == 1 and 'fc' not in key:
            low, high = (0.5, 2) if key.endswith(('weight', 'var', 'alpha', 'beta')) else (-1, 1)
            tensor.data.uniform_(low, high, generator=generator)
    return params


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
        ('plain', 16, 1, 'CIFAR10', 173_402 - 2 * 4 * (16 + 32 + 64)),
        ('resnet-dirac', 20, 1, 'CIFAR10', 269_722 + 2 * 6 * (16 + 32 + 64)),
    ],
)
def test_parameter_counts(model, depth, width, dataset, expected):
    """As in the papers (0.27 M, 1.7 M, 36.5 M) and in torchvision; with and without an alpha and a beta for each channel of a block's convolution."""
    assert count(resnet.define(model, depth, width, dataset)[1]) == expected


@pytest.mark.parametrize(
    'model, depth, width, name',
    [
        ('resnet', 18, 1, 'resnet18'),
        ('resnet', 34, 1, 'resnet34'),
        ('wrn', 50, 2, 'wide_resnet50_2'),
    ],
)
def test_torchvisions_state_dicts_load(model, depth, width, name, tmp_path):
    """Outputs and, in training, running statistics are equal."""
    theirs = getattr(torchvision.models, name)()
    randomize(theirs.state_dict())
    torch.save(theirs.state_dict(), tmp_path / 'theirs.pth')
    found = checkpoint.load(tmp_path / 'theirs.pth')
    assert (found.network['model'], found.network['depth'], found.network['width']) == (
        model,
        depth,
        width,
    )
    ours, images = found.module(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for mode in (False, True):
            expected, actual = theirs.train(mode)(images), ours.train(mode)(images)
            assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
    torch.testing.assert_close(
        ours.state_dict()['layer2.0.bn2.running_var'],
        theirs.state_dict()['layer2.0.bn2.running_var'],
    )


class Textbook(nn.Module):
    """A block of a ResNet of small images, written out in modules."""

    def __init__(self, params, name, stride, end):
        super().__init__()
        get = {
            key[len(name) + 1 :]: tensor for key, tensor in params.items() if key.startswith(name)
        }
        out, inside = get['conv1.weight'].shape[:2]
        self.conv1, self.conv2 = (
            nn.Conv2d(inside, out, 3, stride, 1, bias=False),
            nn.Conv2d(out, out, 3, 1, 1, bias=False),
        )
        self.bn1, self.bn2 = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        self.load_state_dict(
            {
                key: tensor
                for key, tensor in get.items()
                if 'alpha' not in key and 'beta' not in key
            },
            strict=False,
        )
        for conv in ('conv1', 'conv2'):
            if f'{conv}.alpha' in get:
                getattr(self, conv).weight.data = dirac_weight(
                    *(get[f'{conv}.{part}'] for part in ('weight', 'alpha', 'beta'))
                )
        self.stride, self.end, self.out = stride, end, out

    def forward(self, x):
        y = self.conv2(self.bn1(self.conv1(x)).relu())
        past = F.avg_pool2d(x, 1, self.stride)
        past = torch.cat([past, torch.zeros(len(x), self.out - x.shape[1], *past.shape[2:])], 1)
        y = {
            'bn-add-relu': lambda: (self.bn2(y) + past).relu(),
            'bn-add': lambda: self.bn2(y) + past,
            'add-bn-relu': lambda: self.bn2(y + past).relu(),
            'add-bn': lambda: self.bn2(y + past),
        }[self.end]()
        return y


@pytest.mark.parametrize('end', resnet.BLOCKS)
@pytest.mark.parametrize('model', ['resnet', 'resnet-dirac'])
def test_resnet_is_its_blocks(model, end):
    f, params = resnet.define(model, 14, 1, 'CIFAR10', block=end)
    randomize(params)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        stem = F.batch_norm(
            F.conv2d(images, params['conv1.weight'], padding=1),
            *(params[f'bn1.{part}'] for part in ('running_mean', 'running_var', 'weight', 'bias')),
        ).relu()
        x = stem
        for g in range(3):
            for b in range(2):
                x = Textbook(params, f'layer{g + 1}.{b}', 2 if g and not b else 1, end).eval()(x)
        expected = F.linear(x.mean((2, 3)), params['fc.weight'], params['fc.bias'])
        actual = f(images, params, False)
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_wide_resnet_is_preactivated_and_drops():
    f, params = resnet.define('wrn', 10, 2, 'CIFAR10', dropout=0.3)
    randomize(params)
    images = torch.randn(4, 3, 32, 32)

    def bn_relu(x, name):
        return F.batch_norm(
            x,
            *(
                params[f'{name}.{part}']
                for part in ('running_mean', 'running_var', 'weight', 'bias')
            ),
        ).relu()

    with torch.no_grad():
        x = F.conv2d(images, params['conv1.weight'], padding=1)
        for g, stride in enumerate((1, 2, 2)):
            name = f'layer{g + 1}.0'
            y = bn_relu(x, f'{name}.bn1')
            z = bn_relu(
                F.conv2d(y, params[f'{name}.conv1.weight'], stride=stride, padding=1), f'{name}.bn2'
            )
            x = F.conv2d(z, params[f'{name}.conv2.weight'], padding=1) + F.conv2d(
                y, params[f'{name}.downsample.0.weight'], stride=stride
            )
        expected = F.linear(bn_relu(x, 'bn1').mean((2, 3)), params['fc.weight'], params['fc.bias'])
        assert (f(images, params, False) - expected).abs().max() <= 1e-5 * expected.abs().max()
        once, again = f(images, params, True), f(images, params, True)
        assert not torch.equal(once, again)  # dropout: in training alone, and other units each time
        assert torch.equal(f(images, params, False), f(images, params, False))
    with pytest.raises(ValueError, match='dropout'):
        resnet.define('wrn', 50, 2, 'ImageNet', dropout=0.3)


def test_impossible_choices():
    for model, depth, dataset, words in (
        ('resnet', 21, 'CIFAR10', '6n [+] 2.*nearest is 20'),
        ('wrn', 20, 'digits', '6n [+] 4.*nearest is'),
        ('resnet', 50, 'ImageNet', '18 or 34'),
        ('wrn', 18, 'ImageNet', '50'),
    ):
        with pytest.raises(ValueError, match=words):
            resnet.define(model, depth, 1, dataset)
    with pytest.raises(ValueError, match='bn-add'):
        resnet.define('resnet', 20, 1, 'digits', block='relu')
    with pytest.raises(ValueError, match='width'):
        resnet.define('resnet', 20, 0, 'digits')


# --- version 1 -------------------------------------------------------------------------------------------------------


def test_tiled_delta():
    """The convolution of NCReLU with it is the identity, where channels stay; otherwise as many identities as fit."""
    x = torch.randn(2, 6, 5, 5)
    delta = diracnet_v1.tiled_delta(torch.zeros(6, 12, 3, 3))
    assert torch.equal(F.conv2d(diracnet_v1.ncrelu(x), delta, padding=1), x)
    for out, inside, rows, columns in (
        (4, 4, 1, 1),
        (8, 4, 2, 1),
        (4, 8, 1, 2),
        (7, 3, 2, 1),
        (3, 7, 1, 2),
        (5, 4, 1, 1),
    ):
        n, expected = min(out, inside), np.zeros((out, inside))
        for i in range(rows):
            for j in range(columns):
                for k in range(n):
                    expected[i * n + k, j * n + k] = 1
        delta = diracnet_v1.tiled_delta(torch.zeros(out, inside, 3, 3)).numpy()
        assert (delta[:, :, 1, 1] == expected).all() and delta.sum() == expected.sum()


@pytest.mark.parametrize('define', [define_diracnet_v1, define_plain_ncrelu])
def test_version_1_is_its_formula(define):
    f, params = define(10, 1, 'CIFAR10')
    dirac = define is define_diracnet_v1
    if dirac:
        assert [params[f'group1.block0.{name}'].tolist() for name in ('alpha', 'beta')] == [
            [5.0],
            [pytest.approx(1e-3)],
        ]
    else:
        assert not any(key.endswith(('alpha', 'beta')) for key in params)
    std = 0.1 if dirac else (2 / (128 * 9)) ** 0.5  # Kaiming, of twice 64 channels
    assert abs(params['group2.block1.conv'].detach().std() / std - 1) < 0.05
    randomize(params)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():

        def bn(x, name):
            return F.batch_norm(
                x,
                *(
                    params[f'{name}.{part}']
                    for part in ('running_mean', 'running_var', 'weight', 'bias')
                ),
            )

        x = bn(F.conv2d(images, params['conv'], padding=1), 'bn')
        for g in range(3):
            x = F.max_pool2d(x, 2) if g else x
            for b in range(2):
                name = f'group{g}.block{b}'
                weight = params[f'{name}.conv']
                if dirac:
                    norms = torch.stack([row.norm() for row in weight])[:, None, None, None]
                    weight = (
                        params[f'{name}.alpha'] * diracnet_v1.tiled_delta(weight)
                        + params[f'{name}.beta'] * weight / norms
                    )
                x = bn(
                    F.conv2d(torch.cat([x.relu(), -(-x).relu()], 1), weight, padding=1),
                    f'{name}.bn',
                )
        expected = F.linear(x.relu().mean((2, 3)), params['fc.weight'], params['fc.bias'])
        assert (f(images, params, False) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_version_1_folds_into_the_printed_chain():
    f, params = define_diracnet_v1(18, 0.75, 'ImageNet')
    assert round(count(params) / 1e6, 1) == 12.8
    randomize(params)
    folded = DiracNetV1.from_state_dict(fold_v1(params)).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected, actual = f(images, params, False), folded(images)
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
    chain = [
        (name, module) for name, module in folded.named_modules() if not list(module.children())
    ]
    convs = {
        name: (module.in_channels, module.out_channels)
        for name, module in chain
        if isinstance(module, nn.Conv2d)
    }
    widths = (48, 96, 192, 384)
    assert convs == {
        'conv': (3, 48),
        **{
            f'group{g}.block{b}.conv': (2 * (widths[g] if b or not g else widths[g - 1]), widths[g])
            for g in range(4)
            for b in range(4)
        },
    }
    expected = ['conv', 'max_pool0']
    for g in range(4):
        expected += ([f'max_pool{g}'] if g else []) + [
            f'group{g}.block{b}.{part}' for b in range(4) for part in ('ncrelu', 'conv')
        ]
    assert [name for name, _ in chain] == [*expected, 'relu', 'avg_pool', 'view', 'fc']
    assert (folded.conv.kernel_size, folded.conv.stride, folded.conv.padding) == (
        (7, 7),
        (2, 2),
        (3, 3),
    )
    assert (folded.fc.in_features, folded.fc.out_features) == (384, 1000)
    with pytest.raises(ValueError, match='not the parameters'):
        fold_v1(resnet.define('resnet', 20, 1, 'CIFAR10')[1])


# --- through train.py ------------------------------------------------------------------------------------------------


SHORT = [
    '--dataset',
    'digits',
    '--epochs',
    '5',
    '--epoch_step',
    '[4]',
    '--lr',
    '0.1',
    '--weight_decay',
    '0.0005',
]


@pytest.mark.parametrize(
    'options',
    [
        ['--model', 'diracnet-v1', '--depth', '10'],
        ['--model', 'plain', '--depth', '10'],
        ['--model', 'resnet', '--depth', '14'],
        ['--model', 'resnet-dirac', '--depth', '14', '--block', 'bn-add'],
        ['--model', 'wrn', '--depth', '10', '--width', '2', '--dropout', '0.3'],
    ],
)
def test_trains_on_digits_is_tested_and_resumes(options, tmp_path, call):
    train.main([*SHORT, *options, '--save', str(tmp_path / 'whole')])
    assert read_log(tmp_path / 'whole')[-1]['test_acc'] > 85
    train.main(
        [*SHORT, *options, '--epochs', '2', '--save', str(tmp_path / 'cut'), '--bn_momentum', '0.1']
    )
    train.main(['--resume', str(tmp_path / 'cut'), '--epochs', '5'])
    assert (
        same(tmp_path / 'whole', tmp_path / 'cut')
        and without_times(tmp_path / 'whole')[-1] == without_times(tmp_path / 'cut')[-1]
    )
    stats = json.loads(
        call(train.main, '--evaluate', tmp_path / 'whole').out.removeprefix('json_stats: ')
    )
    assert stats['test_acc'] == read_log(tmp_path / 'whole')[-1]['test_acc']
    found = checkpoint.load(tmp_path / 'whole')
    torch.save(found.params, tmp_path / 'bare.pth')
    bare = checkpoint.load(tmp_path / 'bare.pth').network
    assert (bare['model'], bare['depth'], bare['width']) == tuple(
        found.network[name] for name in ('model', 'depth', 'width')
    )


@pytest.mark.parametrize('model', resnet.VERSION_1)
def test_version_1_checkpoint_folds(model, tmp_path, refused):
    from lab.data import datasets as data
    from tools import export

    train.main(
        [
            *SHORT,
            '--model',
            model,
            '--depth',
            '10',
            '--epochs',
            '3',
            '--save',
            str(tmp_path / 'run'),
        ]
    )
    assert read_log(tmp_path / 'run')[-1]['test_acc'] > 70
    found = checkpoint.load(tmp_path / 'run')
    torch.save(found.params, tmp_path / 'bare.pth')
    assert checkpoint.load(tmp_path / 'bare.pth').network['model'] == model
    inputs, _ = next(iter(data.load('digits', '.').batches(False, batch_size=100)))
    torch.save(found.fold().state_dict(), tmp_path / 'folded.pth')
    with torch.no_grad():
        expected = found.module()(inputs)
        for folded in (found.fold(), checkpoint.load(tmp_path / 'folded.pth').fold()):
            assert (folded(inputs) - expected).abs().max() <= 1e-5 * expected.abs().max()
    refused(1, ['int8', 'NCReLU'], export.main, tmp_path / 'run', tmp_path / 'net.int8.onnx')


def test_residual_networks_do_not_fold(tmp_path, refused):
    from tools import export

    train.main(
        [
            *SHORT,
            '--model',
            'wrn',
            '--depth',
            '10',
            '--epochs',
            '1',
            '--save',
            str(tmp_path / 'run'),
        ]
    )
    refused(
        1, ['--model wrn', 'diracnet, plain'], export.main, tmp_path / 'run', tmp_path / 'net.pth'
    )


@pytest.mark.parametrize(
    'model, free',
    [
        ('diracnet-v1', set()),
        ('plain-ncrelu', set()),
        ('resnet', {'weight', 'bias'}),
        ('resnet-dirac', {'weight', 'bias', 'alpha', 'beta'}),
    ],
)
def test_what_is_decayed(model, free):
    """Version 1: everything. Others: tensors of more than one dimension."""
    module = Network(*resnet.define(model, 10 if model in resnet.VERSION_1 else 14, 1, 'digits'))
    names = {id(tensor): name for name, tensor in module.named_parameters()}
    groups = train.make_optimizer(
        module, {'model': model, 'lr': 0.1, 'weight_decay': 5e-4}
    ).param_groups
    not_decayed = {
        names[id(tensor)]
        for group in groups
        if not group['weight_decay']
        for tensor in group['params']
    }
    assert sum(len(group['params']) for group in groups) == len(names)
    assert {name.split('.')[-1] for name in not_decayed} == free
    if free:
        assert not_decayed == {
            name for name, tensor in module.named_parameters() if tensor.ndim == 1
        }


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
    train.main(
        [
            '--dataset',
            'digits',
            '--depth',
            '10',
            '--optim',
            name,
            '--epochs',
            '3',
            '--epoch_step',
            '[3]',
            '--weight_decay',
            '0.0001',
            '--save',
            str(tmp_path / 'run'),
        ]
    )
    assert read_log(tmp_path / 'run')[-1]['test_acc'] > 60
    optimizer = train.make_optimizer(
        Network(*resnet.define('diracnet', 10, 1, 'digits')),
        complete({'dataset': 'digits', 'optim': name}),
    )
    assert type(optimizer).__name__ == kind and all(
        optimizer.param_groups[0][key] == value for key, value in settings.items()
    )
    assert complete({'dataset': 'digits', 'optim': name, 'lr': 0.5})['lr'] == 0.5


def test_warm_up(tmp_path, monkeypatch):
    rates, step = [], train.Scaled.step
    monkeypatch.setattr(
        train.Scaled,
        'step',
        lambda self, closure: (
            rates.append(self.optimizer.param_groups[0]['lr']),
            step(self, closure),
        ),
    )
    train.main(
        [
            '--dataset',
            'digits',
            '--depth',
            '10',
            '--epochs',
            '3',
            '--epoch_step',
            '[3]',
            '--warmup',
            '30',
            '--save',
            str(tmp_path / 'run'),
        ]
    )
    assert rates == [pytest.approx(0.002)] * 30 + [0.2] * 16 + [pytest.approx(0.04)] * 23


def test_cumulative_batch_norm_is_the_mean_over_an_epoch(tmp_path):
    """With a learning rate of 0, the running mean behind the stem is that of its output over the epoch's batches."""
    from lab.data import datasets as data

    for momentum in ('cumulative', '1.0'):
        train.main(
            [
                '--dataset',
                'digits',
                '--depth',
                '10',
                '--epochs',
                '2',
                '--lr',
                '0',
                '--bn_momentum',
                momentum,
                '--save',
                str(tmp_path / momentum),
            ]
        )
    params = checkpoint.load(tmp_path / 'cumulative').params
    batches = data.load('digits', '.').batches(True, batch_size=64, seed=1)
    batches.epoch = 2
    means = [F.conv2d(inputs, params['conv'], padding=1).mean((0, 2, 3)) for inputs, _ in batches]
    torch.testing.assert_close(
        params['bn.running_mean'], torch.stack(means).mean(0), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        checkpoint.load(tmp_path / '1.0').params['bn.running_mean'], means[-1], rtol=1e-4, atol=1e-5
    )


def test_initializations():
    def convs(init):
        torch.manual_seed(0)
        return resnet.define('plain', 16, 1, 'CIFAR10', init=init)[1]['group2.block1.conv'].detach()

    fan = 64 * 9
    assert convs('kaiming').std() == pytest.approx((2 / fan) ** 0.5, rel=0.02)
    assert convs('xavier').std() == pytest.approx((2 / (2 * fan)) ** 0.5, rel=0.02)
    assert convs('normal').std() == pytest.approx(0.01, rel=0.02)
    rows = convs('orthogonal').flatten(1)
    torch.testing.assert_close(rows @ rows.T, torch.eye(64), atol=1e-5, rtol=0)
    torch.manual_seed(0)
    own = resnet.define('plain', 16, 1, 'CIFAR10')[1]['group2.block1.conv'].detach()
    assert own.std() == pytest.approx((2 / fan) ** 0.5, rel=0.02)


def test_options_of_one_model(refused, tmp_path):
    for arguments, words in (
        (['--block', 'bn-add'], ['--block', 'resnet']),
        (['--model', 'resnet', '--dropout', 0.3], ['--dropout', 'wrn']),
        (['--model', 'resnet', '--depth', 16], ['16', '6n + 2']),
        (['--model', 'wrn', '--recompute'], '--recompute'),
        (['--model', 'wrn', '--dropout', 1.5], '1.5'),
        (['--bn_momentum', 0], '--bn_momentum'),
        (['--init', 'zeros'], 'zeros'),
    ):
        refused(2, words, train.main, '--dataset', 'digits', *arguments, '--save', tmp_path / 'run')
    parse = build_parser(None).parse_args
    assert (
        complete(
            {
                name: value
                for name, value in vars(parse(['--model', 'wrn', '--dataset', 'ImageNet'])).items()
                if value is not None
            }
        )['depth']
        == 50
    )
    assert complete({'model': 'resnet', 'dataset': 'CIFAR10'})['depth'] == 20

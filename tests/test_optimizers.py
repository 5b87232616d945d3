"""lab/training/optimizers.py: the update, weight decay, the learning rate, clipping, and loss
scaling."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import train_digits
from diracnet import Network, define_diracnet
from lab.data import datasets
from lab.models.registry import define
from lab.runs import checkpoint
from lab.training.optimizers import learning_rate, make_optimizer, parameter_table
from lab.training.options import complete

# --- the update ------------------------------------------------------------------------------


def test_two_steps_are_sgd_with_momentum(tmp_path):
    """Two full-batch steps of train.py against the update written out."""
    options = (
        '--depth 10 --epochs 2 --epoch_step [2] --batch_size 1437 --lr 0.05 --weight_decay 0.01 '
        '--dtype double --seed 2'
    )
    train_digits(tmp_path / 'run', options)
    actual = checkpoint.load(tmp_path / 'run').params

    torch.manual_seed(2)
    f, params = define_diracnet(10, 1, 'digits')
    params = {key: tensor.detach().double() for key, tensor in params.items()}
    images, targets = datasets.load('digits', '.').train
    inputs = ((images.double() - 77.9) / 95.7).permute(0, 3, 1, 2)
    momentum = {}
    for lr in (0.05, 0.01):
        learned = {key: tensor for key, tensor in params.items() if 'running' not in key}
        for tensor in learned.values():
            tensor.requires_grad_()
        F.cross_entropy(f(inputs, params, True), targets).backward()
        for key, tensor in learned.items():
            decay = 0.01 * tensor.detach() if tensor.ndim > 1 else 0
            momentum[key] = 0.9 * momentum.get(key, 0) + tensor.grad + decay
            params[key] = tensor.detach() - lr * momentum[key]
    for key, tensor in params.items():
        # train.py normalizes the inputs in single precision.
        torch.testing.assert_close(actual[key], tensor.detach(), rtol=1e-4, atol=1e-5)


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
    module = Network(*define_diracnet(10, 1, 'digits'))
    optimizer = make_optimizer(module, complete({'dataset': 'digits', 'optim': name}))
    assert type(optimizer).__name__ == kind
    group = optimizer.param_groups[0]
    assert {key: group[key] for key in settings} == settings


@pytest.mark.parametrize('skipped', [0, 2])
@pytest.mark.parametrize('optim', ['sgd', 'nesterov', 'adamw'])
def test_loss_scaling(optim, skipped):
    """--dtype half scales its losses. The steps are those without scaling, and a step whose
    gradients are not finite is left out, the first one, too."""
    found = []
    for enabled in (False, True):
        torch.manual_seed(0)
        module = Network(*define_diracnet(16, 1, 'digits'))
        scaler = torch.amp.GradScaler('cpu', init_scale=1024, enabled=enabled)
        options = {'lr': 0.01, 'weight_decay': 5e-4, 'optim': optim, 'dtype': 'half'}
        optimizer = make_optimizer(module, options)
        for step in range(3):
            if step == skipped and not enabled:
                continue
            inputs = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            loss = module(inputs).square().mean()
            scaler.scale(loss).backward()
            if step == skipped:
                module.fc.bias.grad.fill_(float('inf'))
            scaler.step(optimizer)
            scaler.update()
        found.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert scaler.get_scale() == 512
    assert (found[1] - found[0]).abs().max() < 1e-6 * found[0].abs().max()


def recorded_steps(monkeypatch, measure):
    """A list, to which each step of SGD adds measure(its parameters, its learning rate)."""
    found, step = [], torch.optim.SGD.step

    def recording_step(self, *args, **kwargs):
        parameters = [p for group in self.param_groups for p in group['params']]
        found.append(measure(parameters, self.param_groups[0]['lr']))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, 'step', recording_step)
    return found


def test_clip(tmp_path, monkeypatch):
    norms = recorded_steps(
        monkeypatch, lambda ps, _: torch.cat([p.grad.flatten() for p in ps]).norm().item()
    )
    options = '--depth 10 --width 0.5 --epochs 2'
    train_digits(tmp_path / 'free', options)
    limit, free = float(np.median(norms)), list(norms)
    norms.clear()
    train_digits(tmp_path / 'clipped', f'{options} --clip {limit}')
    clipped = np.array(norms)
    assert clipped.max() <= 1.0001 * limit and (clipped < 0.99 * limit).any()
    assert clipped[0] == pytest.approx(min(free[0], limit), rel=1e-4)


# --- weight decay ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    'model, free',
    [
        ('diracnet', {'weight', 'bias', 'alpha', 'beta'}),
        ('diracnet-v1', set()),
        ('plain-ncrelu', set()),
        ('resnet', {'weight', 'bias'}),
        ('resnet-dirac', {'weight', 'bias', 'alpha', 'beta'}),
    ],
)
def test_which_parameters_have_weight_decay(model, free):
    """Version 1: all of them. Others: the tensors of more than one dimension."""
    module = Network(*define(model, 14 if 'resnet' in model else 10, 1, 'digits'))
    options = {'model': model, 'lr': 0.1, 'weight_decay': 5e-4}
    groups = make_optimizer(module, options).param_groups
    decay = {id(p): group['weight_decay'] for group in groups for p in group['params']}
    without = set()
    for name, tensor in module.named_parameters():
        if free and tensor.ndim == 1:
            without.add(name.split('.')[-1])
        assert decay[id(tensor)] == (0 if free and tensor.ndim == 1 else 5e-4)
    assert without == free


def test_table_of_parameters():
    table = parameter_table(Network(*define_diracnet(16, 1, 'CIFAR10')), 5e-4)
    assert table[-1] == '173,402 parameters'
    rows = [line.split() for line in table[:-1]]
    listed = {row[0]: row[1:] for row in rows}
    assert len(listed) == len(rows) == 22
    assert {name: row for name, row in listed.items() if row[1] != '-'} == {
        'conv': ['16x3x3x3', 'decay', '0.0005'],
        'group0.block0-3.conv': ['16x16x3x3', 'decay', '0.0005'],
        'group1.block0.conv': ['32x16x3x3', 'decay', '0.0005'],
        'group1.block1-3.conv': ['32x32x3x3', 'decay', '0.0005'],
        'group2.block0.conv': ['64x32x3x3', 'decay', '0.0005'],
        'group2.block1-3.conv': ['64x64x3x3', 'decay', '0.0005'],
        'fc.weight': ['10x64', 'decay', '0.0005'],
    }
    assert listed['group2.block0-3.alpha'] == ['64', '-']


# --- the learning rate -----------------------------------------------------------------------


def test_learning_rate_of_cifar():
    """It falls at the beginning of the epochs in --epoch_step."""
    options = complete({'dataset': 'CIFAR10'})
    rates = [learning_rate(options, epoch, 1) for epoch in range(200)]
    assert rates[0] == rates[58] == 0.1
    falls = {60: 0.02, 119: 0.02, 120: 0.004, 159: 0.004, 160: 0.0008, 200: 0.0008}
    for epoch, rate in falls.items():
        assert rates[epoch - 1] == pytest.approx(rate)


def rates(epoch_steps, **given):
    options = complete({'dataset': 'digits', 'lr': 0.4, **given})
    steps = range(options['epochs'] * epoch_steps)
    return [learning_rate(options, step, epoch_steps) for step in steps]


def rates_of_torch(make_scheduler, n):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.4)
    scheduler, found = make_scheduler(optimizer), []
    for _ in range(n):
        found.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        scheduler.step()
    return found


def test_schedules():
    """Those of torch with the same names."""
    scheduler = torch.optim.lr_scheduler
    found = rates(5, epochs=4, schedule='cosine')
    expected = rates_of_torch(lambda sgd: scheduler.CosineAnnealingLR(sgd, T_max=20), 20)
    assert found == pytest.approx(expected)
    found = rates(5, epochs=4, schedule='linear', warmup='ramp:6')
    assert found == rates(5, epochs=4, schedule='linear', warmup='ramp:1.2e')
    expected = rates_of_torch(lambda sgd: scheduler.LinearLR(sgd, 1 / 6, 1, total_iters=5), 6)
    expected += rates_of_torch(lambda sgd: scheduler.LinearLR(sgd, 1, 0, total_iters=14), 14)
    assert found == pytest.approx(expected)
    found = rates(5, epochs=4, epoch_step=[3], warmup='ramp:2')
    assert found == pytest.approx([0.2] + 9 * [0.4] + 10 * [0.08])


def test_warm_up(tmp_path, monkeypatch):
    """23 steps per epoch; the rate falls in epoch 3."""
    found = recorded_steps(monkeypatch, lambda _, rate: rate)
    train_digits(tmp_path / 'run', '--depth 10 --epochs 3 --epoch_step [3] --warmup 30')
    assert found == [pytest.approx(0.002)] * 30 + [0.2] * 16 + [pytest.approx(0.04)] * 23

"""lab/training/optimizers.py: the update, weight decay, the learning rate, and loss scaling."""

import pytest
import torch
import torch.nn.functional as F

from conftest import train_digits
from diracnet import Network, define_diracnet
from lab.data import datasets
from lab.runs import checkpoint
from lab.training.optimizers import learning_rate, make_optimizer, parameter_table
from lab.training.options import complete


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


def test_weight_decay_is_for_tensors_with_more_than_one_dimension():
    module = Network(*define_diracnet(16, 1, 'CIFAR10'))
    names = {id(tensor): name for name, tensor in module.named_parameters()}
    groups = make_optimizer(module, {'lr': 0.1, 'weight_decay': 5e-4}).param_groups
    assert [group['weight_decay'] for group in groups] == [5e-4, 0]
    assert [group['momentum'] for group in groups] == [0.9, 0.9]
    decayed, others = ({names[id(tensor)] for tensor in group['params']} for group in groups)
    expected = {name for name in names.values() if name.endswith('conv') or name == 'fc.weight'}
    assert decayed == expected and len(decayed) == 14
    assert decayed | others == set(names.values())

    table = parameter_table(module, 5e-4)
    assert table[-1] == '173,402 parameters'
    rows = [line.split() for line in table[:-1]]
    listed = {row[0]: row[1:] for row in rows}
    assert len(listed) == len(rows) == 22
    assert listed['group0.block0-3.conv'] == ['16x16x3x3', 'decay', '0.0005']
    assert listed['group1.block0.conv'] == ['32x16x3x3', 'decay', '0.0005']
    assert listed['group1.block1-3.conv'] == ['32x32x3x3', 'decay', '0.0005']
    assert listed['fc.weight'] == ['10x64', 'decay', '0.0005']
    assert listed['group2.block0-3.alpha'] == ['64', '-']
    assert {name for name, (_, *decay) in listed.items() if decay != ['-']} == {
        'conv',
        'group0.block0-3.conv',
        'group1.block0.conv',
        'group1.block1-3.conv',
        'group2.block0.conv',
        'group2.block1-3.conv',
        'fc.weight',
    }


def test_learning_rate_falls_at_the_beginning_of_the_epochs():
    options = complete({'dataset': 'CIFAR10'})
    rates = [learning_rate(options, epoch, 1) for epoch in range(200)]
    assert rates[0] == rates[58] == 0.1
    falls = {60: 0.02, 119: 0.02, 120: 0.004, 159: 0.004, 160: 0.0008, 200: 0.0008}
    for epoch, rate in falls.items():
        assert rates[epoch - 1] == pytest.approx(rate)

"""Optimizers, weight decay, and the learning rate as a function of the position in the run."""

import math
import re
from functools import partial

import numpy as np
import torch

from lab.distributed import rank
from lab.models.registry import VERSION_1

# The settings of torch-residual-networks' comparison, and AdamW.
OPTIMIZERS = {
    'sgd': partial(torch.optim.SGD, momentum=0.9, fused=True),
    'nesterov': partial(torch.optim.SGD, momentum=0.9, nesterov=True, fused=True),
    'rmsprop': torch.optim.RMSprop,
    'adadelta': partial(torch.optim.Adadelta, rho=0.3),
    'adagrad': torch.optim.Adagrad,
    'adamw': torch.optim.AdamW,
}


def is_decayed(tensor, model='diracnet'):
    """Whether a parameter gets weight decay.

    Only tensors with more than one dimension get it, because alpha and beta would collapse to zero.
    In version 1 all parameters get it.
    """
    return tensor.ndim > 1 or model in VERSION_1


def make_optimizer(module, options):
    """The optimizer of options optim, lr and weight_decay for the parameters of a module."""
    model = options.get('model', 'diracnet')
    decayed = [p for p in module.parameters() if is_decayed(p, model)]
    others = [p for p in module.parameters() if not is_decayed(p, model)]
    groups = [{'params': decayed, 'weight_decay': options['weight_decay']}]
    if others:
        groups.append({'params': others, 'weight_decay': 0.0})
    name = options.get('optim', 'sgd')
    kwargs = {'lr': options['lr']}
    if name == 'adamw' and decayed[0].is_cuda:
        kwargs['fused'] = True
    if name in ('sgd', 'nesterov') and options.get('dtype') == 'half':
        # If the scaling of the loss skips the first step, the fused kernel continues with a
        # momentum that was never set (torch 2.14).
        kwargs['fused'] = False
    return OPTIMIZERS[name](groups, **kwargs)


def learning_rate(options, step, epoch_steps):
    """The learning rate at a step of the run, counted from 0, if an epoch has `epoch_steps`.

    It is a function of the position alone, so that runs resume exactly; torch's schedulers have
    state. When it falls, the optimizer keeps its momentum. (The original made a new optimizer,
    which reset the momentum.)
    """
    lr, warmup = options['lr'], options.get('warmup', 0)
    is_ramp = isinstance(warmup, str)
    n_warmup = warmup_steps(warmup, epoch_steps)
    if step < n_warmup:
        return lr * (step + 1) / n_warmup if is_ramp else lr / 100
    if options.get('schedule', 'step') == 'step':
        epoch = 1 + step // epoch_steps
        falls = sum(epoch >= fall for fall in options['epoch_step'])
        return lr * options['lr_decay_ratio'] ** falls
    done = (step - n_warmup) / (options['epochs'] * epoch_steps - n_warmup)
    if options['schedule'] == 'linear':
        return lr * (1 - done)
    return lr * (1 + math.cos(math.pi * done)) / 2


def warmup_steps(warmup, epoch_steps):
    """The steps that --warmup takes: 30, 'ramp:30' (both in steps) or 'ramp:5e' (in epochs)."""
    length = str(warmup).removeprefix('ramp:')
    if length.endswith('e'):
        return round(float(length.removesuffix('e')) * epoch_steps)
    return int(length)


def set_rates(options, optimizer, norm, train_pass):
    """Set what depends on the position in the training: the learning rate, the momentum of batch
    norm (a BatchNorm), and the random state of dropout."""
    epoch, step, steps = train_pass.epoch - 1, train_pass.step, len(train_pass.batches)
    rate = learning_rate(options, epoch * steps + step, steps)
    for group in optimizer.param_groups:
        group['lr'] = rate
    norm.prepare_step(step)
    if options.get('dropout'):
        position = (options['seed'], epoch, step, rank())
        torch.manual_seed(int(np.random.SeedSequence(position).generate_state(1)[0]))


def clip_gradients(module, optimizer, scaler, longest):
    """Scale all gradients together to a norm of at most `longest`. None: do nothing."""
    if longest:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(module.parameters(), longest)


def parameter_table(module, weight_decay, model='diracnet'):
    """Lines with name, shape and weight decay of all tensors; the last has the total size.

    Equal tensors of successive blocks share a line, with the name of the first and the number of
    the last: group0.block1-5.conv.
    """
    blocks = {}  # (name before the number of the block, name after it, shape, decay): numbers
    for name, tensor in module.named_parameters():
        before, number, after = re.fullmatch(r'(.*?(?:block|layer\d+\.))?(\d+)?(.*)', name).groups()
        shape = 'x'.join(map(str, tensor.shape))
        decay = f'decay {weight_decay:g}' if is_decayed(tensor, model) else '-'
        blocks.setdefault((before or '', after, shape, decay), []).append(number)
    rows = [
        (f'{before}{span(numbers)}{after}', shape, decay)
        for (before, after, shape, decay), numbers in blocks.items()
    ]
    widest = max(len(name) for name, _, _ in rows)
    total = sum(tensor.numel() for tensor in module.parameters())
    return [
        *(f'{name:{widest}}  {shape:>15}  {decay}' for name, shape, decay in rows),
        f'{total:,} parameters',
    ]


def span(numbers):
    """The first and the last of some numbers as a text; '' for [None]."""
    first, last = numbers[0], numbers[-1]
    if first == last:
        return first or ''
    return f'{first}-{last}'

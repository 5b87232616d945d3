"""Optimizers, weight decay, and the learning rate as a function of the position in the run."""

from functools import partial

import torch

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
    return OPTIMIZERS[options.get('optim', 'sgd')](groups, lr=options['lr'])


def learning_rate(options, epoch, step=0):
    """The learning rate at an epoch, counted from 1, and a step of the run, counted from 0.

    When it falls, the optimizer keeps its momentum. (The original made a new optimizer, which reset
    the momentum.)
    """
    if step < options.get('warmup', 0):
        return options['lr'] / 100
    falls = sum(epoch >= fall for fall in options['epoch_step'])
    return options['lr'] * options['lr_decay_ratio'] ** falls


def set_learning_rate(optimizer, rate):
    for group in optimizer.param_groups:
        group['lr'] = rate


def parameter_table(module, weight_decay, model='diracnet'):
    """Lines with name, shape and weight decay of every tensor; the last has the total size."""
    named = list(module.named_parameters())
    widest = max(len(name) for name, _ in named)
    lines = []
    for name, tensor in named:
        shape = 'x'.join(map(str, tensor.shape))
        decay = f'decay {weight_decay:g}' if is_decayed(tensor, model) else '-'
        lines.append(f'{name:{widest}}  {shape:>15}  {decay}')
    return [*lines, f'{sum(tensor.numel() for _, tensor in named):,} parameters']

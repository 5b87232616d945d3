"""A textbook network, to compare speed and numbers with."""

import torch
import torch.nn.functional as F


def textbook(inputs, params, mode):
    """The f of a DiracNet, layer by layer as in the paper's formula, with the delta as a tensor.

    It shares no code with diracnet.py. params comes from `with_deltas`; without alphas the
    network is the plain chain.
    """
    if params['conv'].shape[-1] == 7:  # the ImageNet form
        x = F.conv2d(inputs, params['conv'], stride=2, padding=3)
        x = F.max_pool2d(batch_norm(x, params, 'bn', mode), 3, 2, 1)
    else:
        x = F.conv2d(inputs, params['conv'], padding=1)
        x = F.relu(batch_norm(x, params, 'bn', mode))
    for name in [key.removesuffix('.conv') for key in params if key.endswith('.conv')]:
        if name.endswith('.block0') and name != 'group0.block0':
            x = F.max_pool2d(x, 2)
        x = F.conv2d(F.relu(x), effective_weight(params, name), padding=1)
        x = batch_norm(x, params, f'{name}.bn', mode)
    x = F.adaptive_avg_pool2d(F.relu(x), 1).flatten(1)
    return F.linear(x, params['fc.weight'], params['fc.bias'])


def batch_norm(x, params, name, mode):
    mean, var = params[f'{name}.running_mean'], params[f'{name}.running_var']
    weight, bias = params[f'{name}.weight'], params[f'{name}.bias']
    return F.batch_norm(x, mean, var, weight, bias, training=mode, momentum=0.1, eps=1e-5)


def effective_weight(params, name):
    weight = params[f'{name}.conv']
    if f'{name}.alpha' not in params:
        return weight
    alpha = params[f'{name}.alpha'].view(-1, 1, 1, 1)
    beta = params[f'{name}.beta'].view(-1, 1, 1, 1)
    return alpha * params[f'{name}.delta'] + beta * F.normalize(weight.flatten(1)).view_as(weight)


def with_deltas(params):
    """params plus, for `textbook`, the delta of each Dirac weight as NAME.delta."""
    deltas = {}
    for key in params:
        if key.endswith('.alpha'):
            name = key.removesuffix('.alpha')
            delta = torch.empty_like(params[f'{name}.conv'].detach())
            deltas[f'{name}.delta'] = torch.nn.init.dirac_(delta)
    return {**params, **deltas}


def textbook_step(params):
    """A function of (inputs, targets) that trains with SGD, one tensor at a time."""
    params = with_deltas(params)
    learned = [tensor for tensor in params.values() if tensor.requires_grad]
    groups = [
        {'params': [tensor for tensor in learned if tensor.ndim > 1], 'weight_decay': 5e-4},
        {'params': [tensor for tensor in learned if tensor.ndim <= 1]},
    ]
    optimizer = torch.optim.SGD(groups, lr=1e-3, momentum=0.9, foreach=False)

    def step(inputs, targets):
        optimizer.zero_grad()
        F.cross_entropy(textbook(inputs, params, True), targets).backward()
        optimizer.step()

    return step

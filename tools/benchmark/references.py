"""What the speed of the code is measured against, and its numbers are checked with: the network as the formula reads, and convolutions alone."""

import torch
import torch.nn.functional as F


def textbook(inputs, params, mode):
    """f of a DiracNet, layer by layer as the paper has it; nothing in place, the delta a tensor. Without alphas, of the plain chain."""

    def bn(x, name):
        return F.batch_norm(
            x,
            params[name + '.running_mean'],
            params[name + '.running_var'],
            params[name + '.weight'],
            params[name + '.bias'],
            training=mode,
            momentum=0.1,
            eps=1e-5,
        )

    if params['conv'].shape[-1] == 7:  # ImageNet's
        x = F.max_pool2d(bn(F.conv2d(inputs, params['conv'], stride=2, padding=3), 'bn'), 3, 2, 1)
    else:
        x = F.relu(bn(F.conv2d(inputs, params['conv'], padding=1), 'bn'))
    for name in [key.removesuffix('.conv') for key in params if key.endswith('.conv')]:
        if name.endswith('.block0') and name != 'group0.block0':
            x = F.max_pool2d(x, 2)
        weight = params[name + '.conv']
        if name + '.alpha' in params:
            alpha, beta = (params[f'{name}.{part}'].view(-1, 1, 1, 1) for part in ('alpha', 'beta'))
            weight = alpha * params[name + '.delta'] + beta * F.normalize(
                weight.flatten(1)
            ).view_as(weight)
        x = bn(F.conv2d(F.relu(x), weight, padding=1), name + '.bn')
    return F.linear(
        F.adaptive_avg_pool2d(F.relu(x), 1).flatten(1), params['fc.weight'], params['fc.bias']
    )


def with_deltas(params):
    """A network's params and, for `textbook`, the deltas of its Dirac weights."""
    deltas = {
        key.replace('.alpha', '.delta'): torch.nn.init.dirac_(
            torch.empty_like(params[key.replace('.alpha', '.conv')].detach())
        )
        for key in params
        if key.endswith('.alpha')
    }
    return {**params, **deltas}


def textbook_optimizer(params, lr=1e-3, weight_decay=5e-4):
    """SGD over single tensors."""
    learned = [tensor for tensor in params.values() if tensor.requires_grad]
    return torch.optim.SGD(
        [
            {'params': [p for p in learned if p.ndim > 1], 'weight_decay': weight_decay},
            {'params': [p for p in learned if p.ndim <= 1]},
        ],
        lr=lr,
        momentum=0.9,
        foreach=False,
    )


def floor(architecture, inputs):
    """A function that runs the network's convolutions alone, forward and backward, channels_last, each on an input of its own."""
    size, cases = (
        inputs.shape[2],
        [(architecture.in_channels, architecture.widths[0], inputs.shape[2])],
    )
    for g, group in enumerate(architecture.groups):
        size = size // 2 if g else size
        cases += [(inside, out, size) for _, inside, out in group]
    tensors = [
        (
            torch.randn(len(inputs), inside, s, s)
            .contiguous(memory_format=torch.channels_last)
            .requires_grad_(number > 0),
            torch.randn(out, inside, 3, 3)
            .contiguous(memory_format=torch.channels_last)
            .requires_grad_(),
        )
        for number, (inside, out, s) in enumerate(cases)
    ]

    def step():
        outputs = [F.conv2d(x, weight, padding=1) for x, weight in tensors]
        for x, weight in reversed(tensors):
            y = outputs.pop()
            torch.autograd.grad(y, (x, weight) if x.requires_grad else weight, y)

    return step

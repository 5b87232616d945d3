"""What the speed of the code is measured against, and its numbers are checked with: the network as the formula reads, and convolutions alone."""
from functools import partial

import torch
import torch.nn.functional as F

import diracnet


def textbook(layout, inputs, params, mode):
    """f of a DiracNet, layer by layer as the paper has it; nothing in place, the delta a tensor."""
    def bn(x, name):
        return F.batch_norm(x, params[name + '.running_mean'], params[name + '.running_var'], params[name + '.weight'],
                            params[name + '.bias'], training=mode, momentum=0.1, eps=1e-5)
    if layout.form == 'imagenet':
        x = F.max_pool2d(bn(F.conv2d(inputs, params['conv'], stride=2, padding=3), 'bn'), 3, 2, 1)
    else:
        x = F.relu(bn(F.conv2d(inputs, params['conv'], padding=1), 'bn'))
    for g, group in enumerate(layout.groups):
        if g > 0:
            x = F.max_pool2d(x, 2)
        for name, _, _ in group:
            weight, alpha, beta = (params[f'{name}.{part}'] for part in ('conv', 'alpha', 'beta'))
            normalized = F.normalize(weight.flatten(1)).view_as(weight)
            dirac = alpha.view(-1, 1, 1, 1) * params[name + '.delta'] + beta.view(-1, 1, 1, 1) * normalized
            x = bn(F.conv2d(F.relu(x), dirac, padding=1), name + '.bn')
    return F.linear(F.adaptive_avg_pool2d(F.relu(x), 1).flatten(1), params['fc.weight'], params['fc.bias'])


def define_textbook(*args, **kwargs):
    """define_diracnet with `textbook` for its f; params has the deltas, too."""
    f, params = diracnet.define_diracnet(*args, **kwargs)
    for name in [key.removesuffix('.alpha') for key in params if key.endswith('.alpha')]:
        params[name + '.delta'] = torch.nn.init.dirac_(torch.empty_like(params[name + '.conv'].detach()))
    return partial(textbook, *f.args), params


def textbook_optimizer(params, lr=1e-3, weight_decay=5e-4):
    """SGD over single tensors."""
    learned = [tensor for tensor in params.values() if tensor.requires_grad]
    return torch.optim.SGD([{'params': [p for p in learned if p.ndim > 1], 'weight_decay': weight_decay},
                            {'params': [p for p in learned if p.ndim <= 1]}], lr=lr, momentum=0.9, foreach=False)


def floor(layout, inputs):
    """A function that runs the network's convolutions alone, forward and backward, channels_last, each on an input of its own."""
    size, cases = inputs.shape[2], [(layout.in_channels, layout.widths[0], inputs.shape[2])]
    for g, group in enumerate(layout.groups):
        size = size // 2 if g else size
        cases += [(inside, out, size) for _, inside, out in group]
    tensors = [(torch.randn(len(inputs), inside, s, s).contiguous(memory_format=torch.channels_last).requires_grad_(number > 0),
                torch.randn(out, inside, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_())
               for number, (inside, out, s) in enumerate(cases)]

    def step():
        outputs = [F.conv2d(x, weight, padding=1) for x, weight in tensors]
        for x, weight in reversed(tensors):
            y = outputs.pop()
            torch.autograd.grad(y, (x, weight) if x.requires_grad else weight, y)
    return step

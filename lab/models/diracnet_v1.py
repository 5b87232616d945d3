"""DiracNets, version 1 (2017): with NCReLU, and one alpha and one beta for each layer.

    f, params = define_diracnet_v1(depth=18, width=0.75, dataset='ImageNet')
    folded = DiracNetV1.from_state_dict(fold_v1(params))

NCReLU keeps what ReLU throws away, so that a convolution sees twice the channels and the identity can pass both signs. The keys of
params are those of `diracnet.define_diracnet`.
"""

from collections import OrderedDict
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from diracnet import (
    BN_EPS,
    BN_MOMENTUM,
    DiracNet,
    bn_params,
    conv_params,
    flatten,
    infer_architecture,
    linear_params,
    make_architecture,
)

ALPHA, BETA, STD = 5.0, 1e-3, 0.1


def ncrelu(x):
    """The positive and the negative part, one behind the other: (N, C, ...) to (N, 2 C, ...)."""
    return torch.cat([x.clamp(min=0), x.clamp(max=0)], 1)


def tiled_delta(weight):
    """The delta of version 1, of the shape of weight (out, in, *kernel): with n = min(in, out), the n x n identity repeated
    max(out // in, 1) times along out and max(in // out, 1) times along in, at the kernel's center."""
    rows, columns = weight.shape[:2]
    eye = torch.eye(min(rows, columns), dtype=weight.dtype, device=weight.device).repeat(
        max(rows // columns, 1), max(columns // rows, 1)
    )
    delta = torch.zeros_like(weight)
    center = tuple(size // 2 for size in weight.shape[2:])
    delta[(slice(eye.shape[0]), slice(eye.shape[1]), *center)] = eye
    return delta


def dirac_weight_v1(weight, alpha, beta):
    """alpha * delta + beta * weight with every filter divided by its norm; alpha and beta have one element."""
    return alpha * tiled_delta(weight) + beta * F.normalize(weight.flatten(1), dim=1).view_as(
        weight
    )


def block_weight(params, prefix):
    """The weight that a block convolves with: Dirac where there are scales, else as it is."""
    if f'{prefix}alpha' not in params:
        return params[f'{prefix}conv']
    return dirac_weight_v1(*(params[f'{prefix}{part}'] for part in ('conv', 'alpha', 'beta')))


def chain_v1(architecture, inputs, params, mode, norm=F.batch_norm):
    """The function of a DiracNet of version 1 (and of its plain chain): (N, in_channels, H, W) to logits (N, num_classes)."""

    def bn(x, name):
        weight, bias, mean, var = (
            params[f'{name}.{part}'] for part in ('weight', 'bias', 'running_mean', 'running_var')
        )
        return norm(x, mean, var, weight, bias, training=mode, momentum=BN_MOMENTUM, eps=BN_EPS)

    if architecture.form == 'imagenet':
        x = F.max_pool2d(bn(F.conv2d(inputs, params['conv'], stride=2, padding=3), 'bn'), 3, 2, 1)
    else:
        x = bn(F.conv2d(inputs, params['conv'], padding=1), 'bn')
    for g, group in enumerate(architecture.groups):
        if g:
            x = F.max_pool2d(x, 2)
        for name, _, _ in group:
            x = bn(F.conv2d(ncrelu(x), block_weight(params, f'{name}.'), padding=1), f'{name}.bn')
    return F.linear(
        F.adaptive_avg_pool2d(F.relu(x), 1).flatten(1), params['fc.weight'], params['fc.bias']
    )


def define_chain_v1(shape, dirac):
    tree = {
        'conv': conv_params(
            shape.in_channels, shape.widths[0], 7 if shape.form == 'imagenet' else 3
        ),
        'bn': bn_params(shape.widths[0]),
    }
    for group in shape.groups:
        for name, in_channels, out_channels in group:
            tree[name] = (
                {
                    'conv': torch.randn(out_channels, 2 * in_channels, 3, 3) * STD,
                    'alpha': torch.full((1,), ALPHA),
                    'beta': torch.full((1,), BETA),
                }
                if dirac
                else {'conv': conv_params(2 * in_channels, out_channels, 3)}
            )
            tree[name]['bn'] = bn_params(out_channels)
    tree['fc'] = linear_params(shape.widths[-1], shape.num_classes)
    return partial(chain_v1, shape), flatten(tree)


def define_diracnet_v1(depth, width, dataset, *, num_classes=None, in_channels=None):
    """f and params of DiracNet-DEPTH-WIDTH, version 1; arguments, returns and errors are those of `diracnet.define_diracnet`.

    Every parameter is to have weight decay.
    """
    return define_chain_v1(
        make_architecture(depth, width, dataset, num_classes, in_channels), dirac=True
    )


# --- folding ---------------------------------------------------------------------------------------------------------


def infer_architecture_v1(params):
    """The Architecture of a DiracNet of version 1 (or its plain chain), read off its parameters or its folded state dict. Raises ValueError."""
    folded = 'conv.weight' in params
    as_v2 = {
        f'features.{key}' if folded and not key.startswith('fc') else key: tensor[:, ::2]
        if tensor.ndim == 4 and key.startswith('group')
        else tensor
        for key, tensor in params.items()
    }
    return infer_architecture(as_v2)


@torch.no_grad()
def fold_v1(params):
    """Dirac weights and batch norms folded into plain convolutions: the state dict of DiracNetV1. Raises ValueError."""
    folded = OrderedDict()
    for name in [
        '',
        *(name + '.' for group in infer_architecture_v1(params).groups for name, _, _ in group),
    ]:
        try:
            weight = block_weight(
                {
                    key: params[key].double()
                    for key in (f'{name}{part}' for part in ('conv', 'alpha', 'beta'))
                    if key in params
                },
                name,
            )
            mean, var, scale, shift = (
                params[f'{name}bn.{part}'].double()
                for part in ('running_mean', 'running_var', 'weight', 'bias')
            )
        except KeyError as error:
            raise ValueError(
                f'not the parameters of a DiracNet: {error.args[0]} is missing'
            ) from None
        for key, tensor in zip(
            ('weight', 'bias'), fuse_conv_bn_weights(weight, None, mean, var, BN_EPS, scale, shift)
        ):
            folded[f'{name}conv.{key}'] = tensor.detach().to(params[f'{name}conv'].dtype)
    for key in ('fc.weight', 'fc.bias'):
        folded[key] = params[key].detach().clone()
    return folded


class NCReLU(nn.Module):
    def forward(self, x):
        return ncrelu(x)


class DiracNetV1(DiracNet):
    """A folded DiracNet of version 1: a chain of convolutions (with bias) and NCReLUs. Arguments and errors are those of `DiracNet`;
    `load_state_dict(fold_v1(params))` brings trained weights."""

    _infer = staticmethod(infer_architecture_v1)

    def _build(self, architecture):
        self.architecture = architecture
        if architecture.form == 'imagenet':
            self.conv = nn.Conv2d(
                architecture.in_channels, architecture.widths[0], 7, stride=2, padding=3
            )
            self.max_pool0 = nn.MaxPool2d(3, 2, 1)
        else:
            self.conv = nn.Conv2d(architecture.in_channels, architecture.widths[0], 3, padding=1)
        for g, group in enumerate(architecture.groups):
            if g:
                self.add_module(f'max_pool{g}', nn.MaxPool2d(2))
            self.add_module(
                f'group{g}',
                nn.Sequential(
                    OrderedDict(
                        (
                            name.split('.')[1],
                            nn.Sequential(
                                OrderedDict(
                                    ncrelu=NCReLU(), conv=nn.Conv2d(2 * inside, out, 3, padding=1)
                                )
                            ),
                        )
                        for name, inside, out in group
                    )
                ),
            )
        self.relu = nn.ReLU(inplace=True)
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.view = nn.Flatten()
        self.fc = nn.Linear(architecture.widths[-1], architecture.num_classes)

    def forward(self, inputs):
        for part in self.children():
            inputs = part(inputs)
        return inputs

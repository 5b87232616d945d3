"""DiracNets, version 1 (2017): NCReLU, and one alpha and one beta per layer.

    f, params = define_diracnet_v1(depth=18, width=0.75, dataset='ImageNet')
    folded = DiracNetV1.from_state_dict(fold_v1(params))

NCReLU keeps the negative part that ReLU drops. A convolution therefore sees twice the channels,
and the identity passes on both signs. params has the keys of `diracnet.define_diracnet`.

Source: the first version of arXiv 1706.00388.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from diracnet import (
    DiracNet,
    ReLU,
    batch_norm,
    chain,
    fold_batch_norm,
    fold_chain,
    folded_layers,
)
from diracparams import chain_params, conv_params, initialize_scales, make_architecture

ALPHA, BETA, STD = 5.0, 1e-3, 0.1  # initial scales; initial standard deviation of the weights


# --- the network -----------------------------------------------------------------------------


def block_v1(x, params, name, mode, norm):
    """NCReLU -> Dirac convolution -> batch norm: (N, in, H, W) to (N, out, H, W). The convolution
    is an ordinary one if params has no alpha and beta."""
    x = block_conv(ncrelu(x), params, f'{name}.')
    return batch_norm(x, params, f'{name}.bn', mode, norm)


def ncrelu(x):
    """Concatenate the positive and the negative part: (N, C, ...) to (N, 2 C, ...)."""
    return torch.cat([x.clamp(min=0), x.clamp(max=0)], 1)


def block_conv(x, params, prefix):
    """The convolution of a block, (N, 2 C, H, W) to (N, out, H, W)."""
    if f'{prefix}alpha' not in params or not is_autocast(x.device.type):
        return F.conv2d(x, block_weight(params, prefix), padding=1)
    # In 16 bits, 5 times the identity would absorb 0.001 times the rest: add them in float.
    normalized = params[f'{prefix}beta'] * normalize_filters(params[f'{prefix}conv'])
    rest = F.conv2d(x, normalized, padding=1).float()
    return rest + params[f'{prefix}alpha'] * tiled_identity(x, len(normalized)).float()


def tiled_identity(x, out):
    """The convolution of x, (N, in, H, W), with `tiled_delta`: (N, out, H, W)."""
    inside = x.shape[1]
    n = min(inside, out)
    x = x[:, : n * (inside // n)].unflatten(1, (-1, n)).sum(1).repeat(1, out // n, 1, 1)
    return F.pad(x, (0, 0, 0, 0, 0, out - x.shape[1]))


def is_autocast(device):
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def block_weight(params, prefix):
    """The effective weight of PREFIXconv: a Dirac weight if there is an alpha."""
    weight = params[f'{prefix}conv']
    if f'{prefix}alpha' in params:
        weight = dirac_weight_v1(weight, params[f'{prefix}alpha'], params[f'{prefix}beta'])
    return weight


def dirac_weight_v1(weight, alpha, beta):
    """alpha * delta + beta * (weight with each filter divided by its l2 norm).

    weight: (out, in, *kernel); alpha and beta: (1,). Returns the shape of weight.
    """
    return alpha * tiled_delta(weight) + beta * normalize_filters(weight)


def normalize_filters(weight):
    return F.normalize(weight.flatten(1), dim=1).view_as(weight)


def tiled_delta(weight):
    """The delta of version 1, with the shape, dtype and device of weight, (out, in, *kernel).

    With n = min(in, out), it repeats the n x n identity max(out // in, 1) times along out and
    max(in // out, 1) times along in, at the central tap.
    """
    out, inside = weight.shape[:2]
    eye = torch.eye(min(out, inside), dtype=weight.dtype, device=weight.device)
    eye = eye.repeat(max(out // inside, 1), max(inside // out, 1))
    delta = torch.zeros_like(weight)
    center = tuple(size // 2 for size in weight.shape[2:])
    delta[(slice(eye.shape[0]), slice(eye.shape[1]), *center)] = eye
    return delta


# --- its definition --------------------------------------------------------------------------


def define_diracnet_v1(depth, width, dataset, *, bn_init='paper', alpha=None, beta=None, **choices):
    """DiracNet-DEPTH-WIDTH, version 1; arguments, returns and errors as for `define_diracnet`.

    Without alpha and beta they are 5 and 0.001, whatever bn_init is. The paper applied weight
    decay to all parameters.
    """
    architecture = make_architecture(depth, width, dataset, **choices)
    params = chain_params(architecture, dirac_conv_params)
    initialize_scales(params, architecture.depth, bn_init, alpha, beta)
    return partial(chain, architecture, block=block_v1), params


def plain_conv_params(in_channels, out_channels):
    return {'conv': conv_params(2 * in_channels, out_channels, 3)}  # NCReLU doubles the channels


def dirac_conv_params(in_channels, out_channels):
    weight = torch.empty(out_channels, 2 * in_channels, 3, 3)
    return {
        # A meta tensor has no values, and torch would import for a second to draw none.
        'conv': weight if weight.is_meta else weight.normal_() * STD,
        'alpha': torch.full((1,), ALPHA),
        'beta': torch.full((1,), BETA),
    }


# --- the folded network ----------------------------------------------------------------------


def fold_v1(params):
    """Fold Dirac weights and batch norms into the weights and biases of plain convolutions.

    Args:
        params: flat dict of a DiracNet of version 1 or of its plain chain.

    Returns:
        A state dict of `DiracNetV1`. The tensors are new, with the device and dtype of params;
        they are computed in double precision.

    Raises:
        ValueError: a tensor is missing or unknown, or a running variance is negative or NaN.
    """

    def folded_conv(params, prefix):
        return fold_batch_norm(block_weight(params, prefix), params, f'{prefix}bn')

    return fold_chain(params, folded_conv, ('conv', 'alpha', 'beta', 'bn', 'fc'), DiracNetV1.prefix)


class DiracNetV1(DiracNet):
    """A folded DiracNet of version 1: a chain of convolutions with bias and NCReLUs.

    Arguments and errors are those of `DiracNet`. The weights are random until
    `load_state_dict(fold_v1(params))` loads trained ones.
    """

    prefix = ''

    def __init__(self, depth, width=1, dataset='ImageNet', **choices):
        nn.Module.__init__(self)
        self.architecture = make_architecture(depth, width, dataset, **choices)
        # NCReLU doubles the channels.
        for name, layer in folded_layers(self.architecture, 'ncrelu', NCReLU, 2).items():
            self.add_module(name, layer)
        self.relu = ReLU(inplace=True)
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.view = nn.Flatten()
        self.fc = nn.Linear(self.architecture.widths[-1], self.architecture.num_classes)

    def forward(self, inputs):
        x = inputs
        for part in self.children():
            x = part(x)
        return x


class NCReLU(nn.Module):
    """`ncrelu` as a module."""

    def forward(self, x):
        return ncrelu(x)

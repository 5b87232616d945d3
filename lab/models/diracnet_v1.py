"""DiracNets, version 1 (2017): NCReLU, and one alpha and one beta per layer.

    f, params = define_diracnet_v1(depth=18, width=0.75, dataset='ImageNet')
    folded = DiracNetV1.from_state_dict(fold_v1(params))

NCReLU keeps the negative part that ReLU drops. A convolution therefore sees twice the channels,
and the identity passes on both signs. params has the keys of `diracnet.define_diracnet`.

Source: the first version of arXiv 1706.00388.
"""

from collections import OrderedDict
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from diracnet import (
    DiracNet,
    batch_norm,
    chain_params,
    classify,
    conv_params,
    fitting_architecture,
    fold_batch_norm,
    initialize_scales,
    is_dirac,
    make_architecture,
    stem,
)

ALPHA, BETA, STD = 5.0, 1e-3, 0.1  # initial scales; initial standard deviation of the weights


# --- the network -----------------------------------------------------------------------------


def chain_v1(architecture, inputs, params, mode, norm=F.batch_norm):
    """A DiracNet of version 1 as a function, or its plain chain if params has no alpha or beta.

    Arguments and returns are those of `diracnet.chain`.
    """
    x = stem(architecture, inputs, params, mode, norm)
    for g, group in enumerate(architecture.groups):
        if g > 0:
            x = F.max_pool2d(x, 2)  # H and W halve
        for name, _, _ in group:
            x = ncrelu(x)  # C doubles
            x = block_conv(x, params, f'{name}.')
            x = batch_norm(x, params, f'{name}.bn', mode, norm)
    return classify(x, params)


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


def define_diracnet_v1(
    depth,
    width,
    dataset,
    *,
    num_classes=None,
    in_channels=None,
    form=None,
    bn_init='paper',
    alpha=None,
    beta=None,
):
    """DiracNet-DEPTH-WIDTH, version 1; arguments, returns and errors as for `define_diracnet`.

    Without alpha and beta they are 5 and 0.001, whatever bn_init is. The paper applied weight
    decay to all parameters.
    """
    architecture = make_architecture(depth, width, dataset, num_classes, in_channels, form)
    f, params = define_chain_v1(architecture)
    return f, initialize_scales(params, architecture.depth, bn_init, alpha, beta)


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


def define_chain_v1(architecture, block_params=dirac_conv_params):
    """f, params of a chain, as `diracnet.define_chain`, for version 1."""
    return partial(chain_v1, architecture), chain_params(architecture, block_params)


# --- the folded network ----------------------------------------------------------------------


@torch.no_grad()
def fold_v1(params):
    """Fold Dirac weights and batch norms into the weights and biases of plain convolutions.

    Args:
        params: flat dict of a DiracNet of version 1 or of its plain chain.

    Returns:
        A state dict of `DiracNetV1`. The tensors are new, with the device and dtype of params;
        they are computed in double precision.

    Raises:
        ValueError: these are not the parameters of such a network.
    """
    architecture = fitting_architecture(params, block_kind(params))
    blocks = [name for group in architecture.groups for name, _, _ in group]
    in_double = {key: tensor.double() for key, tensor in params.items()}
    folded = OrderedDict()
    for prefix in ('', *(f'{name}.' for name in blocks)):
        weight = block_weight(in_double, prefix)
        weight, bias = fold_batch_norm(weight, params, f'{prefix}bn')
        folded[f'{prefix}conv.weight'] = weight
        folded[f'{prefix}conv.bias'] = bias
    for key in ('fc.weight', 'fc.bias'):
        folded[key] = params[key].detach().clone()
    return folded


class DiracNetV1(DiracNet):
    """A folded DiracNet of version 1: a chain of convolutions with bias and NCReLUs.

    Arguments and errors are those of `DiracNet`. The weights are random until
    `load_state_dict(fold_v1(params))` loads trained ones.
    """

    @staticmethod
    def _infer_architecture(state_dict):
        return infer_architecture_v1(state_dict)

    def _build(self, architecture):
        self.architecture = architecture
        in_channels, stem_width = architecture.in_channels, architecture.widths[0]
        if architecture.form == 'imagenet':
            self.conv = nn.Conv2d(in_channels, stem_width, 7, stride=2, padding=3)
            self.max_pool0 = nn.MaxPool2d(3, 2, 1)
        else:
            self.conv = nn.Conv2d(in_channels, stem_width, 3, padding=1)
        for g, blocks in enumerate(architecture.groups):
            if g > 0:
                self.add_module(f'max_pool{g}', nn.MaxPool2d(2))
            group = OrderedDict()
            for name, inside, out in blocks:
                conv = nn.Conv2d(2 * inside, out, 3, padding=1)
                block = nn.Sequential(OrderedDict(ncrelu=NCReLU(), conv=conv))
                group[name.removeprefix(f'group{g}.')] = block
            self.add_module(f'group{g}', nn.Sequential(group))
        self.relu = nn.ReLU(inplace=True)
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.view = nn.Flatten()
        self.fc = nn.Linear(architecture.widths[-1], architecture.num_classes)

    def forward(self, inputs):
        x = inputs
        for part in self.children():
            x = part(x)
        return x


class NCReLU(nn.Module):
    """`ncrelu` as a module."""

    def forward(self, x):
        return ncrelu(x)


# --- reading an architecture off tensors -----------------------------------------------------


def infer_architecture_v1(params):
    """The Architecture of a DiracNet of version 1 or its plain chain.

    Args:
        params: flat dict of params or folded state dict.

    Raises:
        ValueError: these are not the parameters of such a network.
    """
    if is_folded_v1(params):
        return fitting_architecture(params, plain_conv_params, '')
    return fitting_architecture(params, block_kind(params))


def is_folded_v1(params):
    """Whether a dict of tensors has names of this folded network."""
    return 'conv.weight' in params or 'group0.block0.conv.weight' in params


def block_kind(params):
    """The function that makes the params of a block: Dirac or plain."""
    return dirac_conv_params if is_dirac(params) else plain_conv_params

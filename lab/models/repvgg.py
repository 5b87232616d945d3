"""RepVGG: blocks of three branches that fold into one convolution, in the form of our chain.

    f, params = define_repvgg(depth=34, width=2, dataset='CIFAR10')
    folded = DiracNet.from_state_dict(fold_repvgg(params))

A block's convolution is the sum of a 3x3 convolution with batch norm, a 1x1 convolution with batch
norm and, if the number of channels stays, a batch norm alone. The third branch is the identity
that a Dirac weight has inside.

Source: Ding et al., RepVGG: Making VGG-style ConvNets Great Again, arXiv 2101.03697. Departures,
for a fair comparison: stem, pools and channels are those of `diracnet.chain`, where RepVGG has
blocks with stride 2, and convolutions begin with the same Kaiming normal weights.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from diracnet import DiracNet, batch_norm, chain, fold_batch_norm, fold_chain, relu
from diracparams import bn_params, chain_params, conv_params, make_architecture


def repvgg_block(x, params, name, mode, norm):
    """ReLU -> the sum of the branches: (N, in, H, W) to (N, out, H, W)."""
    x = relu(x)
    y = F.conv2d(x, params[f'{name}.conv'], padding=1)
    y = batch_norm(y, params, f'{name}.bn', mode, norm)
    z = F.conv2d(x, params[f'{name}.conv1x1'])
    y = y + batch_norm(z, params, f'{name}.bn1x1', mode, norm)
    if f'{name}.bn_identity.weight' in params:
        y = y + batch_norm(x, params, f'{name}.bn_identity', mode, norm)
    return y


def branch_params(in_channels, out_channels):
    """The params of a block, without the first batch norm, which every chain has."""
    params = {
        'conv': conv_params(in_channels, out_channels, 3),
        'conv1x1': conv_params(in_channels, out_channels, 1),
        'bn1x1': bn_params(out_channels),
    }
    if in_channels == out_channels:
        params['bn_identity'] = bn_params(out_channels)
    return params


def define_repvgg(depth, width, dataset, *, widen_early=False, **choices):
    """RepVGG; arguments, returns and errors are those of `diracnet.define_diracnet`.

    Batch norms begin with weight 1 and bias 0, as in the paper's code.
    """
    architecture = make_architecture(depth, width, dataset, widen_early=widen_early, **choices)
    params = chain_params(architecture, branch_params)
    for key, tensor in params.items():
        if key.endswith('.weight') and tensor.ndim == 1:
            nn.init.ones_(tensor)
    return partial(chain, architecture, block=repvgg_block), params


# --- the folded network ----------------------------------------------------------------------


def fold_repvgg(params):
    """Fold each block's branches into one convolution.

    Args:
        params: flat dict of a RepVGG.

    Returns:
        A state dict of `diracnet.DiracNet`. The tensors are new, with the device and dtype of
        params; they are computed in double precision.

    Raises:
        ValueError: a tensor is missing or unknown, or a running variance is negative or NaN.
    """

    def folded_conv(params, prefix):
        folded = [fold_batch_norm(*branch) for branch in branches(params, prefix)]
        return [sum(tensors) for tensors in zip(*folded)]

    known = ('conv', 'bn', 'conv1x1', 'bn1x1', 'bn_identity', 'fc')
    return fold_chain(params, folded_conv, known, DiracNet.prefix)


def branches(params, prefix):
    """The branches of PREFIXconv as the arguments of `fold_batch_norm`, with kernels of one size.

    The 1x1 kernel and the identity lie at the central tap of a 3x3 kernel.
    """
    kernel = params[f'{prefix}conv']
    parts = [(kernel, params, f'{prefix}bn')]
    if f'{prefix}conv1x1' in params:
        parts.append((F.pad(params[f'{prefix}conv1x1'], (1, 1, 1, 1)), params, f'{prefix}bn1x1'))
    if f'{prefix}bn_identity.weight' in params:
        identity = nn.init.dirac_(torch.empty_like(kernel))
        parts.append((identity, params, f'{prefix}bn_identity'))
    return parts

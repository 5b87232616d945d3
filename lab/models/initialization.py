"""Initializations of convolutions, by the names that --init takes.

Each fills a weight (out, in, *kernel) in place.
"""

from functools import partial

import torch
from torch import nn


def delta_orthogonal(weight):
    """An orthogonal matrix (out, in) at the central tap, and zeros elsewhere.

    The convolution is then an orthogonal map of each pixel's channels, and keeps lengths and
    angles. If out != in, the rows or the columns of the matrix are orthonormal, whichever are
    fewer. Source: Xiao et al. 2018, arXiv 1806.05393.
    """
    center = tuple(size // 2 for size in weight.shape[2:])
    nn.init.zeros_(weight)
    nn.init.orthogonal_(weight[(..., *center)])


def looks_linear(weight):
    """[W, W] for the two halves of NCReLU's channels, with a delta-orthogonal W.

    NCReLU makes max(x, 0) and min(x, 0) of x, whose sum is x. Together with the convolution it is
    therefore linear, until training makes the halves differ. (The paper has [W, -W], because the
    second half of its CReLU is max(-x, 0).) W is orthogonal in the paper; here it is
    `delta_orthogonal`, because a chain of such convolutions is an orthogonal map at any depth.
    Filters that are orthonormal as vectors (in x kernel) do not give that. Batch norm makes the
    scale of W irrelevant.

    Source: Balduzzi et al. 2017, arXiv 1702.08591.
    """
    half = weight.shape[1] // 2
    delta_orthogonal(weight[:, :half])
    weight[:, half:] = weight[:, :half]


INITS = {
    'kaiming': partial(nn.init.kaiming_normal_, nonlinearity='relu'),
    'xavier': nn.init.xavier_normal_,
    'normal': partial(nn.init.normal_, std=0.01),
    'orthogonal': nn.init.orthogonal_,
    'delta-orthogonal': delta_orthogonal,
    'looks-linear': looks_linear,
}
STEMS = ('conv', 'conv1.weight')  # of chains, and of residual networks


@torch.no_grad()
def initialize_convolutions(params, init):
    """Initialize the weights of all convolutions in a flat dict of params, in place.

    Args:
        init: a name in INITS. looks-linear needs a chain with NCReLU. With it and with
            delta-orthogonal the stem is orthogonal: no NCReLU precedes it, and a central tap alone
            would make all its channels multiples of the same few of an image.

    Raises:
        ValueError: an unknown name.
    """
    if init not in INITS:
        raise ValueError(f'init {init!r} is unknown: choose from {", ".join(INITS)}')
    for key, tensor in params.items():
        if tensor.ndim == 4:
            only_orthogonal = key in STEMS and init in ('delta-orthogonal', 'looks-linear')
            fill = nn.init.orthogonal_ if only_orthogonal else INITS[init]
            fill(tensor)

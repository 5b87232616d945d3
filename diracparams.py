"""Which DiracNets there are, and the parameters that they start from.

`diracnet.py` defines the networks themselves. This file needs torch and diracconv.py alone.
"""

import itertools
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diracconv import ALPHA, BETA

Params = dict[str, Tensor]  # flat, with dotted keys

# --- architectures ---------------------------------------------------------------------------

# What each data set determines: the form of the network, the channels of an image, the number of
# classes.
DATASETS = {
    'digits': ('cifar', 1, 10),
    'FashionMNIST': ('cifar', 1, 10),
    'CIFAR10': ('cifar', 3, 10),
    'CIFAR100': ('cifar', 3, 100),
    'SVHN': ('cifar', 3, 10),
    'ImageNet': ('imagenet', 3, 1000),
    'folder': ('imagenet', 3, None),  # a folder of images: pass num_classes; form='cifar' if small
}
BASE_WIDTHS = {'cifar': (16, 32, 64), 'imagenet': (64, 128, 256, 512)}
# Blocks in each group of a ResNet of this depth; the groups of a DiracNet have twice as many.
IMAGENET_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


@dataclass(frozen=True)
class Architecture:
    """All that determines the shapes of a network's parameters."""

    form: str  # 'cifar': 3x3 stem and three groups; 'imagenet': 7x7 stem and four groups
    depth: int  # counted as that of a Wide ResNet with as many blocks
    width: float
    in_channels: int
    num_classes: int
    widen_early: bool = False  # a departure: each pool sees the channels of the group after it

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each group."""
        return tuple(int(base * self.width) for base in BASE_WIDTHS[self.form])

    @property
    def groups(self) -> list[list[tuple[str, int, int]]]:
        """For each group a list of its blocks: (name, in_channels, out_channels)."""
        counts = IMAGENET_BLOCKS.get(self.depth)
        if self.form == 'cifar':
            counts = [(self.depth - 4) // 6] * 3
        inside = (self.widths[0], *self.widths)
        groups = [
            [(inside[g], out)] + [(out, out)] * (2 * count - 1)
            for g, (count, out) in enumerate(zip(counts, self.widths))
        ]
        if self.widen_early:
            for before, after in itertools.pairwise(groups):
                before.append(after.pop(0))
        return [
            [(f'group{g}.block{b}', *channels) for b, channels in enumerate(group)]
            for g, group in enumerate(groups)
        ]


def make_architecture(
    depth: int,
    width: float,
    dataset: str,
    num_classes: int | None = None,
    in_channels: int | None = None,
    form: str | None = None,
    widen_early: bool = False,
) -> Architecture:
    """The Architecture for these choices; the data set determines what is None.

    Raises:
        ValueError: there is no such network; the message says what is possible.
    """
    check(dataset in DATASETS, f'unknown dataset {dataset!r}: choose from {", ".join(DATASETS)}')
    own = DATASETS[dataset]
    given = (form, in_channels, num_classes)
    form, channels, classes = (b if a is None else a for a, b in zip(given, own))
    check(form in BASE_WIDTHS, f'form {form!r} is unknown: choose from {", ".join(BASE_WIDTHS)}')
    check(classes is not None, f'{dataset} has one class per folder: pass num_classes')
    possible, forms = '6n + 4 with n >= 1 (10, 16, 22, 28, 34, ...)', 'form imagenet has 18 or 34'
    if form == 'cifar':
        check(depth >= 10 and depth % 6 == 4, f'depth {depth} is impossible: it must be {possible}')
    else:
        check(depth in IMAGENET_BLOCKS, f'depth {depth} is impossible for {dataset}: {forms}')
    channels_at_width_1 = BASE_WIDTHS[form][0]
    check(
        1 <= channels_at_width_1 * width < 2**40,
        f'width {width} is impossible: the first group has {channels_at_width_1} x width channels',
    )
    for name, number in (('num_classes', classes), ('in_channels', channels)):
        check(number == int(number) >= 1, f'{name} {number} is impossible: it must be at least 1')
    return Architecture(form, int(depth), width, int(channels), int(classes), widen_early)


def check(is_possible: bool, message: str) -> None:
    if not is_possible:
        raise ValueError(message)


def read_network(tensors: Params, prefix: str = '') -> dict:
    """What determines a chain, from its params or folded state dict: form, depth, width,
    in_channels, num_classes, widen_early.

    Only a few shapes are read. Whether the others fit is for the caller to see.

    Args:
        prefix: of the keys; 'features.' in a folded state dict.

    Raises:
        ValueError: these are not the tensors of a chain.
    """
    try:
        stem = next(
            tensors[key] for key in (f'{prefix}conv', f'{prefix}conv.weight') if key in tensors
        )
        num_classes, last_width = tensors['fc.weight'].shape
        block = re.compile(re.escape(prefix) + r'group(\d)\.block\d+\.conv(\.weight)?')
        counts = Counter(match[1] for match in map(block.fullmatch, tensors) if match)
        form = {3: 'cifar', 7: 'imagenet'}[stem.shape[-1]]
        width = last_width / BASE_WIDTHS[form][-1]  # widths are truncated; the last one the least
        return {
            'form': form,
            'depth': {4: 18, 8: 34}[counts['1']] if form == 'imagenet' else 3 * counts['1'] + 4,
            'width': int(width) if width.is_integer() else width,
            'in_channels': stem.shape[1],
            'num_classes': num_classes,
            'widen_early': counts['0'] % 2 == 1,
        }
    except (KeyError, StopIteration, AttributeError, IndexError, ValueError) as error:
        reason = error.args[0] if error.args else f'no {prefix}conv'
        raise ValueError(f'not the parameters of a DiracNet ({reason})') from None


# --- initial values --------------------------------------------------------------------------


def chain_params(architecture: Architecture, block_params: Callable[[int, int], Params]) -> Params:
    """The flat params of a chain; block_params(in_channels, out_channels) are a convolution's."""
    stem_width = architecture.widths[0]
    stem_size = 7 if architecture.form == 'imagenet' else 3
    tree = {
        'conv': conv_params(architecture.in_channels, stem_width, stem_size),
        'bn': bn_params(stem_width),
    }
    for group in architecture.groups:
        for name, inside, out in group:
            tree[name] = {**block_params(inside, out), 'bn': bn_params(out)}
    tree['fc'] = linear_params(architecture.widths[-1], architecture.num_classes)
    return flatten(tree)


def dirac_conv_params(in_channels: int, out_channels: int) -> Params:
    return {
        'conv': conv_params(in_channels, out_channels, 3),
        'alpha': torch.full((out_channels,), ALPHA),
        'beta': torch.full((out_channels,), BETA),
    }


def conv_params(in_channels: int, out_channels: int, kernel_size: int) -> Tensor:
    return kaiming_normal(torch.empty(out_channels, in_channels, kernel_size, kernel_size))


def kaiming_normal(weight: Tensor) -> Tensor:
    # A meta tensor has no values, and torch would import for a second to draw none.
    return weight if weight.is_meta else nn.init.kaiming_normal_(weight, nonlinearity='relu')


def bn_params(channels: int) -> Params:
    return {
        'weight': torch.rand(channels),
        'bias': torch.zeros(channels),
        'running_mean': torch.zeros(channels),
        'running_var': torch.ones(channels),
    }


def linear_params(in_features: int, out_features: int) -> Params:
    weight = kaiming_normal(torch.empty(out_features, in_features))
    return {'weight': weight, 'bias': torch.zeros(out_features)}


def flatten(tree: Mapping, prefix: str = '') -> Params:
    """Turn nested dicts of tensors into one flat dict with dotted keys.

    All tensors but running statistics require gradients.
    """
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f'{prefix}{name}.'))
        else:
            flat[prefix + name] = value.requires_grad_(not name.startswith('running_'))
    return flat


@torch.no_grad()
def copy_tensors(tensors: Params, module: nn.Module) -> None:
    """Copy tensors into a module, as `module.load_state_dict`, which takes quadratic time in the
    number of layers. Raises ValueError if a key or a shape does not fit."""
    own = module.state_dict()
    for key in {**own, **tensors}:
        there, here = (tuple(d[key].shape) if key in d else 'missing' for d in (tensors, own))
        check(there == here, f'{key} is {there} instead of {here} in the network')
    for key, tensor in own.items():
        tensor.copy_(tensors[key])


# --- other initial scales --------------------------------------------------------------------

SHIFT = 0.5  # initial bias of the batch norms with bn_init='shifted'
BnInit = str | tuple[float, float]
Scale = float | str | None


@torch.no_grad()
def initialize_scales(
    params: Params, depth: int, bn_init: BnInit = 'paper', alpha: Scale = None, beta: Scale = None
) -> Params:
    """Set the initial scales of a network in place. A departure from the paper, for deep chains.

    Returns params.

    Args:
        params: flat dict of a network with this depth.
        bn_init: 'paper' keeps weights from U(0, 1) and biases of 0. A pair of numbers is the
            weight and the bias of every batch norm; 'shifted' is the pair (1, SHIFT). ReLU then
            cuts off less than half of a channel's values, and a signal survives more layers.
        alpha, beta: scales of the Dirac weights: numbers above 0, or 'depth' for
            1 / sqrt(depth). None keeps them.

    Raises:
        ValueError: an unknown initialization, or a scale out of range.
    """
    weight, bias = bn_scales(bn_init)
    scales = {'bn.weight': weight, 'bn.bias': bias}
    scales['.alpha'], scales['.beta'] = (dirac_scale(scale, depth) for scale in (alpha, beta))
    for key, tensor in params.items():
        for end, scale in scales.items():
            if scale is not None and key.endswith(end):
                tensor.fill_(scale)
    return params


def bn_scales(bn_init: BnInit) -> tuple[float | None, float | None]:
    """The initial (weight, bias) of all batch norms; None keeps them. Raises ValueError."""
    named = {'paper': (None, None), 'shifted': (1.0, SHIFT)}
    if isinstance(bn_init, str) and bn_init in named:
        return named[bn_init]
    try:
        weight, bias = map(float, bn_init)
        if 0 < weight < math.inf and math.isfinite(bias):
            return weight, bias
    except (TypeError, ValueError):
        pass
    raise ValueError(
        f"bn_init {bn_init!r} is impossible: choose 'paper', 'shifted', or a pair of numbers, a "
        'weight above 0 and a bias'
    )


def dirac_scale(scale: Scale, depth: int) -> float | None:
    """The number that an initial alpha or beta stands for; None stays None. Raises ValueError."""
    if scale == 'depth':
        return depth**-0.5
    if scale is None or (isinstance(scale, (int, float)) and 0 < scale < math.inf):
        return scale
    raise ValueError(f"scale {scale!r} is impossible: it must be a number above 0, or 'depth'")


# --- trained weights -------------------------------------------------------------------------

FOLDER = 'https://s3.amazonaws.com/modelzoo-networks/'
model_urls = {  # the hexadecimal part is the beginning of the file's SHA-256
    'diracnet18': f'{FOLDER}diracnet18v2folded-a2174e15.pth',
    'diracnet34': f'{FOLDER}diracnet34v2folded-dfb15d34.pth',
}
TRAINED = {'digits': 'digits-f40cea6a.pth', 'FashionMNIST': 'fashion-64bbe56e.pth'}  # in weights/


def published_weights(name: str) -> Params:
    """The folded state dict in a file of model_urls, which torch.hub downloads once.

    Raises:
        RuntimeError: it cannot be downloaded, or is not the published file; the message says which
            file to put where.
    """
    url = model_urls[name]
    try:
        return torch.hub.load_state_dict_from_url(
            url, map_location='cpu', check_hash=True, weights_only=True
        )
    except (OSError, RuntimeError) as error:
        raise RuntimeError(
            f'{url} cannot be downloaded ({error}): get the file another way, check that its '
            f'SHA-256 begins as its name says, and put it into {torch.hub.get_dir()}/checkpoints'
        ) from error


def trained_weights(dataset: str) -> dict:
    """The content of a file in weights/: state_dict, network (the arguments that define it),
    classes (names), preprocessing."""
    return torch.load(trained_path(dataset), map_location='cpu', weights_only=True)


def trained_path(dataset: str) -> str:
    """The file in weights/ for a data set. Raises ValueError or RuntimeError if there is none."""
    if dataset not in TRAINED:
        raise ValueError(
            f'there is no pretrained network for {dataset}: choose {" or ".join(TRAINED)}, or '
            'diracnet18 or diracnet34 for ImageNet'
        )
    folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'weights')
    path = os.path.join(folder, TRAINED[dataset])
    if not os.path.exists(path):
        raise RuntimeError(f'{path} is missing: copy it from weights/ in the repository')
    return path

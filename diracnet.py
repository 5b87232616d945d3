"""DiracNets, version 2: plain chains of convolutions that train like residual networks.

    f, params = define_diracnet(depth=34, width=2, dataset='CIFAR10')
    logits = f(images, params, mode=False)  # mode=True: use batch statistics, update running ones

    folded = DiracNet(34, 2, 'CIFAR10')     # the same function, made of convolutions and ReLUs
    folded.load_state_dict(fold(params))

    model = diracnet18(pretrained=True)     # a folded DiracNet-18 with ImageNet weights

Source: Zagoruyko and Komodakis, DiracNets: Training Very Deep Neural Networks Without
Skip-Connections, arXiv 1706.00388. This file needs torch and diracconv.py alone.
"""

import hashlib
import http.client
import math
import os
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from diracconv import ALPHA, BETA, dirac_weight

Params = dict[str, Tensor]  # flat, with dotted keys
Function = Callable[..., Tensor]  # f(inputs, params, mode)
BnInit = str | tuple[float, float]

BN_EPS, BN_MOMENTUM = 1e-5, 0.1
SHIFT = 0.5  # initial bias of the batch norms with bn_init='shifted'

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


# --- the network -----------------------------------------------------------------------------


def chain(
    architecture: 'Architecture',
    inputs: Tensor,
    params: Params,
    mode: bool,
    norm: Function = F.batch_norm,
) -> Tensor:
    """A DiracNet as a function: f = partial(chain, architecture).

    Args:
        inputs: (N, in_channels, H, W), normalized images.
        params: flat dict, as `define_diracnet` makes it. Without alpha and beta the convolutions
            are ordinary ones: the plain network that the paper compares with.
        mode: True uses batch statistics and updates the running ones in place; False uses the
            running ones.
        norm: F.batch_norm, or another function with its arguments.

    Returns:
        logits, (N, num_classes).
    """
    weights = block_weights(architecture, params)
    x = stem(architecture, inputs, params, mode, norm)
    for g, group in enumerate(architecture.groups):
        if g > 0:
            x = F.max_pool2d(x, 2)  # H and W halve
        for name, _, _ in group:
            x = relu(x)
            x = F.conv2d(x, weights[name], padding=1)
            x = batch_norm(x, params, f'{name}.bn', mode, norm)
    return classify(x, params)


def stem(
    architecture: 'Architecture',
    inputs: Tensor,
    params: Params,
    mode: bool,
    norm: Function = F.batch_norm,
) -> Tensor:
    """What every chain begins with: (N, in_channels, H, W) to (N, w0, H, W), or to
    (N, w0, H / 4, W / 4) in the ImageNet form."""
    if architecture.form == 'cifar':
        return batch_norm(F.conv2d(inputs, params['conv'], padding=1), params, 'bn', mode, norm)
    x = F.conv2d(inputs, params['conv'], stride=2, padding=3)
    return F.max_pool2d(batch_norm(x, params, 'bn', mode, norm), 3, 2, 1)


def classify(x: Tensor, params: Params) -> Tensor:
    """What every chain ends with: (N, C, H, W) to logits, (N, num_classes)."""
    x = F.adaptive_avg_pool2d(relu(x), 1).flatten(1)
    return F.linear(x, params['fc.weight'], params['fc.bias'])


def relu(x: Tensor) -> Tensor:
    return F.relu(x, inplace=True)  # the backward passes of batch norm and pooling do not need it


def batch_norm(
    x: Tensor, params: Params, name: str, mode: bool, norm: Function = F.batch_norm
) -> Tensor:
    """Batch norm with the parameters that `bn_tensors` reads."""
    weight, bias, mean, var = bn_tensors(params, name)
    return norm(x, mean, var, weight, bias, training=mode, momentum=BN_MOMENTUM, eps=BN_EPS)


def bn_tensors(params: Params, name: str) -> tuple[Tensor, ...]:
    """(weight, bias, running_mean, running_var) of a batch norm, (C,) each."""
    parts = ('weight', 'bias', 'running_mean', 'running_var')
    return tuple(params[f'{name}.{part}'] for part in parts)


def block_weights(architecture: 'Architecture', params: Params) -> Params:
    """The effective weight of each block's convolution, by the name of the block.

    The Dirac weights of all blocks of one shape are computed together, which is faster: they are
    the groups of one large weight.
    """
    names = [name for group in architecture.groups for name, _, _ in group]
    if not any(f'{name}.alpha' in params for name in names):
        return {name: params[f'{name}.conv'] for name in names}
    names_by_shape = {}
    for name in names:
        names_by_shape.setdefault(params[f'{name}.conv'].shape, []).append(name)
    weights = {}
    for shape, same in names_by_shape.items():
        weight, alpha, beta = (
            torch.cat([params[f'{name}.{part}'] for name in same])
            for part in ('conv', 'alpha', 'beta')
        )
        together = dirac_weight(weight, alpha, beta, groups=len(same))
        weights.update(zip(same, together.split(shape[0])))
    return weights


# --- its definition --------------------------------------------------------------------------


@dataclass(frozen=True)
class Architecture:
    """All that determines the shapes of a network's parameters."""

    form: str  # 'cifar': 3x3 stem and three groups; 'imagenet': 7x7 stem and four groups
    depth: int
    width: float
    in_channels: int
    num_classes: int

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each group."""
        return tuple(int(base * self.width) for base in BASE_WIDTHS[self.form])

    @property
    def groups(self) -> list[list[tuple[str, int, int]]]:
        """For each group a list of its blocks: (name, in_channels, out_channels)."""
        if self.form == 'cifar':
            counts = [(self.depth - 4) // 6] * 3
        else:
            counts = IMAGENET_BLOCKS[self.depth]
        groups, channels = [], self.widths[0]
        for g, (count, out) in enumerate(zip(counts, self.widths)):
            blocks = []
            for b in range(2 * count):
                blocks.append((f'group{g}.block{b}', channels, out))
                channels = out
            groups.append(blocks)
        return groups


def make_architecture(
    depth: int,
    width: float,
    dataset: str,
    num_classes: int | None = None,
    in_channels: int | None = None,
    form: str | None = None,
) -> Architecture:
    """The Architecture for these choices; the data set determines what is None.

    Raises:
        ValueError: there is no such network; the message says what is possible.
    """
    if dataset not in DATASETS:
        raise ValueError(f'unknown dataset {dataset!r}: choose from {", ".join(DATASETS)}')
    own_form, channels, classes = DATASETS[dataset]
    form = own_form if form is None else form
    if form not in BASE_WIDTHS:
        raise ValueError(f'form {form!r} is unknown: choose from {", ".join(BASE_WIDTHS)}')
    channels = channels if in_channels is None else in_channels
    classes = classes if num_classes is None else num_classes
    if classes is None:
        raise ValueError(f'{dataset} has one class per folder: pass num_classes')
    if form == 'imagenet' and depth not in IMAGENET_BLOCKS:
        small = '; for small images choose the form cifar' if dataset == 'folder' else ''
        raise ValueError(f'depth {depth} is impossible for {dataset}: choose 18 or 34{small}')
    if form == 'cifar' and (depth != int(depth) or depth < 10 or (depth - 4) % 6):
        nearest = 6 * max(round((depth - 4) / 6), 1) + 4
        raise ValueError(
            f'depth {depth} is impossible for small images: it must be 6n + 4 with n >= 1 '
            f'(10, 16, 22, 28, 34, ...); the nearest is {nearest}'
        )
    base = BASE_WIDTHS[form][0]
    if not (0 < width < float('inf') and int(base * width) >= 1):
        raise ValueError(
            f'width {width} is impossible for {dataset}: the first group has {base} x width '
            'channels and needs at least 1'
        )
    for name, number in (('num_classes', classes), ('in_channels', channels)):
        if number != int(number) or number < 1:
            raise ValueError(f'{name} {number} is impossible: it must be a positive integer')
    return Architecture(form, int(depth), width, int(channels), int(classes))


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


def plain_conv_params(in_channels: int, out_channels: int) -> Params:
    return {'conv': conv_params(in_channels, out_channels, 3)}


def dirac_conv_params(in_channels: int, out_channels: int) -> Params:
    return {
        **plain_conv_params(in_channels, out_channels),
        'alpha': torch.full((out_channels,), ALPHA),
        'beta': torch.full((out_channels,), BETA),
    }


def chain_params(architecture: Architecture, block_params: Callable[[int, int], Params]) -> Params:
    """The flat params of a chain; block_params(in_channels, out_channels) are a convolution's."""
    stem_width = architecture.widths[0]
    stem_size = 7 if architecture.form == 'imagenet' else 3
    tree = {
        'conv': conv_params(architecture.in_channels, stem_width, stem_size),
        'bn': bn_params(stem_width),
    }
    for group in architecture.groups:
        for name, in_channels, out_channels in group:
            block = block_params(in_channels, out_channels)
            tree[name] = {**block, 'bn': bn_params(out_channels)}
    tree['fc'] = linear_params(architecture.widths[-1], architecture.num_classes)
    return flatten(tree)


def define_chain(
    architecture: Architecture, block_params: Callable[[int, int], Params] = dirac_conv_params
) -> tuple[Function, Params]:
    """f, params of a chain, a DiracNet unless `block_params` makes other convolutions."""
    return partial(chain, architecture), chain_params(architecture, block_params)


def define_diracnet(
    depth: int,
    width: float,
    dataset: str,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    form: str | None = None,
    bn_init: BnInit = 'paper',
    alpha: float | str | None = None,
    beta: float | str | None = None,
) -> tuple[Function, Params]:
    """DiracNet-DEPTH-WIDTH, version 2.

    Args:
        depth: 6n + 4 for small images (n >= 1); 18 or 34 for ImageNet.
        width: multiplies the channels of the groups, (16, 32, 64), or (64, 128, 256, 512) for
            ImageNet; the products are truncated to integers.
        dataset: a name in DATASETS; it determines the form, the channels and the classes.
        num_classes, in_channels, form: override those of the data set. The form is 'cifar' (3x3
            stem, three groups) or 'imagenet' (7x7 stem, four groups).
        bn_init, alpha, beta: initial scales, see `initialize_scales`. With 'shifted', beta is
            'depth' unless it is given.

    Returns:
        f, params: `f(inputs, params, mode)` returns logits, see `chain`. params is a flat dict
        with dotted keys; all tensors but the running statistics require gradients.

    Raises:
        ValueError: an impossible depth, width, data set or scale; the message says what is
            possible.
    """
    architecture = make_architecture(depth, width, dataset, num_classes, in_channels, form)
    if bn_init == 'shifted' and beta is None:
        beta = 'depth'
    f, params = define_chain(architecture)
    return f, initialize_scales(params, architecture.depth, bn_init, alpha, beta)


@torch.no_grad()
def initialize_scales(
    params: Params,
    depth: int,
    bn_init: BnInit = 'paper',
    alpha: float | str | None = None,
    beta: float | str | None = None,
) -> Params:
    """Set the initial scales of a chain in place. A departure from the paper, for deep chains.

    Returns params.

    Args:
        params: flat dict of a chain with this depth.
        bn_init: 'paper' keeps weights from U(0, 1) and biases of 0. A pair of numbers is the
            weight and the bias of every batch norm; 'shifted' is the pair (1, SHIFT). ReLU then
            cuts off less than half of a channel's values, and a signal survives more layers.
        alpha, beta: scales of the Dirac weights: numbers above 0, or 'depth' for
            1 / sqrt(depth). None keeps 1 and 0.1.

    Raises:
        ValueError: an unknown initialization, or a scale out of range.
    """
    if bn_init != 'paper':
        weight, bias = bn_scales(bn_init)
        for key, tensor in params.items():
            if key.endswith('bn.weight'):
                tensor.fill_(weight)
            elif key.endswith('bn.bias'):
                tensor.fill_(bias)
    for name, scale in (('alpha', alpha), ('beta', beta)):
        if scale is not None:
            scale = dirac_scale(name, scale, depth)
            for key, tensor in params.items():
                if key.endswith(f'.{name}'):
                    tensor.fill_(scale)
    return params


def bn_scales(bn_init: BnInit) -> tuple[float, float]:
    """The initial (weight, bias) of all batch norms. Raises ValueError."""
    if bn_init == 'shifted':
        return 1.0, SHIFT
    is_pair = isinstance(bn_init, (tuple, list)) and len(bn_init) == 2
    if not (is_pair and all(isinstance(scale, (int, float)) for scale in bn_init)):
        raise ValueError(
            f"bn_init {bn_init!r} is unknown: choose 'paper', 'shifted', or a pair of numbers, "
            'the weight and the bias'
        )
    weight, bias = bn_init
    if not (0 < weight < math.inf and math.isfinite(bias)):
        raise ValueError(f'bn_init {bn_init!r} is impossible: the weight must be above 0')
    return weight, bias


def dirac_scale(name: str, scale: float | str, depth: int) -> float:
    """The number that an initial alpha or beta stands for. Raises ValueError."""
    if scale == 'depth':
        return depth**-0.5
    if not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
        raise ValueError(f"{name} {scale!r} is impossible: it must be a number above 0, or 'depth'")
    return scale


class Network(nn.Module):
    """A pair f, params as a module whose state-dict keys are the keys of params.

    Args:
        f: f(inputs, params, mode); mode is this module's `training`.
        params: flat dict. Tensors that require gradients become parameters, the others buffers.
            The module shares their memory.
    """

    def __init__(self, f: Function, params: Params) -> None:
        super().__init__()
        self.f = f
        keys_by_path = {}
        for key, tensor in params.items():
            *path, name = key.split('.')  # PyTorch refuses dots in names, so modules are nested
            module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module._modules[part]
            if tensor.requires_grad:
                module.register_parameter(name, nn.Parameter(tensor.detach()))
            else:
                module.register_buffer(name, tensor)
            keys_by_path.setdefault(tuple(path), []).append((key, name))
        self.keys_by_path = tuple(keys_by_path.items())

    def params(self) -> Params:
        """The flat dict with the module's own tensors."""
        params = {}
        for path, keys in self.keys_by_path:  # one lookup per submodule: this runs at every step
            module = self
            for part in path:
                module = module._modules[part]
            for key, name in keys:
                params[key] = getattr(module, name)
        return params

    def forward(self, inputs: Tensor) -> Tensor:
        return self.f(inputs, self.params(), self.training)


# --- the folded network ----------------------------------------------------------------------


@torch.no_grad()
def fold(params: Params) -> Params:
    """Fold Dirac weights and batch norms into the weights and biases of plain convolutions.

    Args:
        params: flat dict of a DiracNet or of a plain chain, of any depth and width. Identities
            that the original's files store (eye64_64_3_3) are ignored.

    Returns:
        A state dict of `DiracNet`: features.conv.weight, features.conv.bias,
        features.group0.block0.conv.weight, ..., fc.weight, fc.bias. The tensors are new, with the
        device and dtype of params; they are computed in double precision.

    Raises:
        ValueError: these are not the parameters of such a network.
    """
    architecture = fitting_architecture(params, block_kind(params))
    blocks = [name for group in architecture.groups for name, _, _ in group]
    folded = OrderedDict()
    for prefix in ('', *(f'{name}.' for name in blocks)):
        weight = params[f'{prefix}conv'].double()
        if f'{prefix}alpha' in params:
            alpha, beta = params[f'{prefix}alpha'], params[f'{prefix}beta']
            weight = dirac_weight(weight, alpha.double(), beta.double())
        weight, bias = fold_batch_norm(weight, params, f'{prefix}bn')
        folded[f'features.{prefix}conv.weight'] = weight
        folded[f'features.{prefix}conv.bias'] = bias
    for key in ('fc.weight', 'fc.bias'):
        folded[key] = params[key].detach().clone()
    return folded


def fold_batch_norm(weight: Tensor, params: Params, name: str) -> tuple[Tensor, Tensor]:
    """The weight and bias of a convolution that includes the batch norm after it.

    Args:
        weight: (out, in, *kernel), in double precision.
        params, name: the batch norm, as for `bn_tensors`.

    Returns:
        (weight, bias), with the dtype of the batch norm's weight.

    Raises:
        ValueError: a running variance is negative or NaN.
    """
    scale, shift, mean, var = (tensor.double() for tensor in bn_tensors(params, name))
    if not var.is_meta and not (var >= 0).all():
        raise ValueError(f'{name}.running_var has negative values or NaN')
    fused = fuse_conv_bn_weights(weight, None, mean, var, BN_EPS, scale, shift)
    return tuple(tensor.detach().to(params[f'{name}.weight'].dtype) for tensor in fused)


class DiracNet(nn.Module):
    """A folded DiracNet: a chain of convolutions with bias and ReLUs, for inference.

    `features` maps (N, in_channels, H, W) to (N, channels, 1, 1), and `fc` that to logits
    (N, num_classes). H and W are at least 32 in the ImageNet form and 4 in the CIFAR form.
    The arguments and their errors are as for `define_diracnet`. The weights are random until
    `load_state_dict(fold(params))` loads trained ones.
    """

    def __init__(
        self,
        depth: int,
        width: float = 1,
        dataset: str = 'ImageNet',
        *,
        num_classes: int | None = None,
        in_channels: int | None = None,
        form: str | None = None,
    ) -> None:
        super().__init__()
        self._build(make_architecture(depth, width, dataset, num_classes, in_channels, form))

    @classmethod
    def from_state_dict(cls, state_dict: Params) -> 'DiracNet':
        """The module for a folded state dict, with its weights. Raises ValueError if none fits."""
        net = cls.__new__(cls)
        nn.Module.__init__(net)
        net._build(cls._infer_architecture(state_dict))
        copy_tensors(state_dict, net.to(state_dict['fc.weight'].dtype))
        return net

    @staticmethod
    def _infer_architecture(state_dict):
        return infer_architecture(state_dict)

    def _build(self, architecture):
        self.architecture = architecture
        in_channels, stem_width = architecture.in_channels, architecture.widths[0]
        features = OrderedDict()
        if architecture.form == 'imagenet':
            features['conv'] = nn.Conv2d(in_channels, stem_width, 7, stride=2, padding=3)
            features['max_pool0'] = nn.MaxPool2d(3, 2, 1)
        else:
            features['conv'] = nn.Conv2d(in_channels, stem_width, 3, padding=1)
        for g, blocks in enumerate(architecture.groups):
            if g > 0:
                features[f'max_pool{g}'] = nn.MaxPool2d(2)
            group = OrderedDict()
            for name, inside, out in blocks:
                relu, conv = nn.ReLU(inplace=True), nn.Conv2d(inside, out, 3, padding=1)
                block = nn.Sequential(OrderedDict(relu=relu, conv=conv))
                group[name.removeprefix(f'group{g}.')] = block
            features[f'group{g}'] = nn.Sequential(group)
        features['last_relu'] = nn.ReLU(inplace=True)
        features['avg_pool'] = nn.AdaptiveAvgPool2d(1)
        self.features = nn.Sequential(features)
        self.fc = nn.Linear(architecture.widths[-1], architecture.num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.fc(self.features(inputs).flatten(1))


@torch.no_grad()
def copy_tensors(state_dict: Params, module: nn.Module) -> None:
    """Copy a state dict into a module, as `module.load_state_dict` does.

    That method takes quadratic time in the number of layers, this function linear time.

    Raises:
        ValueError: a key, a shape or a type does not fit.
    """
    own = module.state_dict()
    try:
        check_tensors(state_dict, own)
    except ValueError as error:
        raise ValueError(f'the tensors do not fit the network: {error}') from None
    for key, tensor in own.items():
        tensor.copy_(state_dict[key])


# --- trained weights -------------------------------------------------------------------------

model_urls = {  # the hexadecimal part is the beginning of the file's SHA-256
    'diracnet18': 'https://s3.amazonaws.com/modelzoo-networks/diracnet18v2folded-a2174e15.pth',
    'diracnet34': 'https://s3.amazonaws.com/modelzoo-networks/diracnet34v2folded-dfb15d34.pth',
}
# Files in weights/: (unfolded, folded). Their names have the beginning of their SHA-256, too.
TRAINED = {
    'digits': ('digits-f40cea6a.pth', 'digits-folded-ab3e7afb.pth'),
    'FashionMNIST': ('fashion-64bbe56e.pth', 'fashion-folded-252a3b75.pth'),
}


def diracnet18(pretrained: bool = False, **kwargs) -> DiracNet:
    """A folded DiracNet-18 for ImageNet, 224 x 224 pixels, 11,511,784 parameters.

    Args:
        pretrained: load the published weights (30.37 % top-1 and 10.88 % top-5 error, reported by
            the paper's authors). They are downloaded once, to torch.hub's cache.
        kwargs: keyword arguments of DiracNet.

    Raises:
        RuntimeError: the file cannot be downloaded or is not the published one; the message says
            which file to put where.
    """
    return _folded('diracnet18', 18, pretrained, **kwargs)


def diracnet34(pretrained: bool = False, **kwargs) -> DiracNet:
    """A folded DiracNet-34 for ImageNet, 224 x 224 pixels; see `diracnet18`."""
    return _folded('diracnet34', 34, pretrained, **kwargs)


def diracnet(
    depth: int | None = None,
    width: float | None = None,
    dataset: str = 'CIFAR10',
    *,
    pretrained: bool = False,
    folded: bool = False,
    **kwargs,
) -> Network | DiracNet:
    """DiracNet-DEPTH-WIDTH for a data set.

    Args:
        depth, width, dataset: as for `define_diracnet`, like the further keyword arguments. The
            width is 1 unless it is given.
        pretrained: load the network for digits or FashionMNIST in weights/, which has its own depth
            and width. Its attribute `classes` has the names of the classes, and `preprocessing`,
            a dict, says how images become inputs.
        folded: return a DiracNet, for inference, instead of a Network, for training.

    Raises:
        ValueError: as for `define_diracnet`, or there is no such pretrained network.
        RuntimeError: the file in weights/ is missing or damaged.
    """
    if pretrained:
        given = {'depth': depth, 'width': width, **kwargs}
        return _trained(dataset, folded, {k: v for k, v in given.items() if v is not None})
    if depth is None and dataset in DATASETS:
        raise ValueError('depth is missing: only pretrained networks have one of their own')
    architecture = depth, 1 if width is None else width, dataset
    if folded:
        return DiracNet(*architecture, **kwargs)
    return Network(*define_diracnet(*architecture, **kwargs))


def _trained(dataset, folded, given):
    if dataset not in TRAINED:
        raise ValueError(
            f'there is no pretrained network for {dataset}: choose {" or ".join(TRAINED)}, or '
            'diracnet18 or diracnet34 for ImageNet'
        )
    content = torch.load(trained_path(dataset, folded), map_location='cpu', weights_only=True)
    params = content['state_dict']
    architecture = infer_architecture(params)
    for name, value in given.items():
        if getattr(architecture, name, None) != value:
            raise ValueError(
                f'{name} {value!r} does not fit the pretrained network for {dataset}, which is '
                f'DiracNet-{architecture.depth}-{architecture.width:g}'
            )
    if folded:
        net = DiracNet.from_state_dict(params)
    else:
        net = Network(*define_chain(architecture))
        net.load_state_dict(params)
    net.classes, net.preprocessing = content['classes'], content['preprocessing']
    return net


def trained_path(dataset: str, folded: bool = False) -> str:
    """The file with the trained weights for a data set in TRAINED. Raises RuntimeError."""
    name = TRAINED[dataset][folded]
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'weights', name)
    if not os.path.exists(path):
        raise RuntimeError(f'{path} is missing: copy it from weights/ in the repository')
    _check_hash(path, f'weights/{name} in the repository')
    return path


def _folded(name, depth, pretrained, **kwargs):
    model = DiracNet(depth, **kwargs)
    if pretrained:
        weights = _published_weights(name)
        published = infer_architecture(weights)
        if published != model.architecture:
            raise ValueError(
                f'the published weights of {name} have {published.num_classes} classes, '
                f'{published.in_channels} channels and width {published.width}: '
                'do not combine pretrained=True with other arguments'
            )
        model.load_state_dict(weights)
    return model


def _published_weights(name):
    """The folded state dict of a published file, downloaded to torch.hub's cache if needed."""
    url = model_urls[name]
    file_name = url.rsplit('/', 1)[1]
    path = os.path.join(torch.hub.get_dir(), 'checkpoints', file_name)
    if os.path.exists(path):
        _check_hash(path, f'the file from {url}')  # torch.hub does not check what is in its cache
    else:
        prefix = _hash_in(file_name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, path, prefix)
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            raise RuntimeError(
                f'{url} cannot be downloaded ({error}): get the file another way, check that its '
                f'SHA-256 begins with {prefix}, and save it as {path}'
            ) from error
    return torch.load(path, map_location='cpu', weights_only=True)


def _hash_in(file_name):
    """The beginning of the SHA-256 that is part of a file's name."""
    return torch.hub.HASH_REGEX.search(file_name)[1]


def _check_hash(path, expected):
    """Raise RuntimeError unless a file has the SHA-256 that its name says. `expected` is what it
    should be, for the message."""
    prefix = _hash_in(os.path.basename(path))
    with open(path, 'rb') as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    if not digest.startswith(prefix):
        raise RuntimeError(
            f'{path} is not {expected}: its SHA-256 begins with {digest[:8]} instead of {prefix}; '
            'remove it'
        )


# --- reading an architecture off tensors ------------------------------------------------------


def infer_architecture(params: Params) -> Architecture:
    """The Architecture of a DiracNet or plain chain, from its params or folded state dict.

    Raises:
        ValueError: these are not the parameters of such a network; the message names the first
            key that is wrong.
    """
    if any(key.startswith('features.') for key in params):  # folded
        return fitting_architecture(params, plain_conv_params, 'features.')
    return fitting_architecture(params, block_kind(params))


def block_kind(params: Params) -> Callable[[int, int], Params]:
    """The function that makes the params of a block: Dirac or plain."""
    return dirac_conv_params if is_dirac(params) else plain_conv_params


def is_dirac(params: Params) -> bool:
    """Whether any block has scales of a Dirac weight."""
    return any(key.endswith(('.alpha', '.beta')) for key in params)


def fitting_architecture(
    params: Params,
    block_params: Callable[[int, int], Params],
    folded_prefix: str | None = None,
    kind: str = 'DiracNet',
) -> Architecture:
    """The Architecture of a chain with exactly these keys and shapes; see `infer_architecture`.

    Args:
        params: flat dict of params or folded state dict.
        block_params: as for `chain_params`.
        folded_prefix: that of the keys of a folded state dict; None if this is none.
        kind: name of the network for error messages.
    """
    conv_key = '{}conv' if folded_prefix is None else f'{folded_prefix}{{}}conv.weight'
    block = re.escape(conv_key).replace(r'\{\}', r'(group\d)\.block\d+\.')
    matches = (re.fullmatch(block, key) for key in params)
    blocks = max(Counter(match[1] for match in matches if match).values(), default=0)
    try:
        stem, fc = params[conv_key.format('')], params['fc.weight']
        if stem.shape[-1] == 7:
            form, dataset = 'imagenet', 'ImageNet'
            depth = 18 if blocks <= 2 * max(IMAGENET_BLOCKS[18]) else 34
        else:
            form, dataset, depth = 'cifar', 'CIFAR10', 6 * max(math.ceil(blocks / 2), 1) + 4
        # Widths are truncated to integers. The last is the largest: truncation changes it least.
        width = fc.shape[1] / BASE_WIDTHS[form][-1]
        width = int(width) if width.is_integer() else width
        architecture = make_architecture(depth, width, dataset, fc.shape[0], stem.shape[1])
        with torch.device('meta'):  # shapes without values
            expected = chain_params(architecture, block_params)
        if folded_prefix is not None:
            expected = dict(_folded_items(expected, folded_prefix))
        check_tensors(params, expected)
    except (KeyError, IndexError, AttributeError) as error:
        raise ValueError(
            f'not the parameters of a {kind}: {error.args[0]!r} is missing or has an unknown form'
        ) from None
    except (ValueError, RuntimeError) as error:  # RuntimeError: too large for a tensor
        raise ValueError(f'not the parameters of a {kind}: {error}') from None
    return architecture


def _folded_items(params, prefix):
    """The keys of a plain chain's folded state dict, with tensors of their shapes."""
    for key, tensor in params.items():
        if key.endswith('conv'):
            yield f'{prefix}{key}.weight', tensor
            yield f'{prefix}{key}.bias', tensor[:, 0, 0, 0]
        elif key.startswith('fc.'):
            yield key, tensor


def check_tensors(tensors: Params, expected: Params) -> None:
    """Raise ValueError unless two dicts of tensors have the same keys and shapes, and the first
    holds real numbers. Identities that the original's files store (eye64_64_3_3) do not matter."""
    for key in dict.fromkeys([*expected, *tensors]):
        if key.startswith('eye'):
            continue
        there, here = (
            tuple(found[key].shape) if key in found else 'missing' for found in (tensors, expected)
        )
        if there != here:
            raise ValueError(f'{key} is {there} instead of {here}')
        if not tensors[key].is_floating_point():
            raise ValueError(f'{key} has the type {tensors[key].dtype}')

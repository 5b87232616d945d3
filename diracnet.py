"""DiracNets, version 2: plain chains of convolutions that train like residual networks, and fold into VGG-like ones.

    f, params = define_diracnet(depth=34, width=2, dataset='CIFAR10')
    logits = f(images, params, mode=False)      # mode=True: batch statistics, and the running ones are updated
    folded = DiracNet(34, 2, 'CIFAR10')
    folded.load_state_dict(fold(params))        # the same function, of convolutions and ReLUs alone

    model = diracnet18(pretrained=True)         # a folded DiracNet-18, ImageNet weights

Zagoruyko and Komodakis, DiracNets: Training Very Deep Neural Networks Without Skip-Connections, arXiv 1706.00388.
Depends on torch alone.
"""

import hashlib
import http.client
import os
import re
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from diracconv import ALPHA, BETA, dirac_weight
from lab.memory import release_freed_memory

BN_EPS, BN_MOMENTUM = 1e-5, 0.1

# What a network has to know of a data set: form of the network, channels of an image, classes.
DATASETS = {
    'digits': ('cifar', 1, 10),
    'FashionMNIST': ('cifar', 1, 10),
    'CIFAR10': ('cifar', 3, 10),
    'CIFAR100': ('cifar', 3, 100),
    'SVHN': ('cifar', 3, 10),
    'ImageNet': ('imagenet', 3, 1000),
    'folder': ('imagenet', 3, None),  # anybody's images: num_classes must be given
}
BASE_WIDTHS = {'cifar': (16, 32, 64), 'imagenet': (64, 128, 256, 512)}
IMAGENET_BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
}  # as ResNet counts them; a DiracNet has two for each

model_urls = {  # the hexadecimal part is the beginning of the file's SHA-256
    'diracnet18': 'https://s3.amazonaws.com/modelzoo-networks/diracnet18v2folded-a2174e15.pth',
    'diracnet34': 'https://s3.amazonaws.com/modelzoo-networks/diracnet34v2folded-dfb15d34.pth',
}


@dataclass(frozen=True)
class Architecture:
    """What determines the shapes of a network: everything but its weights."""

    form: str  # 'cifar': 3x3 stem, three groups; 'imagenet': 7x7 stem with stride, four groups
    depth: int
    width: float
    in_channels: int
    num_classes: int

    @property
    def widths(self):
        """Channels of each group."""
        return tuple(int(base * self.width) for base in BASE_WIDTHS[self.form])

    @property
    def groups(self):
        """Per group, a list of (name, in_channels, out_channels), one for each block."""
        blocks = (
            [(self.depth - 4) // 6] * 3 if self.form == 'cifar' else IMAGENET_BLOCKS[self.depth]
        )
        groups, channels = [], self.widths[0]
        for g, (n, out) in enumerate(zip(blocks, self.widths)):
            groups.append(
                [(f'group{g}.block{b}', out if b else channels, out) for b in range(2 * n)]
            )
            channels = out
        return groups


def make_architecture(depth, width, dataset, num_classes=None, in_channels=None):
    """Check and complete a user's choice. Raises ValueError, with what is possible, for one that can't be built."""
    if dataset not in DATASETS:
        raise ValueError(f'unknown dataset {dataset!r}; there are {", ".join(DATASETS)}')
    form, channels, classes = DATASETS[dataset]
    channels = channels if in_channels is None else in_channels
    classes = classes if num_classes is None else num_classes
    if classes is None:
        raise ValueError(f'{dataset} has as many classes as it has folders: give num_classes')
    if form == 'imagenet' and depth not in IMAGENET_BLOCKS:
        raise ValueError(f'depth {depth} is impossible for {dataset}: it is 18 or 34')
    if form == 'cifar' and (depth != int(depth) or depth < 10 or (depth - 4) % 6):
        near = 6 * max(round((depth - 4) / 6), 1) + 4
        raise ValueError(
            f'depth {depth} is impossible for {dataset}: it is 6n + 4 with n of 1 or more (10, 16, 22, 28, 34, ...); '
            f'the nearest is {near}'
        )
    if not (0 < width < float('inf') and int(BASE_WIDTHS[form][0] * width) >= 1):
        raise ValueError(
            f'width {width} is impossible for {dataset}: {BASE_WIDTHS[form][0]} times it, the channels of the first group, '
            'must be 1 or more'
        )
    for name, number in (('num_classes', classes), ('in_channels', channels)):
        if number != int(number) or number < 1:
            raise ValueError(
                f'{name} {number} is impossible: it must be a whole number of 1 or more'
            )
    return Architecture(form, int(depth), width, int(channels), int(classes))


# --- parameters and functions ----------------------------------------------------------------------------------------


def conv_params(in_channels, out_channels, kernel_size):
    """Weight of a convolution, Kaiming normal (fan_in, gain of ReLU)."""
    weight = torch.empty(out_channels, in_channels, kernel_size, kernel_size)
    return nn.init.kaiming_normal_(weight, nonlinearity='relu')


def bn_params(channels):
    return {
        'weight': torch.rand(channels),
        'bias': torch.zeros(channels),
        'running_mean': torch.zeros(channels),
        'running_var': torch.ones(channels),
    }


def linear_params(in_features, out_features):
    weight = torch.empty(out_features, in_features)
    return {
        'weight': nn.init.kaiming_normal_(weight, nonlinearity='relu'),
        'bias': torch.zeros(out_features),
    }


def flatten(tree, prefix=''):
    """Nested dicts of tensors to one flat dict with dotted keys; all but running statistics require gradients."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f'{prefix}{name}.'))
        else:
            flat[prefix + name] = value.requires_grad_(not name.startswith('running_'))
    return flat


def activation(x, bn, mode, pool=(), norm=F.batch_norm):
    """What lies between two convolutions: batch norm, max-pooling where `pool` has its arguments, ReLU.

    x: (N, C, H, W); bn: (weight, bias, running_mean, running_var), (C,) each; mode: True for batch statistics; norm: F.batch_norm, or
    another function of its arguments. As ReLU and max-pooling commute, the pooling comes first, and so does the paper's order, in
    which a block begins with the ReLU.
    """
    weight, bias, mean, var = bn
    x = norm(x, mean, var, weight, bias, training=mode, momentum=BN_MOMENTUM, eps=BN_EPS)
    if pool:
        x = F.max_pool2d(x, *pool)
    # In place: neither batch norm nor pooling looks at its output again. (A compiler fuses it anyhow.)
    return F.relu(x, inplace=not torch.compiler.is_compiling())


def block(x, bn, weight, mode, pool=(), norm=F.batch_norm):
    """`activation` and the 3x3 convolution behind it, weight (out, C, 3, 3): (N, C, H, W) to (N, out, H', W')."""
    return F.conv2d(activation(x, bn, mode, pool, norm), weight, padding=1)


class _Recomputed(torch.autograd.Function):
    """`block` in training, keeping its arguments alone: the backward pass computes the activation, not the convolution, again."""

    @staticmethod
    def forward(ctx, x, bn_weight, bn_bias, running_mean, running_var, weight, pool, norm):
        ctx.save_for_backward(x, bn_weight, bn_bias, weight)
        ctx.pool, ctx.norm = pool, norm
        return block(x, (bn_weight, bn_bias, running_mean, running_var), weight, True, pool, norm)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        *given, weight = ctx.saved_tensors
        if ctx.pool and not given[0].is_cuda and given[0].nbytes >= 2**24:
            release_freed_memory()  # activations become larger here, and the holes that smaller ones left are of no use
        x, bn_weight, bn_bias = (tensor.detach().requires_grad_() for tensor in given)
        with torch.enable_grad():
            # Running statistics have been updated before.
            inputs = activation(x, (bn_weight, bn_bias, None, None), True, ctx.pool, ctx.norm)
        inner = inputs.detach().to(
            grad.dtype
        )  # under autocast the convolution was in a shorter type than its inputs
        short = weight.to(grad.dtype)
        grad_inputs = torch.nn.grad.conv2d_input(inner.shape, short, grad, padding=1)
        grad_weight = torch.nn.grad.conv2d_weight(inner, weight.shape, grad, padding=1).to(
            weight.dtype
        )
        del inner
        grads = torch.autograd.grad(inputs, (x, bn_weight, bn_bias), grad_inputs.to(inputs.dtype))
        return *grads, None, None, grad_weight, None, None


def recomputed_block(x, bn, weight, mode, pool=(), norm=F.batch_norm):
    """`block` for half of the memory: what the convolution reads is not kept for the backward pass, but computed again there."""
    if mode and torch.is_grad_enabled():
        return _Recomputed.apply(x, *bn, weight, pool, norm)
    return block(x, bn, weight, mode, pool, norm)


def conv_weights(architecture, params):
    """The weight that each block convolves with, by the block's name: Dirac where there are scales, else (as in plain networks)
    as it is. The Dirac weights of all blocks of one shape are computed at once."""
    names = [name for group in architecture.groups for name, _, _ in group]
    if names[0] + '.alpha' not in params:
        return {name: params[name + '.conv'] for name in names}
    by_shape = {}
    for name in names:
        by_shape.setdefault(params[name + '.conv'].shape, []).append(name)
    weights = {}
    for shape, names in by_shape.items():
        together = (
            torch.cat([params[f'{name}.{part}'] for name in names])
            for part in ('conv', 'alpha', 'beta')
        )
        weights.update(zip(names, dirac_weight(*together, groups=len(names)).split(shape[0])))
    return weights


def chain(architecture, inputs, params, mode, block=block, norm=F.batch_norm):
    """The function of a DiracNet (and of the plain chain), as partial(chain, architecture): f(inputs, params, mode).

    Args:
        inputs: (N, in_channels, H, W), normalized images.
        params: flat dict as `define_diracnet` makes it.
        mode: True for batch statistics, with the running ones updated in place; False for the running ones.
        block: `block`, or another function that computes the same, as `recomputed_block` or torch.compile(block).
        norm: F.batch_norm, or another function of its arguments.

    Returns:
        logits, (N, num_classes).
    """

    def bn(name):
        return tuple(
            params[f'{name}.{part}'] for part in ('weight', 'bias', 'running_mean', 'running_var')
        )

    weights = conv_weights(architecture, params)
    if architecture.form == 'imagenet':
        x, pool = (
            F.conv2d(inputs, params['conv'], stride=2, padding=3),
            (3, 2, 1),
        )  # (N, w0, H / 2, W / 2)
    else:
        x, pool = F.conv2d(inputs, params['conv'], padding=1), ()  # (N, w0, H, W)
    last = 'bn'
    for group in architecture.groups:
        for (
            name,
            _,
            _,
        ) in (
            group
        ):  # paper: a block is ReLU, convolution, batch norm; here cut behind the convolutions
            x = block(x, bn(last), weights[name], mode, pool, norm)
            last, pool = name + '.bn', ()
        pool = (2,)  # height and width halve
    x = F.adaptive_avg_pool2d(activation(x, bn(last), mode, norm=norm), 1).flatten(1)  # (N, w_last)
    return F.linear(x, params['fc.weight'], params['fc.bias'])


def define_chain(architecture, dirac=True):
    """f and params of the chain that `architecture` describes; without `dirac`, ordinary convolutions (see resnet.py)."""
    tree = {
        'conv': conv_params(
            architecture.in_channels,
            architecture.widths[0],
            7 if architecture.form == 'imagenet' else 3,
        ),
        'bn': bn_params(architecture.widths[0]),
    }
    for group in architecture.groups:
        for name, in_channels, out_channels in group:
            tree[name] = {'conv': conv_params(in_channels, out_channels, 3)}
            if dirac:
                tree[name].update(
                    alpha=torch.full((out_channels,), ALPHA), beta=torch.full((out_channels,), BETA)
                )
            tree[name]['bn'] = bn_params(out_channels)
    tree['fc'] = linear_params(architecture.widths[-1], architecture.num_classes)
    return partial(chain, architecture), flatten(tree)


def define_diracnet(depth, width, dataset, *, num_classes=None, in_channels=None):
    """DiracNet-DEPTH-WIDTH, version 2, with the stem, the number of classes and of channels that `dataset` needs.

    Args:
        depth: 6n + 4 for small images (any n of 1 or more), 18 or 34 for ImageNet.
        width: factor of the channels, (16, 32, 64) or for ImageNet (64, 128, 256, 512); truncated to integers.
        dataset: a name in DATASETS.
        num_classes, in_channels: in place of the data set's own.

    Returns:
        f, params: `f(inputs, params, mode)` gives logits, see `chain`; params is a flat dict with dotted keys. All but
        the running statistics require gradients.

    Raises:
        ValueError: an impossible depth, width or data set; the message says what is possible.
    """
    return define_chain(make_architecture(depth, width, dataset, num_classes, in_channels))


class Network(nn.Module):
    """A pair f, params as an ordinary module. The state-dict keys are the keys of params.

    Args:
        f: f(inputs, params, mode); mode is this module's `training`.
        params: flat dict; what requires gradients becomes parameters, the rest buffers. Memory is shared.
    """

    def __init__(self, f, params):
        super().__init__()
        self.f = f
        places = {}
        for key, tensor in params.items():
            *path, name = key.split(
                '.'
            )  # PyTorch accepts no name with a dot: nested modules give the same keys
            places.setdefault(tuple(path), []).append((key, name))
            module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module._modules[part]
            if tensor.requires_grad:
                module.register_parameter(name, nn.Parameter(tensor.detach()))
            else:
                module.register_buffer(name, tensor)
        self.places = tuple(places.items())

    def params(self):
        """The flat dict, of the module's own tensors."""
        found = {}
        for path, names in self.places:  # each submodule is looked up once: this runs at every step
            module = self
            for part in path:
                module = module._modules[part]
            for key, name in names:
                found[key] = getattr(module, name)
        return found

    def forward(self, inputs):
        return self.f(inputs, self.params(), self.training)


# --- folding ---------------------------------------------------------------------------------------------------------


def infer_architecture(params):
    """The Architecture of a DiracNet (or plain chain), read off its parameters or its folded state dict.

    Raises:
        ValueError: these are not the parameters of such a network; the message names the first key that is wrong.
    """
    folded = 'features.conv.weight' in params
    prefix, suffix = ('features.', '.weight') if folded else ('', '')
    try:
        stem, fc = params[f'{prefix}conv{suffix}'], params['fc.weight']
        form = {3: 'cifar', 7: 'imagenet'}[stem.shape[-1]]
        pattern = re.compile(
            re.escape(prefix) + r'group(\d+)\.block(\d+)\.conv' + re.escape(suffix) + '$'
        )
        blocks = [match for match in map(pattern.match, params) if match]
        per_group = [
            sum(int(match[1]) == g for match in blocks) for g in range(len(BASE_WIDTHS[form]))
        ]
        if form == 'imagenet':
            depth = {
                tuple(2 * n for n in counts): depth for depth, counts in IMAGENET_BLOCKS.items()
            }[tuple(per_group)]
        else:
            depth = 3 * per_group[0] + 4
        width = (
            fc.shape[1] / BASE_WIDTHS[form][-1]
        )  # of the truncated widths the last is the finest: it determines the others
        found = Architecture(
            form, depth, int(width) if width.is_integer() else width, stem.shape[1], fc.shape[0]
        )
        expected = {
            f'{prefix}conv{suffix}': (
                found.widths[0],
                found.in_channels,
                stem.shape[-1],
                stem.shape[-1],
            )
        }
        expected.update(
            {
                f'{prefix}{name}.conv{suffix}': (out, inside, 3, 3)
                for group in found.groups
                for name, inside, out in group
            }
        )
        for key, shape in expected.items():
            if tuple(params[key].shape) != shape:
                raise ValueError(
                    f'not the parameters of a DiracNet: {key} is {tuple(params[key].shape)} instead of {shape}'
                )
        if len(blocks) != len(expected) - 1:
            raise ValueError(
                'not the parameters of a DiracNet: there are more blocks than its depth has'
            )
    except (KeyError, IndexError, AttributeError) as error:
        raise ValueError(
            f'not the parameters of a DiracNet: {error.args[0]!r} is missing or of an unknown form'
        ) from None
    return found


@torch.no_grad()
def fold(params):
    """Dirac weights and batch norms of a trained network folded into weights and biases of plain convolutions.

    Args:
        params: flat dict of a DiracNet or a plain chain, as `define_diracnet` makes it, of any depth and width.

    Returns:
        The state dict of `DiracNet`: features.conv.weight, features.conv.bias, features.group0.block0.conv.weight, ...,
        fc.weight, fc.bias. New tensors, of the parameters' device and dtype; computed in double precision.

    Raises:
        ValueError: not the parameters of such a network.
    """
    names = [
        '',
        *(name + '.' for group in infer_architecture(params).groups for name, _, _ in group),
    ]
    folded = OrderedDict()
    for name in names:
        wide = {
            key[len(name) :]: tensor.double()
            for key, tensor in params.items()
            if key.startswith(name) and re.fullmatch(r'conv|alpha|beta|bn\.\w+', key[len(name) :])
        }
        missing = [
            key
            for key in ('conv', 'bn.running_mean', 'bn.running_var', 'bn.weight', 'bn.bias')
            if key not in wide
        ]
        if missing:
            raise ValueError(f'not the parameters of a DiracNet: {name}{missing[0]} is missing')
        weight = wide['conv']
        if 'alpha' in wide:
            weight = dirac_weight(weight, wide['alpha'], wide['beta'])
        fused = fuse_conv_bn_weights(
            weight,
            None,
            wide['bn.running_mean'],
            wide['bn.running_var'],
            BN_EPS,
            wide['bn.weight'],
            wide['bn.bias'],
        )
        for key, tensor in zip(('weight', 'bias'), fused):
            folded[f'features.{name}conv.{key}'] = tensor.detach().to(params[name + 'conv'].dtype)
    for key in ('fc.weight', 'fc.bias'):
        folded[key] = params[key].detach().clone()
    return folded


class DiracNet(nn.Module):
    """A folded DiracNet: a chain of convolutions (with bias) and ReLUs, for inference or as a VGG-like backbone.

    `features` maps (N, in_channels, H, W) to (N, channels, 1, 1), `fc` that to logits (N, num_classes); any H and W
    that survive the pooling (32 in the ImageNet form, 4 in the CIFAR form, and more). Arguments and errors are
    those of `define_diracnet`; weights are fresh (`load_state_dict(fold(params))` brings trained ones).
    """

    def __init__(self, depth, width=1, dataset='ImageNet', *, num_classes=None, in_channels=None):
        super().__init__()
        self._build(make_architecture(depth, width, dataset, num_classes, in_channels))

    @classmethod
    def from_state_dict(cls, state_dict):
        """The module that a folded state dict fits, with its weights. Raises ValueError if it is none."""
        net = cls.__new__(cls)
        nn.Module.__init__(net)
        net._build(cls._infer(state_dict))
        net.to(state_dict['fc.weight'].dtype).load_state_dict(state_dict)
        return net

    _infer = staticmethod(infer_architecture)

    def _build(self, architecture):
        self.architecture = architecture
        features = OrderedDict()
        if architecture.form == 'imagenet':
            features['conv'] = nn.Conv2d(
                architecture.in_channels, architecture.widths[0], 7, stride=2, padding=3
            )
            features['max_pool0'] = nn.MaxPool2d(3, 2, 1)
        else:
            features['conv'] = nn.Conv2d(
                architecture.in_channels, architecture.widths[0], 3, padding=1
            )
        for g, group in enumerate(architecture.groups):
            if g > 0:
                features[f'max_pool{g}'] = nn.MaxPool2d(2)
            features[f'group{g}'] = nn.Sequential(
                OrderedDict(
                    (
                        name.split('.')[1],
                        nn.Sequential(
                            OrderedDict(
                                relu=nn.ReLU(inplace=True),
                                conv=nn.Conv2d(inside, out, 3, padding=1),
                            )
                        ),
                    )
                    for name, inside, out in group
                )
            )
        features['last_relu'] = nn.ReLU(inplace=True)
        features['avg_pool'] = nn.AdaptiveAvgPool2d(1)
        self.features = nn.Sequential(features)
        self.fc = nn.Linear(architecture.widths[-1], architecture.num_classes)

    def forward(self, inputs):
        return self.fc(self.features(inputs).flatten(1))


def _published(name):
    """The folded weights of a published file, from torch.hub's cache or fetched to there, with the hash in its name checked."""
    url = model_urls[name]
    file_name = url.rsplit('/', 1)[1]
    prefix = torch.hub.HASH_REGEX.search(file_name)[1]
    path = os.path.join(torch.hub.get_dir(), 'checkpoints', file_name)
    if os.path.exists(path):
        with open(path, 'rb') as file:
            digest = hashlib.sha256(file.read()).hexdigest()
        if not digest.startswith(prefix):  # torch.hub takes what is there unseen
            raise RuntimeError(
                f'{path} is not the file of {url}: its SHA-256 begins with {digest[:8]} instead of {prefix}; remove it'
            )
    else:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, path, prefix)
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            raise RuntimeError(
                f'{url} could not be fetched ({error}); get it by other means, save it as {path}, and see that its SHA-256 '
                f'begins with {prefix}'
            ) from error
    return torch.load(path, map_location='cpu', weights_only=True)


def _folded(name, depth, pretrained, **kwargs):
    model = DiracNet(depth, **kwargs)
    if pretrained:
        weights = _published(name)
        found = infer_architecture(weights)
        if found != model.architecture:
            raise ValueError(
                f'the published weights of {name} are for {found.num_classes} classes, {found.in_channels} channels and width '
                f'{found.width}: pretrained=True goes without other arguments'
            )
        model.load_state_dict(weights)
    return model


def diracnet18(pretrained=False, **kwargs):
    """A folded DiracNet-18 for ImageNet, 224 x 224 (11,511,784 parameters).

    Args:
        pretrained: with the published weights (errors, as the paper's authors report: 30.37 % top-1, 10.88 % top-5), fetched once
            into torch.hub's cache, with a progress bar.
        kwargs: other keyword arguments are those of DiracNet.

    Raises:
        RuntimeError: the file can't be fetched, or is not the published one; the message says what to put where.
    """
    return _folded('diracnet18', 18, pretrained, **kwargs)


def diracnet34(pretrained=False, **kwargs):
    """A folded DiracNet-34 for ImageNet, 224 x 224; see diracnet18."""
    return _folded('diracnet34', 34, pretrained, **kwargs)

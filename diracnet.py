"""DiracNets, version 2: plain chains of convolutions that train like residual networks.

    f, params = define_diracnet(depth=34, width=2, dataset='CIFAR10')
    logits = f(images, params, mode=False)  # mode=True: use batch statistics, update running ones

    folded = DiracNet(34, 2, 'CIFAR10')     # the same function, made of convolutions and ReLUs
    folded.load_state_dict(fold(params))

    model = diracnet18(pretrained=True)     # a folded DiracNet-18 with ImageNet weights

Source: Zagoruyko and Komodakis, arXiv 1706.00388. Needs torch, diracconv.py, diracparams.py.
"""

import re
from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

import diracparams
from diracconv import dirac_weight, in_double, refuse_script
from diracparams import Architecture, BnInit, Params, Scale, check, copy_tensors

BN_EPS, BN_MOMENTUM = 1e-5, 0.1
Function = Callable[..., Tensor]  # such as f(inputs, params, mode)

# --- the network -----------------------------------------------------------------------------


def relu_conv_bn(x: Tensor, params: Params, name: str, mode: bool, norm: Function) -> Tensor:
    """A block: (N, in, H, W) to (N, out, H, W). Overwrites x."""
    x = F.conv2d(relu(x), params[f'{name}.conv'], padding=1)
    return batch_norm(x, params, f'{name}.bn', mode, norm)


def chain(
    architecture: Architecture,
    inputs: Tensor,
    params: Params,
    mode: bool,
    norm: Function = F.batch_norm,
    block: Function = relu_conv_bn,
) -> Tensor:
    """A plain chain of blocks.

    Args:
        inputs: (N, in_channels, H, W), normalized images.
        params: flat dict, as `define_diracnet` makes it.
        mode: True, in training, uses batch statistics and updates the running ones in place; False
            uses the running ones.
        norm: F.batch_norm, or another function with its arguments.
        block: `relu_conv_bn`, or another function with its arguments.

    Returns:
        logits, (N, num_classes).
    """
    if architecture.form == 'cifar':
        x = F.conv2d(inputs, params['conv'], padding=1)  # (N, widths[0], H, W)
        x = batch_norm(x, params, 'bn', mode, norm)
    else:
        x = F.conv2d(inputs, params['conv'], stride=2, padding=3)
        x = batch_norm(x, params, 'bn', mode, norm)
        x = F.max_pool2d(x, 3, 2, 1)  # (N, widths[0], H / 4, W / 4)
    for g, group in enumerate(architecture.groups):
        if g > 0:
            x = F.max_pool2d(x, 2)  # H and W halve
        for name, _, _ in group:
            x = block(x, params, name, mode, norm)
    x = F.adaptive_avg_pool2d(relu(x), 1).flatten(1)  # (N, C)
    return F.linear(x, params['fc.weight'], params['fc.bias'])


def dirac_chain(
    architecture: Architecture,
    inputs: Tensor,
    params: Params,
    mode: bool,
    norm: Function = F.batch_norm,
    compute: Function = chain,
) -> Tensor:
    """A DiracNet: a chain whose blocks have Dirac weights; without alpha and beta, the plain chain
    that the paper compares with. Arguments as for `chain`; `compute` is `chain` or its equal."""
    # From here on, NAME.conv is the effective weight.
    params = {**params, **dirac_weights(architecture, params)}
    return compute(architecture, inputs, params, mode, norm)


def dirac_weights(architecture: Architecture, params: Params) -> Params:
    """The effective weights of the blocks with alpha and beta, by the keys of the convolutions.

    The weights of all blocks of one shape are computed together, which is faster: they are the
    groups of one large weight. torch.compile makes one kernel for each weight instead.
    """
    stacks, weights = {}, {}
    for name, *channels in sum(architecture.groups, []):
        if f'{name}.alpha' in params or f'{name}.beta' in params:
            key = name if torch.compiler.is_compiling() else tuple(channels)
            stacks.setdefault(key, []).append(name)
    for names in stacks.values():
        stacked = [
            torch.cat([params[f'{name}.{part}'] for name in names])
            for part in ('conv', 'alpha', 'beta')
        ]
        effective = dirac_weight(*stacked, groups=len(names)).chunk(len(names))
        weights.update({f'{name}.conv': effective[i] for i, name in enumerate(names)})
    return weights


def relu(x: Tensor) -> Tensor:
    return F.relu(x, inplace=True)  # the backward passes before it do not need their output


def batch_norm(x: Tensor, params: Params, name: str, mode: bool, norm: Function) -> Tensor:
    weight, bias, mean, var = bn_tensors(params, name)
    return norm(x, mean, var, weight, bias, training=mode, momentum=BN_MOMENTUM, eps=BN_EPS)


def bn_tensors(params: Params, name: str) -> tuple[Tensor, ...]:
    """(weight, bias, running_mean, running_var) of a batch norm, (C,) each."""
    parts = ('weight', 'bias', 'running_mean', 'running_var')
    return tuple(params[f'{name}.{part}'] for part in parts)


# --- its parameters --------------------------------------------------------------------------


def define_diracnet(
    depth: int,
    width: float,
    dataset: str,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    form: str | None = None,
    bn_init: BnInit = 'paper',
    alpha: Scale = None,
    beta: Scale = None,
    widen_early: bool = False,
) -> tuple[Function, Params]:
    """DiracNet-DEPTH-WIDTH, version 2.

    Args:
        depth: 6n + 4 for small images (n >= 1); 18 or 34 for ImageNet.
        width: multiplies the channels of the groups, (16, 32, 64), or (64, 128, 256, 512) for
            ImageNet; the products are truncated to integers.
        dataset: a name in DATASETS; it determines the form, the channels and the classes.
        num_classes, in_channels, form: override those of the data set. The form is 'cifar' (3x3
            stem, three groups) or 'imagenet' (7x7 stem, four groups).
        bn_init, alpha, beta: initial scales, see `diracparams.initialize_scales`. Here, 'shifted'
            also sets beta to 1 / sqrt(depth), unless it is given.
        widen_early: let the last convolution before each max-pool increase the channels, not the
            first one after it. A departure from the paper.

    Returns:
        f, params: `f(inputs, params, mode)` returns logits, see `chain`. params is a flat dict
        with dotted keys; all tensors but the running statistics require gradients.

    Raises:
        ValueError: an impossible choice; the message says what is possible.
    """
    architecture = diracparams.make_architecture(
        depth, width, dataset, num_classes, in_channels, form, widen_early
    )
    params = diracparams.chain_params(architecture, diracparams.dirac_conv_params)
    if bn_init == 'shifted' and beta is None:
        beta = 'depth'
    diracparams.initialize_scales(params, architecture.depth, bn_init, alpha, beta)
    return partial(dirac_chain, architecture), params


class Network(nn.Module):
    """A pair f, params as a module whose state-dict keys are the keys of params.

    Args:
        f: f(inputs, params, mode); mode is this module's `training`.
        params: flat dict. Tensors that require gradients become parameters, the others buffers.
            The module shares their memory, but has gradients of its own.

    Its batch norms are not modules, so tools that look for them do nothing, without an error:
    `swa_utils.update_bn`, `convert_sync_batchnorm`; see docs/export.md for what to do instead.
    """

    __prepare_scriptable__ = refuse_script

    def __init__(self, f: Function, params: Params) -> None:
        super().__init__()
        self.f, self.owners = f, []
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
            self.owners.append((key, module, name))

    def params(self) -> Params:
        """The flat dict with the module's own tensors."""
        return {key: getattr(module, name) for key, module, name in self.owners}

    def forward(self, inputs: Tensor) -> Tensor:
        return self.f(inputs, self.params(), self.training)


# --- the folded network ----------------------------------------------------------------------


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
        ValueError: a tensor is missing or unknown, or a running variance is negative or NaN.
    """

    def folded_conv(params, prefix):
        weight = params[f'{prefix}conv']
        if f'{prefix}alpha' in params or f'{prefix}beta' in params:
            weight = dirac_weight(weight, params[f'{prefix}alpha'], params[f'{prefix}beta'])
        return fold_batch_norm(weight, params, f'{prefix}bn')

    return fold_chain(params, folded_conv, ('conv', 'alpha', 'beta', 'bn', 'fc'), DiracNet.prefix)


@torch.no_grad()
def fold_chain(
    params: Params, folded_conv: Function, known: tuple[str, ...], folded_prefix: str
) -> Params:
    """The folded state dict of a chain; see `fold`.

    Args:
        folded_conv: folded_conv(params, prefix) returns (weight, bias) of PREFIXconv.
        known: what a key may begin with, after the name of its block.
        folded_prefix: of the keys of the convolutions.
    """
    folded = OrderedDict()
    try:
        doubles = {key: in_double(params[key]) for key in params if key[:3] != 'eye'}
        for key in doubles:
            prefix, name = re.fullmatch(r'(group\d+\.block\d+\.)?(.*)', key).groups('')
            check(name.partition('.')[0] in known, f'{key} is unknown: it cannot be folded')
            check(f'{prefix}conv' in doubles, f'{prefix}conv is missing')
            if name == 'conv':
                for part, tensor in zip(('weight', 'bias'), folded_conv(doubles, prefix)):
                    folded[f'{folded_prefix}{key}.{part}'] = tensor.to(params[key])
        for key in ('fc.weight', 'fc.bias'):
            folded[key] = params[key].detach().clone()
    except (KeyError, AttributeError) as error:
        raise ValueError(f'not the parameters of a DiracNet: {error}') from None
    return folded


def fold_batch_norm(weight: Tensor, params: Params, name: str) -> tuple[Tensor, Tensor]:
    """The (weight, bias) of a convolution that includes the batch norm `name` after it.

    weight is (out, in, *kernel), in double precision, as are params.
    """
    scale, shift, mean, var = bn_tensors(params, name)
    is_valid = var.is_meta or (var >= 0).all()
    check(is_valid, f'{name}.running_var has negative values or NaN')
    return fuse_conv_bn_weights(weight, None, mean, var, BN_EPS, scale, shift)


class DiracNet(nn.Module):
    """A folded DiracNet: a chain of convolutions with bias and ReLUs, for inference.

    `features` maps (N, in_channels, H, W) to (N, channels, 1, 1), and `fc` that to logits
    (N, num_classes). H and W are at least 32 in the ImageNet form and 4 in the CIFAR form.
    The arguments (choices: num_classes, in_channels, form, widen_early) and their errors are as for
    `define_diracnet`. The weights are random until `load_state_dict(fold(params))` loads trained
    ones.
    """

    prefix = 'features.'  # of the keys of the convolutions

    def __init__(
        self, depth: int, width: float = 1, dataset: str = 'ImageNet', **choices: int | str | None
    ) -> None:
        super().__init__()
        self.architecture = diracparams.make_architecture(depth, width, dataset, **choices)
        layers = folded_layers(self.architecture, 'relu', partial(ReLU, inplace=True))
        layers.update(last_relu=ReLU(inplace=True), avg_pool=nn.AdaptiveAvgPool2d(1))
        self.features = nn.Sequential(layers)
        self.fc = nn.Linear(self.architecture.widths[-1], self.architecture.num_classes)

    @classmethod
    def from_state_dict(cls, state_dict: Params) -> 'DiracNet':
        """The module for a folded state dict, with its weights. Raises ValueError if none fits."""
        # What is read overrides all that the data set would determine.
        net = cls(dataset='CIFAR10', **diracparams.read_network(state_dict, cls.prefix))
        copy_tensors(state_dict, net.to(state_dict['fc.weight'].dtype))
        return net

    def forward(self, inputs: Tensor) -> Tensor:
        return self.fc(self.features(inputs).flatten(1))


class ReLU(nn.ReLU):
    """`relu` as a module."""

    def forward(self, input: Tensor) -> Tensor:
        return relu(input)


def folded_layers(
    architecture: Architecture, name: str, activation: Callable[[], nn.Module], factor: int = 1
) -> OrderedDict:
    """The layers of a folded network up to its last convolution: conv, group0, max_pool1, ... Each
    block begins with an activation of that name, for `factor` times the channels."""
    in_channels, stem_width = architecture.in_channels, architecture.widths[0]
    layers = OrderedDict()
    if architecture.form == 'imagenet':
        layers['conv'] = nn.Conv2d(in_channels, stem_width, 7, stride=2, padding=3)
        layers['max_pool0'] = nn.MaxPool2d(3, 2, 1)
    else:
        layers['conv'] = nn.Conv2d(in_channels, stem_width, 3, padding=1)
    for g, blocks in enumerate(architecture.groups):
        if g > 0:
            layers[f'max_pool{g}'] = nn.MaxPool2d(2)
        group = OrderedDict()
        for block, inside, out in blocks:
            conv = nn.Conv2d(factor * inside, out, 3, padding=1)
            parts = OrderedDict([(name, activation()), ('conv', conv)])
            group[block.removeprefix(f'group{g}.')] = nn.Sequential(parts)
        layers[f'group{g}'] = nn.Sequential(group)
    return layers


def diracnet18(pretrained: bool = False, **kwargs) -> DiracNet:
    """A folded DiracNet-18 for ImageNet, 224 x 224 pixels, 11,511,784 parameters.

    Args:
        pretrained: load the published weights (30.37 % top-1 and 10.88 % top-5 error, reported by
            the paper's authors). They are downloaded once, to torch.hub's cache.
        kwargs: keyword arguments of DiracNet.

    Raises:
        RuntimeError: the file cannot be downloaded or is not the published one, or the arguments
            do not fit it.
    """
    return _published('diracnet18', DiracNet(18, **kwargs), pretrained)


def diracnet34(pretrained: bool = False, **kwargs) -> DiracNet:
    """A folded DiracNet-34 for ImageNet, 224 x 224 pixels; see `diracnet18`."""
    return _published('diracnet34', DiracNet(34, **kwargs), pretrained)


def _published(name, net, pretrained):
    if pretrained:
        net.load_state_dict(diracparams.published_weights(name))
    return net


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
        RuntimeError: the file in weights/ is missing.
    """
    make = DiracNet if folded else lambda *args, **more: Network(*define_diracnet(*args, **more))
    if not pretrained:
        check(depth is not None, 'depth is missing: only pretrained networks have one of their own')
        return make(depth, 1 if width is None else width, dataset, **kwargs)
    content = diracparams.trained_weights(dataset)
    own, tensors = content['network'], content['state_dict']
    for name, value in {'depth': depth, 'width': width, **kwargs}.items():
        check(value in (None, own.get(name)), f'{name} {value!r} does not fit {dataset}: {own}')
    net = make(**{name: value for name, value in own.items() if name != 'model'})
    copy_tensors(fold(tensors) if folded else tensors, net)
    net.classes, net.preprocessing = content['classes'], content['preprocessing']
    return net

"""Residual networks to compare DiracNets with. Like a DiracNet, each is a pair f, params.

    f, params = define_resnet(depth=20, width=1, dataset='CIFAR10')
    f, params = define_wide_resnet(depth=28, width=10, dataset='CIFAR10')

The keys of params are those of torchvision's ResNets (conv1.weight, bn1.weight,
layer1.0.conv1.weight, ..., fc.weight), so torchvision's state dicts load.

Sources: He et al., arXiv 1512.03385 (ResNet); Zagoruyko and Komodakis, arXiv 1605.07146 (Wide
ResNet).
"""

from functools import partial

import torch
import torch.nn.functional as F

from diracconv import ALPHA, BETA, dirac_weight
from diracnet import batch_norm, relu
from diracparams import (
    BASE_WIDTHS,
    DATASETS,
    IMAGENET_BLOCKS,
    bn_params,
    check,
    conv_params,
    flatten,
    initialize_scales,
    linear_params,
    make_architecture,
)

# The end of a residual block: batch norm before or after the addition, then a ReLU or none.
# torch-residual-networks compares all four.
BLOCKS = ('bn-add-relu', 'bn-add', 'add-bn-relu', 'add-bn')
BOTTLENECK_BLOCKS = {50: (3, 4, 6, 3)}  # blocks of each group, by depth


# --- the network -----------------------------------------------------------------------------


def residual(form, counts, block, inputs, params, mode, norm=F.batch_norm, *, preactivated=False):
    """A residual network as a function: f = partial(residual, form, counts, block).

    Args:
        form: 'cifar' or 'imagenet', as in `diracnet.Architecture`.
        counts: the number of blocks in each group.
        block: function (x, params, name, stride, mode, norm) of one block.
        inputs, params, mode, norm: as for `diracnet.chain`.
        preactivated: blocks begin with batch norm and ReLU. The network then has its own batch
            norm and ReLU after the last block instead of before the first.

    Returns:
        logits, (N, num_classes).
    """
    large = form == 'imagenet'
    x = conv(inputs, params, 'conv1', stride=2 if large else 1)
    if not preactivated:
        x = relu(batch_norm(x, params, 'bn1', mode, norm))
    if large:
        x = F.max_pool2d(x, 3, 2, 1)  # (N, w0, H / 4, W / 4)
    for g, count in enumerate(counts):
        for b in range(count):
            stride = 2 if g > 0 and b == 0 else 1
            x = block(x, params, f'layer{g + 1}.{b}', stride, mode, norm)
    if preactivated:
        x = relu(batch_norm(x, params, 'bn1', mode, norm))
    x = F.adaptive_avg_pool2d(x, 1).flatten(1)
    return F.linear(x, params['fc.weight'], params['fc.bias'])


def basic_block(x, params, name, stride, mode, norm, end):
    """Two 3x3 convolutions; `end` is one of BLOCKS. (N, C, H, W) to (N, C', H / s, W / s)."""
    y = conv(x, params, f'{name}.conv1', stride)
    y = relu(batch_norm(y, params, f'{name}.bn1', mode, norm))
    y = conv(y, params, f'{name}.conv2')
    skip = shortcut(x, params, name, stride, y.shape[1], mode, norm)
    if end.startswith('bn-add'):
        y = batch_norm(y, params, f'{name}.bn2', mode, norm) + skip
    else:
        y = batch_norm(y + skip, params, f'{name}.bn2', mode, norm)
    return F.relu(y) if end.endswith('relu') else y


def bottleneck_block(x, params, name, stride, mode, norm):
    """Convolutions 1x1, 3x3 and 1x1. (N, C, H, W) to (N, C', H / s, W / s)."""
    y = conv(x, params, f'{name}.conv1')
    y = relu(batch_norm(y, params, f'{name}.bn1', mode, norm))
    y = conv(y, params, f'{name}.conv2', stride)
    y = relu(batch_norm(y, params, f'{name}.bn2', mode, norm))
    y = conv(y, params, f'{name}.conv3')
    y = batch_norm(y, params, f'{name}.bn3', mode, norm)
    return F.relu(y + shortcut(x, params, name, stride, y.shape[1], mode, norm))


def preactivated_block(x, params, name, stride, mode, norm, dropout):
    """Batch norm and ReLU before each of two 3x3 convolutions, dropout between the convolutions.

    (N, C, H, W) to (N, C', H / s, W / s). A projection starts after the first ReLU.
    """
    y = relu(batch_norm(x, params, f'{name}.bn1', mode, norm))
    start = y if f'{name}.downsample.0.weight' in params else x
    y = conv(y, params, f'{name}.conv1', stride)
    y = relu(batch_norm(y, params, f'{name}.bn2', mode, norm))
    if dropout:
        y = F.dropout(y, dropout, training=mode)
    y = conv(y, params, f'{name}.conv2')
    return y + shortcut(start, params, name, stride, y.shape[1], mode, norm)


def shortcut(x, params, name, stride, channels, mode, norm):
    """The projection of a block, or else the identity, strided and zero-padded (option A)."""
    projection = f'{name}.downsample'
    if f'{projection}.0.weight' in params:
        x = conv(x, params, f'{projection}.0', stride)
        if f'{projection}.1.weight' in params:
            x = batch_norm(x, params, f'{projection}.1', mode, norm)
        return x
    if stride > 1:
        x = x[:, :, ::stride, ::stride]
    if channels > x.shape[1]:
        x = F.pad(x, (0, 0, 0, 0, 0, channels - x.shape[1]))
    return x


def conv(x, params, name, stride=1):
    """A convolution with an odd kernel, padded to keep the size; Dirac if there is an alpha."""
    weight = params[f'{name}.weight']
    if f'{name}.alpha' in params:
        weight = dirac_weight(weight, params[f'{name}.alpha'], params[f'{name}.beta'])
    return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)


# --- its definition --------------------------------------------------------------------------


def define_resnet(depth, width, dataset, *, block=BLOCKS[0], dirac=False, **choices):
    """A ResNet with basic blocks.

    On small images its shortcuts have no parameters (option A). On ImageNet its parameters have the
    names and shapes of those of torchvision's ResNet-18 and -34.

    Args:
        depth: 6n + 2 for small images (n >= 1); 18 or 34 for ImageNet.
        width, dataset, choices (num_classes, in_channels, form): as for `diracnet.define_diracnet`.
        block: one of BLOCKS.
        dirac: the convolutions of the blocks have Dirac weights, with keys like
            layer1.0.conv1.alpha and layer1.0.conv1.beta.

    Returns:
        f, params, as from `diracnet.define_diracnet`.

    Raises:
        ValueError: a choice is impossible; the message says what is possible.
    """
    architecture = architecture_of_width(width, dataset, **choices)
    form, widths = architecture.form, architecture.widths
    check_depth('ResNet', form, depth, 2, IMAGENET_BLOCKS)
    check(block in BLOCKS, f'block {block!r} does not exist: choose from {", ".join(BLOCKS)}')
    counts = [(depth - 2) // 6] * 3 if form == 'cifar' else IMAGENET_BLOCKS[depth]

    def block_params(inside, out):
        tree = {
            'conv1': conv_tree(inside, out, 3, dirac),
            'bn1': bn_tree(out),
            'conv2': conv_tree(out, out, 3, dirac),
            'bn2': bn_tree(out),
        }
        if form == 'imagenet' and inside != out:
            tree['downsample'] = {'0': conv_tree(inside, out, 1), '1': bn_tree(out)}
        return tree

    params = make_params(architecture, counts, widths, widths[0], block_params)
    return partial(residual, form, counts, partial(basic_block, end=block)), params


def define_resnet_dirac(
    depth, width, dataset, *, block=BLOCKS[0], alpha=None, beta=None, **choices
):
    """A ResNet with Dirac weights in its blocks: the paper's second use of them.

    alpha and beta are their initial scales, see `diracparams.initialize_scales`. Other arguments,
    returns and errors are those of `define_resnet`.
    """
    f, params = define_resnet(depth, width, dataset, block=block, dirac=True, **choices)
    return f, initialize_scales(params, depth, alpha=alpha, beta=beta)


def define_wide_resnet(depth, width, dataset, *, dropout=0.0, **choices):
    """A Wide ResNet, WRN-DEPTH-WIDTH.

    On small images its blocks are preactivated. On ImageNet it is WRN-50-WIDTH-bottleneck: the
    inner 3x3 convolutions are `width` times as wide as those of ResNet-50. The parameters of
    WRN-50-2 have the names and shapes of those of torchvision's wide_resnet50_2.

    Args:
        depth: 6n + 4 for small images (n >= 1); 50 for ImageNet.
        width, dataset, choices (num_classes, in_channels, form): as for `diracnet.define_diracnet`.
        dropout: probability between the two convolutions of a block, at least 0 and below 1.
            Bottleneck blocks have no dropout.

    Returns:
        f, params, as from `diracnet.define_diracnet`.

    Raises:
        ValueError: a choice is impossible; the message says what is possible.
    """
    architecture = architecture_of_width(width, dataset, **choices)
    check_depth('Wide ResNet', architecture.form, depth, 4, BOTTLENECK_BLOCKS)
    has_room = architecture.form == 'cifar' or dropout == 0
    check(has_room, f'dropout {dropout} is impossible: bottleneck blocks have no dropout')
    check(0 <= dropout < 1, f'dropout {dropout} is impossible: it must be at least 0 and below 1')
    if architecture.form == 'imagenet':
        return define_bottleneck(architecture, BOTTLENECK_BLOCKS[depth])
    return define_preactivated(architecture, [(depth - 4) // 6] * 3, dropout)


def define_preactivated(architecture, counts, dropout):
    """f, params of a Wide ResNet for small images."""

    def block_params(inside, out):
        tree = {
            'bn1': bn_tree(inside),
            'conv1': conv_tree(inside, out, 3),
            'bn2': bn_tree(out),
            'conv2': conv_tree(out, out, 3),
        }
        if inside != out:
            tree['downsample'] = {'0': conv_tree(inside, out, 1)}
        return tree

    stem_width = BASE_WIDTHS['cifar'][0]
    params = make_params(
        architecture, counts, architecture.widths, stem_width, block_params, preactivated=True
    )
    block = partial(preactivated_block, dropout=dropout)
    return partial(residual, 'cifar', counts, block, preactivated=True), params


def define_bottleneck(architecture, counts):
    """f, params of a Wide ResNet for ImageNet."""

    def block_params(inside, out):
        inner = int(out // 4 * architecture.width)
        tree = {
            'conv1': conv_tree(inside, inner, 1),
            'bn1': bn_tree(inner),
            'conv2': conv_tree(inner, inner, 3),
            'bn2': bn_tree(inner),
            'conv3': conv_tree(inner, out, 1),
            'bn3': bn_tree(out),
        }
        if inside != out:
            tree['downsample'] = {'0': conv_tree(inside, out, 1), '1': bn_tree(out)}
        return tree

    base_widths = BASE_WIDTHS['imagenet']
    widths = [4 * base for base in base_widths]
    params = make_params(architecture, counts, widths, base_widths[0], block_params)
    return partial(residual, 'imagenet', counts, bottleneck_block), params


def make_params(architecture, counts, widths, stem_width, block_params, preactivated=False):
    """The flat params of a residual network.

    Args:
        architecture: gives the form and the channels of the inputs and the logits.
        counts, widths: the blocks and the output channels of each group.
        stem_width: the output channels of the first convolution.
        block_params: function of a block's (in_channels, out_channels) that makes its tensors.
        preactivated: as for `residual`.
    """
    stem_size = 7 if architecture.form == 'imagenet' else 3
    tree = {'conv1': conv_tree(architecture.in_channels, stem_width, stem_size)}
    if not preactivated:
        tree['bn1'] = bn_tree(stem_width)
    channels = stem_width
    for g, (count, out) in enumerate(zip(counts, widths)):
        group = {}
        for b in range(count):
            group[str(b)] = block_params(channels, out)
            channels = out
        tree[f'layer{g + 1}'] = group
    if preactivated:
        tree['bn1'] = bn_tree(channels)
    tree['fc'] = linear_params(channels, architecture.num_classes)
    return flatten(tree)


def conv_tree(in_channels, out_channels, kernel_size, dirac=False):
    tree = {'weight': conv_params(in_channels, out_channels, kernel_size)}
    if dirac:
        tree['alpha'] = torch.full((out_channels,), ALPHA)
        tree['beta'] = torch.full((out_channels,), BETA)
    return tree


def bn_tree(channels):
    # bn_params draws a random weight. Residual networks start from 1, but the draw stays: the
    # committed runs depend on the order of draws.
    return {**bn_params(channels), 'weight': torch.ones(channels)}


def architecture_of_width(width, dataset, num_classes=None, in_channels=None, form=None):
    """The Architecture of a DiracNet of this width; all but its depth fits a residual network too.

    Raises ValueError for an impossible choice.
    """
    own_form = DATASETS[dataset][0] if dataset in DATASETS else 'cifar'
    depth = 18 if (form or own_form) == 'imagenet' else 10
    return make_architecture(depth, width, dataset, num_classes, in_channels, form)


def check_depth(name, form, depth, remainder, imagenet_depths):
    """Raise ValueError for an impossible depth: small images need 6n + remainder."""
    if form == 'imagenet':
        is_possible, possible = depth in imagenet_depths, ' or '.join(map(str, imagenet_depths))
    else:
        is_possible = depth >= 6 + remainder and depth % 6 == remainder
        possible = f'6n + {remainder} with n >= 1'
    check(is_possible, f'depth {depth} is impossible for a {name}: it must be {possible}')

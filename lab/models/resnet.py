"""Networks that DiracNets are compared with, defined like them as f, params.

    f, params = define_resnet(depth=20, width=1, dataset='CIFAR10')            # He et al., arXiv 1512.03385
    f, params = define_wide_resnet(depth=28, width=10, dataset='CIFAR10')      # Zagoruyko and Komodakis, arXiv 1605.07146

Keys are those of torchvision's ResNets (conv1.weight, bn1.weight, layer1.0.conv1.weight, ..., fc.weight), whose state dicts load.
"""

import re
from functools import partial

import torch
import torch.nn.functional as F

from diracconv import ALPHA, BETA, dirac_weight
from diracnet import (
    BASE_WIDTHS,
    BN_EPS,
    BN_MOMENTUM,
    DATASETS,
    IMAGENET_BLOCKS,
    bn_params,
    conv_params,
    flatten,
    linear_params,
    make_architecture,
)

# A residual block's end: batch norm before or behind the addition, and a ReLU or none (torch-residual-networks compares the four).
BLOCKS = ('bn-add-relu', 'bn-add', 'add-bn-relu', 'add-bn')
# Blocks of each group by depth, basic (two 3x3 convolutions) or bottleneck (1x1, 3x3, 1x1).
IMAGENET = {**IMAGENET_BLOCKS, 50: (3, 4, 6, 3)}


# --- what residual networks are made of ------------------------------------------------------------------------------


def conv(x, params, name, stride=1):
    """A convolution of odd kernel, padded to keep the size (before its stride); a Dirac one where there are scales."""
    weight = params[f'{name}.weight']
    if f'{name}.alpha' in params:
        weight = dirac_weight(weight, params[f'{name}.alpha'], params[f'{name}.beta'])
    return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)


def batch_norm(x, params, name, mode, norm):
    weight, bias, mean, var = (
        params[f'{name}.{part}'] for part in ('weight', 'bias', 'running_mean', 'running_var')
    )
    return norm(x, mean, var, weight, bias, training=mode, momentum=BN_MOMENTUM, eps=BN_EPS)


def relu(x):
    return F.relu(
        x, inplace=True
    )  # batch norm, in front of every one, doesn't look at its output again


def shortcut(x, params, name, stride, channels, mode, norm):
    """Past a block: a projection if there is one, else the identity, strided and filled up with zeros (option A)."""
    if f'{name}.downsample.0.weight' in params:
        x = conv(x, params, f'{name}.downsample.0', stride)
        return (
            batch_norm(x, params, f'{name}.downsample.1', mode, norm)
            if f'{name}.downsample.1.weight' in params
            else x
        )
    if stride > 1:
        x = x[:, :, ::stride, ::stride]
    return F.pad(x, (0, 0, 0, 0, 0, channels - x.shape[1])) if channels > x.shape[1] else x


def basic_block(x, params, name, stride, mode, norm, end):
    """(N, C, H, W) to (N, C', H / stride, W / stride): two convolutions and the shortcut around them, and `end`, one of BLOCKS."""
    y = relu(
        batch_norm(conv(x, params, f'{name}.conv1', stride), params, f'{name}.bn1', mode, norm)
    )
    y = conv(y, params, f'{name}.conv2')
    past = shortcut(x, params, name, stride, y.shape[1], mode, norm)
    if end.startswith('bn-add'):
        y = batch_norm(y, params, f'{name}.bn2', mode, norm) + past
    else:
        y = batch_norm(y + past, params, f'{name}.bn2', mode, norm)
    return F.relu(y) if end.endswith('relu') else y


def bottleneck_block(x, params, name, stride, mode, norm):
    y = relu(batch_norm(conv(x, params, f'{name}.conv1'), params, f'{name}.bn1', mode, norm))
    y = relu(
        batch_norm(conv(y, params, f'{name}.conv2', stride), params, f'{name}.bn2', mode, norm)
    )
    y = batch_norm(conv(y, params, f'{name}.conv3'), params, f'{name}.bn3', mode, norm)
    return F.relu(y + shortcut(x, params, name, stride, y.shape[1], mode, norm))


def preactivated_block(x, params, name, stride, mode, norm, dropout):
    """Batch norm and ReLU before each of the two convolutions, dropout between them; a projection sees the first ReLU's output."""
    y = relu(batch_norm(x, params, f'{name}.bn1', mode, norm))
    past = y if f'{name}.downsample.0.weight' in params else x
    y = relu(
        batch_norm(conv(y, params, f'{name}.conv1', stride), params, f'{name}.bn2', mode, norm)
    )
    if dropout:
        y = F.dropout(y, dropout, training=mode)
    y = conv(y, params, f'{name}.conv2')
    return y + shortcut(past, params, name, stride, y.shape[1], mode, norm)


def residual(form, counts, block, last_norm, inputs, params, mode, norm=F.batch_norm):
    """The function of a residual network: stem, groups of blocks, global average pool, linear layer; (N, C, H, W) to (N, num_classes)."""
    x = conv(inputs, params, 'conv1', stride=2 if form == 'imagenet' else 1)
    if not last_norm:  # preactivated networks have their first batch norm in the first block
        x = relu(batch_norm(x, params, 'bn1', mode, norm))
    if form == 'imagenet':
        x = F.max_pool2d(x, 3, 2, 1)
    for g, count in enumerate(counts):
        for b in range(count):
            x = block(x, params, f'layer{g + 1}.{b}', 2 if g and not b else 1, mode, norm)
    if last_norm:
        x = relu(batch_norm(x, params, 'bn1', mode, norm))
    return F.linear(F.adaptive_avg_pool2d(x, 1).flatten(1), params['fc.weight'], params['fc.bias'])


def ones_bn(channels):
    return {**bn_params(channels), 'weight': torch.ones(channels)}


def conv_tree(in_channels, out_channels, kernel_size, dirac=False):
    tree = {'weight': conv_params(in_channels, out_channels, kernel_size)}
    if dirac:
        tree.update(
            alpha=torch.full((out_channels,), ALPHA), beta=torch.full((out_channels,), BETA)
        )
    return tree


def projection(in_channels, out_channels, normalized):
    return {
        'downsample': {
            '0': conv_tree(in_channels, out_channels, 1),
            **({'1': ones_bn(out_channels)} if normalized else {}),
        }
    }


# --- definitions -----------------------------------------------------------------------------------------------------


def check_depth(name, form, depth, remainder, imagenet):
    """Raises ValueError for an impossible depth."""
    if form == 'imagenet' and depth not in imagenet:
        raise ValueError(
            f'depth {depth} is impossible for a {name} on ImageNet: it is {" or ".join(map(str, imagenet))}'
        )
    if form == 'cifar' and (
        depth != int(depth) or depth < 6 + remainder or (depth - remainder) % 6
    ):
        near = 6 * max(round((depth - remainder) / 6), 1) + remainder
        raise ValueError(
            f'depth {depth} is impossible for a {name} of small images: it is 6n + {remainder} with n of 1 or more; the nearest is {near}'
        )


def shape_of(width, dataset, num_classes, in_channels):
    """The Architecture of a DiracNet of this width, for all but its depth. Raises ValueError."""
    return make_architecture(
        18 if DATASETS.get(dataset, ('cifar',))[0] == 'imagenet' else 10,
        width,
        dataset,
        num_classes,
        in_channels,
    )


def define_resnet(
    depth, width, dataset, *, num_classes=None, in_channels=None, block='bn-add-relu', dirac=False
):
    """A ResNet: on small images of depth 6n + 2, with parameter-free shortcuts (option A); on ImageNet ResNet-18 or -34, with
    torchvision's parameters.

    Args:
        depth, width, dataset, num_classes, in_channels, returns and errors: as for `diracnet.define_diracnet`.
        block: one of BLOCKS, the end of every block.
        dirac: Dirac weights in the convolutions of the blocks, with keys like layer1.0.conv1.alpha and .beta.
    """
    shape = shape_of(width, dataset, num_classes, in_channels)
    form, widths = shape.form, shape.widths
    check_depth('ResNet', form, depth, 2, (18, 34))
    if block not in BLOCKS:
        raise ValueError(f'block {block!r} is none of {", ".join(BLOCKS)}')
    counts = [(depth - 2) // 6] * 3 if form == 'cifar' else IMAGENET[depth]
    tree = {
        'conv1': conv_tree(shape.in_channels, widths[0], 7 if form == 'imagenet' else 3),
        'bn1': ones_bn(widths[0]),
    }
    channels = widths[0]
    for g, (count, out) in enumerate(zip(counts, widths)):
        tree[f'layer{g + 1}'] = group = {}
        for b in range(count):
            group[str(b)] = {
                'conv1': conv_tree(channels, out, 3, dirac),
                'bn1': ones_bn(out),
                'conv2': conv_tree(out, out, 3, dirac),
                'bn2': ones_bn(out),
            }
            if form == 'imagenet' and channels != out:
                group[str(b)].update(projection(channels, out, True))
            channels = out
    tree['fc'] = linear_params(channels, shape.num_classes)
    return partial(residual, form, counts, partial(basic_block, end=block), False), flatten(tree)


def define_resnet_dirac(depth, width, dataset, **options):
    """`define_resnet` with Dirac weights in its blocks: the paper's second use of them."""
    return define_resnet(depth, width, dataset, dirac=True, **options)


def define_wide_resnet(depth, width, dataset, *, num_classes=None, in_channels=None, dropout=0.0):
    """A Wide ResNet: preactivated, of depth 6n + 4, on small images; on ImageNet WRN-50-WIDTH-bottleneck, whose inner 3x3 convolutions
    are `width` times as wide as ResNet-50's (WRN-50-2 has the parameters of torchvision's wide_resnet50_2).

    Args:
        depth, width, dataset, num_classes, in_channels, returns and errors: as for `diracnet.define_diracnet`.
        dropout: probability, between the two convolutions of a block (small images alone).
    """
    shape = shape_of(width, dataset, num_classes, in_channels)
    form = shape.form
    check_depth('Wide ResNet', form, depth, 4, (50,))
    if not 0 <= dropout < 1 or (dropout and form == 'imagenet'):
        raise ValueError(
            f'dropout {dropout} is impossible: '
            + (
                'bottleneck blocks have none'
                if form == 'imagenet'
                else 'it is at least 0 and below 1'
            )
        )
    if form == 'imagenet':
        return define_bottleneck(depth, shape)
    counts, channels = [(depth - 4) // 6] * 3, 16
    tree = {'conv1': conv_tree(shape.in_channels, channels, 3)}
    for g, (count, out) in enumerate(zip(counts, shape.widths)):
        tree[f'layer{g + 1}'] = group = {}
        for b in range(count):
            group[str(b)] = {
                'bn1': ones_bn(channels),
                'conv1': conv_tree(channels, out, 3),
                'bn2': ones_bn(out),
                'conv2': conv_tree(out, out, 3),
            }
            if channels != out:
                group[str(b)].update(projection(channels, out, False))
            channels = out
    tree['bn1'] = ones_bn(channels)
    tree['fc'] = linear_params(channels, shape.num_classes)
    return partial(
        residual, form, counts, partial(preactivated_block, dropout=dropout), True
    ), flatten(tree)


def define_bottleneck(depth, shape):
    tree = {'conv1': conv_tree(shape.in_channels, 64, 7), 'bn1': ones_bn(64)}
    channels = 64
    for g, (count, inner, base) in enumerate(
        zip(IMAGENET[depth], shape.widths, BASE_WIDTHS['imagenet'])
    ):
        tree[f'layer{g + 1}'] = group = {}
        out = 4 * base
        for b in range(count):
            group[str(b)] = {
                'conv1': conv_tree(channels, inner, 1),
                'bn1': ones_bn(inner),
                'conv2': conv_tree(inner, inner, 3),
                'bn2': ones_bn(inner),
                'conv3': conv_tree(inner, out, 1),
                'bn3': ones_bn(out),
            }
            if not b:
                group[str(b)].update(projection(channels, out, True))
            channels = out
    tree['fc'] = linear_params(channels, shape.num_classes)
    return partial(residual, 'imagenet', IMAGENET[depth], bottleneck_block, False), flatten(tree)


def infer_resnet(params):
    """Model, depth, width and form of a ResNet or Wide ResNet, read off its parameters. Raises ValueError if they are of none."""
    try:
        stem, fc = params['conv1.weight'], params['fc.weight']
        blocks = [key for key in params if re.fullmatch(r'layer\d\.\d+\.conv1\.weight', key)]
        form = {3: 'cifar', 7: 'imagenet'}[stem.shape[-1]]
        first = params['layer1.0.conv1.weight']
    except KeyError as error:
        raise ValueError(
            f'not the parameters of a ResNet: {error.args[0]!r} is missing or of an unknown form'
        ) from None
    network = {'num_classes': fc.shape[0], 'in_channels': stem.shape[1]}
    if 'layer1.0.conv3.weight' in params:
        network.update(model='wrn', depth=3 * len(blocks) + 2, width=first.shape[0] / 64)
    elif form == 'cifar' and (
        len(params['bn1.weight']) != len(stem) or len(params['layer1.0.bn1.weight']) != len(first)
    ):  # preactivated
        network.update(
            model='wrn', depth=2 * len(blocks) + 4, width=fc.shape[1] / BASE_WIDTHS[form][-1]
        )
    else:
        network.update(
            model='resnet-dirac' if 'layer1.0.conv1.alpha' in params else 'resnet',
            depth=2 * len(blocks) + 2,
            width=fc.shape[1] / BASE_WIDTHS[form][-1],
        )
    network['width'] = (
        int(network['width']) if network['width'] == int(network['width']) else network['width']
    )
    return form, network

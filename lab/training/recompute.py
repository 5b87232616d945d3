"""`diracnet.chain` with less memory (--recompute).

`diracnet.chain` keeps two activations per convolution for the backward pass: the input of the
batch norm and that of the convolution. Here blocks begin with batch norm instead of ending with
it. Only the input of each batch norm is kept, and the input of the convolution after it is
recomputed from that.

This restates `diracnet.relu_conv_bn`, so `recomputed` compares what both compute before anything is
trained.
"""

from functools import partial

import torch
import torch.nn.functional as F

from diracnet import BN_EPS, BN_MOMENTUM, bn_tensors, dirac_chain, relu
from lab.memory import release_freed_memory


def recomputed(f, params, in_channels):
    """f, a function from `registry.define`, with its chain computed by `recomputed_chain`.

    Args:
        params: those of f.

    Raises:
        ValueError: f is not a DiracNet or a plain chain, or its blocks are not those that are
            computed here.
    """
    if getattr(f, 'func', None) is not dirac_chain or f.keywords:
        raise ValueError('--recompute is for the blocks of diracnet and plain, not of this model')
    size = 64 if f.args[0].form == 'imagenet' else 8
    inputs = torch.linspace(-2, 2, 2 * in_channels * size**2).view(2, in_channels, size, size).sin()
    generator = torch.Generator().manual_seed(0)
    changed = {  # a part of a block that begins as the identity must count, too
        key: tensor.detach() + torch.rand(tensor.shape, generator=generator) / 10
        for key, tensor in params.items()
    }
    outputs = []
    for chain in (f, partial(f, compute=recomputed_chain)):
        own = {key: tensor.clone() for key, tensor in changed.items()}
        # The second call sees the running statistics that the first one updated.
        outputs.append(torch.stack([chain(inputs, own, mode) for mode in (True, False)]))
    if not torch.allclose(*outputs, rtol=1e-3, atol=1e-3, equal_nan=True):
        raise ValueError(
            '--recompute computes the blocks in lab/training/recompute.py, which differ from those '
            'of diracnet.py: change both in the same way, or train without --recompute'
        )
    return partial(f, compute=recomputed_chain)


def recomputed_chain(architecture, inputs, params, mode, norm=F.batch_norm):
    """`diracnet.chain`, with one call of `recomputed_block` per block."""
    large = architecture.form == 'imagenet'
    x = F.conv2d(inputs, params['conv'], stride=2 if large else 1, padding=3 if large else 1)
    bn, pool = bn_tensors(params, 'bn'), (3, 2, 1) if large else ()
    for group in architecture.groups:
        for name, _, _ in group:
            x = recomputed_block(x, bn, params[f'{name}.conv'], mode, pool, norm)
            bn, pool = bn_tensors(params, f'{name}.bn'), ()
        pool = (2,)  # before the next group
    x = F.adaptive_avg_pool2d(activate(x, bn, mode, (), norm), 1).flatten(1)
    return F.linear(x, params['fc.weight'], params['fc.bias'])


def activate(x, bn, mode, pool=(), norm=F.batch_norm):
    """Batch norm, max-pooling if `pool` has its arguments, and ReLU: what lies between two
    convolutions.

    x: (N, C, H, W); bn: as `bn_tensors` returns it.
    """
    weight, bias, mean, var = bn
    x = norm(x, mean, var, weight, bias, training=mode, momentum=BN_MOMENTUM, eps=BN_EPS)
    if pool:
        x = F.max_pool2d(x, *pool)
    return relu(x)


def plain_block(x, bn, weight, mode, pool=(), norm=F.batch_norm):
    """`activate` and the 3x3 convolution after it: (N, C, H, W) to (N, out, H', W')."""
    return F.conv2d(activate(x, bn, mode, pool, norm), weight, padding=1)


class _RecomputedBlock(torch.autograd.Function):
    """`block` in training, keeping only its arguments: the backward pass activates x again."""

    @staticmethod
    def forward(ctx, x, bn_weight, bn_bias, running_mean, running_var, weight, pool, norm):
        ctx.save_for_backward(x, bn_weight, bn_bias, weight)
        ctx.pool, ctx.norm = pool, norm
        return plain_block(
            x, (bn_weight, bn_bias, running_mean, running_var), weight, True, pool, norm
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        *given, weight = ctx.saved_tensors
        if ctx.pool and not given[0].is_cuda and given[0].nbytes >= 2**24:
            # Before pooling, activations are larger: they do not fit where smaller ones were freed.
            release_freed_memory()
        x, bn_weight, bn_bias = (tensor.detach().requires_grad_() for tensor in given)
        with torch.enable_grad():
            bn = (bn_weight, bn_bias, None, None)  # the running statistics are updated already
            inputs = activate(x, bn, True, ctx.pool, ctx.norm)
        inner = inputs.detach().to(grad.dtype)  # autocast runs the convolution in a shorter type
        short = weight.to(grad.dtype)
        grad_inputs = torch.nn.grad.conv2d_input(inner.shape, short, grad, padding=1)
        grad_weight = torch.nn.grad.conv2d_weight(inner, weight.shape, grad, padding=1)
        del inner
        grads = torch.autograd.grad(inputs, (x, bn_weight, bn_bias), grad_inputs.to(inputs.dtype))
        return *grads, None, None, grad_weight.to(weight.dtype), None, None


def recomputed_block(x, bn, weight, mode, pool=(), norm=F.batch_norm):
    if mode and torch.is_grad_enabled():
        return _RecomputedBlock.apply(x, *bn, weight, pool, norm)
    return plain_block(x, bn, weight, mode, pool, norm)

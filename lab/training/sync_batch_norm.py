"""Batch norm over the batches of all processes, for --sync_bn."""

import torch
import torch.distributed as dist
import torch.nn.functional as F

from lab.distributed import rank, world


class _Sum(torch.autograd.Function):
    """The sum of a tensor over all processes.

    The backward pass sums gradients too: the loss of every process depends on every term.
    """

    @staticmethod
    def forward(ctx, tensor):
        tensor = tensor.clone()
        dist.all_reduce(tensor)
        return tensor

    @staticmethod
    def backward(ctx, grad):
        return _Sum.apply(grad.contiguous())


def sync_batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps):
    """F.batch_norm with statistics over the batches of all processes.

    torch's SyncBatchNorm works on GPUs only.

    x: (N, C, H, W); N may differ between processes.
    """
    if not training or world() == 1:
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    inputs = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    channels, n = x.shape[1], x.numel() // x.shape[1]
    var, mean = torch.var_mean(inputs, (0, 2, 3), correction=0)
    own = torch.cat([mean, var, mean.new_tensor([n])])  # (2 C + 1,)
    rows = [own if r == rank() else torch.zeros_like(own) for r in range(world())]
    gathered = _Sum.apply(torch.stack(rows))  # (world, 2 C + 1)
    means, variances, counts = gathered.split([channels, channels, 1], dim=1)
    share = counts / counts.sum()
    mean = (share * means).sum(0)
    var = (share * (variances + (means - mean).square())).sum(0)
    if running_mean is not None:
        with torch.no_grad():
            unbiased = var * (counts.sum() / (counts.sum() - 1))
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    scale = weight * torch.rsqrt(var + eps)
    shape = (1, channels, 1, 1)
    normalized = (inputs - mean.view(shape)) * scale.view(shape) + bias.view(shape)
    return normalized.to(x.dtype)

"""The running statistics of batch norm, computed anew over the training set (--recalibrate_bn).

Running statistics average over past steps, in which the weights were different. The errors add up
from layer to layer: a network of thousands of layers may train well and test at chance.
"""

from contextlib import closing, nullcontext

import torch

from lab.device import DTYPES, autocast
from lab.training.network import BatchNorm, batch_norm
from lab.training.passes import ProgressBar


class BatchStatistics(BatchNorm):
    """Batch norm with the statistics of the batch, also in evaluation mode."""

    def __call__(self, x, mean, var, weight, bias, training, momentum, eps):
        return super().__call__(x, mean, var, weight, bias, True, momentum, eps)


def recalibrate(module, batches, epoch, options):
    """Set running_mean and running_var to the plain averages over the training batches of `epoch`.

    This generator yields after each batch, so that the caller can save or stop the run there. The
    first batch replaces the old statistics, so the result depends only on weights, seed and epoch:
    a run that stops in this pass repeats all of it on resume.

    torch.optim.swa_utils.update_bn is of no use here: it looks for modules of type nn.BatchNorm,
    and diracnet.Network calls F.batch_norm. It also keeps dropout on, and cannot stop midway.

    Args:
        module: diracnet.Network, in any mode.
        batches: training Batches. The broken images that they already list stay listed.
        epoch: counted from 1; the pass has its order and augmentation.
    """
    dtype, autocast_dtype = DTYPES[options['dtype']]
    batches.epoch, batches.start, batches.broken_before = epoch, 0, batches.broken
    norm = BatchStatistics(batch_norm(options), momentum=1)
    with closing(ProgressBar('recalibrate', batches.n)) as bar:
        for step, (inputs, _) in enumerate(batches):
            norm.momentum = 1 / (1 + step)
            with torch.no_grad(), autocast(inputs.device, autocast_dtype), uncompiled(options):
                # mode=False turns dropout off, as in the test: dropout changes variances, so
                # statistics computed with it would not fit the activations of the test.
                module.f(inputs.to(dtype), module.params(), False, norm=norm)
            bar.update(batches.size(step))
            yield


def uncompiled(options):
    """A context without torch.compile, which would compile the blocks for every momentum."""
    return torch.compiler.set_stance('force_eager') if options['compile'] else nullcontext()

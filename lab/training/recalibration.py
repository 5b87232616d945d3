"""The running statistics of batch norm, computed anew over the training set (--recalibrate_bn).

Running statistics average over past steps, in which the weights were different. The errors add up
from layer to layer: a network of thousands of layers may train well and test at chance.
"""

from contextlib import closing

import torch

from lab.device import DTYPES, autocast
from lab.training.network import BatchNorm
from lab.training.passes import ProgressBar


class BatchStatistics:
    """A function of batch norms with the statistics of the batch, also in evaluation mode."""

    def __init__(self, function):
        self.function, self.momentum = function, 1

    def __call__(self, x, mean, var, weight, bias, training, momentum, eps):
        return self.function(x, mean, var, weight, bias, True, self.momentum, eps)


# Statistics of different batches differ, and so do those of the layers after them: their averages
# fit no single batch. Through thousands of layers that adds up, so batches are as large as memory
# allows: this many pixels. All digits are one batch, 2,048 images of CIFAR, and a batch of ImageNet
# stays as it is.
PIXELS = 2**21


def recalibrate(module, batches, epoch, options):
    """Set running_mean and running_var to those of the training images of `epoch`.

    They are the averages over large batches, weighted by size. This generator yields after each
    of them, so that the caller can save or stop the run there. The first replaces the old
    statistics, so the result depends only on weights, seed and epoch: a run that stops in this
    pass repeats all of it on resume.

    torch.optim.swa_utils.update_bn is of no use here: it looks for modules of type nn.BatchNorm,
    and diracnet.Network calls F.batch_norm. It also keeps dropout on, and cannot stop midway.

    Args:
        module: diracnet.Network, in any mode.
        batches: training Batches. The broken images that they already list stay listed.
        epoch: counted from 1; the pass has its order and augmentation.
    """
    dtype, autocast_dtype = DTYPES[options['dtype']]
    batches.epoch, batches.start, batches.broken_before = epoch, 0, batches.broken
    norm = BatchStatistics(BatchNorm(options).function)
    done = 0  # images
    with closing(ProgressBar('recalibrate', batches)) as bar:
        for inputs, size in joined(batches):
            done += size
            norm.momentum = size / done
            with torch.no_grad(), autocast(inputs.device, autocast_dtype):
                # mode=False turns dropout off, as in the test: dropout changes variances, so
                # statistics computed with it would not fit the activations of the test.
                module.f(inputs.to(dtype), module.params(), False, norm=norm)
            bar.update(size)
            yield


def joined(batches):
    """Successive batches joined to inputs of about PIXELS pixels, (N, C, H, W), and the number of
    their images in all processes."""
    waiting, size = [], 0
    for step, (inputs, _) in enumerate(batches):
        waiting.append(inputs)
        size += batches.size(step)
        height, width = inputs.shape[2:]
        is_full = (size + batches.batch_size) * height * width > PIXELS
        if is_full or step == len(batches) - 1:
            yield torch.cat(waiting), size
            waiting, size = [], 0


FEW_STEPS = 100  # the running statistics still hold 0.9 ** 100 of their initial values


def describe_lag(stats, steps):
    """A hint, in words, if the running statistics seem to lag behind the network.

    Args:
        stats: what an epoch's line of the log has.
        steps: of an epoch.

    Returns:
        '' if there is no sign of it: only in a short first epoch may a network be near chance in
        the test although it is not in training.
    """
    chance = 100 / stats['num_classes']
    training, test = ((stats[name] - chance) / (100 - chance) for name in ('train_acc', 'test_acc'))
    is_early = stats['epoch'] == 1 and steps < FEW_STEPS
    lags = is_early and test < 0.1 and training > test + 0.1
    if not lags or stats['recalibrate_bn']:
        return ''
    return (
        f'the test is near chance, as the running statistics of batch norm lag after {steps} '
        'steps; it passes after more epochs, and --recalibrate_bn avoids it'
    )

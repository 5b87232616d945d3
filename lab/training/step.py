"""A training step up to its gradients: computed as it is written, or replayed as a CUDA graph.

Python starts each kernel of a step, which takes longer than the kernels of a small network do. A
CUDA graph holds all of them and starts them at once.
"""

from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F

from lab import cuda
from lab.device import DTYPES, autocast
from lab.distributed import world
from lab.errors import one_line


def loss_and_logits(model, inputs, targets, options):
    """Mean loss and logits, (N, classes), of a batch."""
    dtype, autocast_dtype = DTYPES[options['dtype']]
    smoothing = options['label_smoothing'] if model.training else 0
    with autocast(inputs.device, autocast_dtype):
        inputs = inputs.to(dtype)
        logits = model(inputs)
        if options['tta'] == 'flip' and not model.training:
            logits = (logits + model(inputs.flip(3))) / 2
    return F.cross_entropy(logits.to(dtype), targets, label_smoothing=smoothing), logits


def make_step(model, options, scaler, batch_size, say):
    """The function step(inputs, targets, weight=1) that computes loss and logits of a batch, and
    the gradients of weight * loss, which replace those of the batch before. With --graph, it
    replays batches of `batch_size` as a CUDA graph, if a graph can hold them."""
    step = partial(compute_gradients, model, options, scaler)
    if not options['graph']:
        return step
    reason = why_not_graphed(options)
    if reason:
        say(f'--graph: these steps are computed one kernel at a time, because of {reason}')
        return step
    return GraphedStep(step, list(model.parameters()), batch_size, say)


def compute_gradients(model, options, scaler, inputs, targets, weight=1):
    """Mean loss () and logits (N, classes) of a batch, detached. With --accumulate, its parts are
    computed one after another."""
    model.zero_grad()
    losses, logits = [], []
    parts = list(zip(inputs.chunk(options['accumulate']), targets.chunk(options['accumulate'])))
    for n, (images, labels) in enumerate(parts, 1):
        # Gradients are averaged over the processes once, with those of the last part.
        is_silent = n < len(parts) and world() > 1
        with model.no_sync() if is_silent else nullcontext():
            loss, output = loss_and_logits(model, images, labels, options)
            share = len(labels) / len(targets)
            scaler.scale(loss * (weight * share)).backward()
        losses.append(loss.detach() * share)
        logits.append(output.detach())
    return sum(losses), torch.cat(logits)


def why_not_graphed(options):
    """What a CUDA graph of the training steps cannot hold; '' if it can hold all of them."""
    reasons = {
        'several processes': world() > 1,  # that wait for each other
        '--dropout': options.get('dropout'),  # seeded in each step
        '--bn_momentum cumulative': options['bn_momentum'] == 'cumulative',  # changes in each step
    }
    return ', '.join(reason for reason, is_given in reasons.items() if is_given)


class GraphedStep:
    """A step that is captured once and then replayed, for batches of one size. The first steps,
    and smaller batches, are computed as usual. If capturing fails, all are, and one line says why.
    A replayed step has weight 1, as all have in one process.

    Args:
        step: step(inputs, targets) returns (loss, logits), and sets the gradients of `parameters`.
    """

    FIRST = 3  # steps before the capture, in which libraries choose their kernels

    def __init__(self, step, parameters, batch_size, say):
        self.step, self.parameters, self.batch_size, self.say = step, parameters, batch_size, say
        self.n_steps, self.replay, self.has_failed = 0, None, False

    def __call__(self, inputs, targets, weight=1):
        if len(targets) != self.batch_size or self.has_failed:
            return self.step(inputs, targets, weight)
        self.n_steps += 1
        if self.n_steps <= self.FIRST:
            with cuda.beside():
                return self.step(inputs, targets, weight)
        if not self.replay and not self._capture(inputs, targets):
            return self.step(inputs, targets, weight)
        self.inputs.copy_(inputs)
        self.targets.copy_(targets)
        self.replay()
        loss, logits, gradients = self.outputs
        for parameter, gradient in zip(self.parameters, gradients):
            parameter.grad = gradient  # a step without the graph has left others
        return loss.clone(), logits.clone()  # the next replay overwrites them

    def _capture(self, inputs, targets):
        """Capture the step; whether it worked."""
        self.inputs, self.targets = inputs.clone(), targets.clone()

        def outputs():
            loss, logits = self.step(self.inputs, self.targets)
            return loss, logits, [parameter.grad for parameter in self.parameters]

        try:
            self.replay, self.outputs = cuda.capture(outputs)
        except RuntimeError as error:
            self.has_failed, self.inputs, self.targets = True, None, None
            self.say(one_line(f'no CUDA graph, because capturing one failed: {error}'))
        return not self.has_failed

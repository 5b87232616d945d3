"""One pass over the data: what it measures, its position, its time and its progress bar."""

import math
import shutil
import time

import torch

from lab import distributed
from lab.data.names import percent, rounded


class Meters:
    """Mean loss and top-k accuracy of one pass, over all processes, in torchnet's meters.

    Batches are measured in chunks, so that not every step waits for the GPU and for the other
    processes.
    """

    CHUNK = 20  # batches

    def __init__(self, num_classes):
        from torchnet.meter import AverageValueMeter, ClassErrorMeter

        self.topk = sorted({1, min(5, num_classes)})
        self.loss = AverageValueMeter()
        self.accuracy = ClassErrorMeter(topk=self.topk, accuracy=True)
        self.chunk = ClassErrorMeter(topk=self.topk, accuracy=True)  # of this process alone
        self.reset()

    def reset(self):
        self.loss.reset()
        self.accuracy.reset()
        self.pending = []
        self.batches = 0  # measured so far
        self.diverged = None  # the first batch whose loss is not finite, and the loss

    def add(self, loss, logits, targets):
        """Add a batch: its mean loss, logits (N, classes) and targets (N,)."""
        self.pending.append((loss.detach(), logits.detach(), targets))
        if len(self.pending) >= self.CHUNK:
            self.flush()

    def flush(self):
        """Measure the pending batches."""
        if not self.pending:
            return
        self.chunk.reset()
        losses, logits, targets = zip(*self.pending)
        self.pending.clear()
        sizes = torch.tensor([len(each) for each in targets], dtype=torch.float64)
        # A process may have no sample of a small last batch of a test; its mean loss is NaN.
        losses = torch.where(sizes > 0, torch.stack(losses).cpu().double(), 0)
        if sizes.any():
            self.chunk.add(torch.cat(logits).float().cpu(), torch.cat(targets).cpu())
        sums = torch.stack([losses * sizes, sizes], dim=1)
        for value, n in distributed.total(sums).tolist():
            self.batches += 1
            if not math.isfinite(value) and not self.diverged:
                self.diverged = self.batches, value
            self.loss.add(value, int(n))
        wrong = [int(self.chunk.sum[k]) for k in self.topk]
        n, *errors = distributed.total(torch.tensor([self.chunk.n, *wrong])).tolist()
        self.accuracy.n += n
        for k, count in zip(self.topk, errors):
            self.accuracy.sum[k] += count

    def values(self):
        """Mean loss, top-1 and top-5 accuracy in percent (top-k if there are k < 5 classes)."""
        self.flush()
        top1, top5 = (self.accuracy.value(k) for k in (self.topk[0], self.topk[-1]))
        return self.loss.value()[0], top1, top5

    def state(self):
        """What was measured so far, as plain numbers: batches, samples n, the mean loss, and how
        many samples were wrong among the top k."""
        self.flush()
        return {
            'batches': self.batches,
            'n': int(self.accuracy.n),
            'loss': float(self.loss.mean_old),  # its mean, or 0 before the first sample
            'errors': [int(self.accuracy.sum[k]) for k in self.topk],
        }

    def load_state(self, state):
        """Continue from what `state` returned, to the bit."""
        self.reset()
        self.batches, self.accuracy.n = state['batches'], state['n']
        self.accuracy.sum.update(zip(self.topk, state['errors']))
        # The meter moves its mean with each batch, so a sum would not give the same mean.
        loss = state['loss']
        mean = loss['mean'] if isinstance(loss, dict) else loss  # older checkpoints: all its fields
        self.loss.n, self.loss.mean, self.loss.mean_old = state['n'], mean, mean


# --- the progress bar ------------------------------------------------------------------------

# In a narrow terminal, loss and accuracy leave no room for tqdm's own counts.
NARROW = '{desc} {percentage:3.0f}%|{bar}| {remaining}{postfix}'
TINY = '{desc} {percentage:3.0f}% {remaining}'


def bar_format(columns):
    if columns < 50:
        return TINY
    return NARROW if columns < 100 else None


class ProgressBar:
    """tqdm's bar over the images of a pass, with loss and accuracy if there are meters. Where the
    output is not a terminal, it is a line every few minutes instead.

    Args:
        label: what to call the pass.
        batches: Batches; the pass begins with their batch number `start`.
        say: prints a line, in rank 0 only.
    """

    INTERVAL = 300  # seconds between two lines

    def __init__(self, label, batches, meters=None, say=distributed.say):
        from tqdm import tqdm

        columns = shutil.get_terminal_size().columns
        self.first = min(batches.start * batches.batch_size, batches.n)
        self.bar = tqdm(
            total=batches.n,
            initial=self.first,
            desc=label,
            unit='img',
            unit_scale=True,
            disable=None if distributed.rank() == 0 else True,  # None: if not in a terminal
            leave=False,
            dynamic_ncols=True,
            bar_format=bar_format(columns),
        )
        self.label, self.batches, self.meters, self.say = label, batches, meters, say
        self.done = self.first
        self.started = self.shown = time.monotonic()

    def update(self, n):
        self.done += n
        now = time.monotonic()
        if self.bar.disable:
            if now - self.shown >= self.INTERVAL:
                self.shown = now
                self.say(self._line(now - self.started))
            return
        if self.meters and now - self.shown > 0.5:
            self.shown = now
            self.bar.set_postfix_str(self._measured(3, 'acc'), refresh=False)
        self.bar.update(n)

    def _line(self, elapsed):
        """The position, what was measured, the speed and the time left, in words."""
        rate = (self.done - self.first) / elapsed
        left = self.bar.format_interval((self.batches.n - self.done) / rate)
        step = -(-self.done // self.batches.batch_size)
        parts = [f'{self.label}: step {step} of {len(self.batches)}']
        if self.meters:
            parts.append(self._measured(4, 'accuracy'))
        return ', '.join(filter(None, (*parts, f'{rounded(rate)} images/s', f'{left} left')))

    def _measured(self, digits, name):
        """Mean loss and accuracy so far, in words."""
        if distributed.world() == 1:  # several processes must flush together
            self.meters.flush()
        if not self.meters.batches:
            return ''
        loss = self.meters.loss.value()[0]
        top1 = self.meters.accuracy.value(self.meters.topk[0])
        return f'loss {rounded(loss, digits)}, {name} {percent(top1, digits - 2)} %'

    def close(self):
        self.bar.close()


# --- the pass --------------------------------------------------------------------------------


class Pass:
    """One pass over batches: its position, time, meters and progress bar.

    It is a context for the loop over the batches, which shows the progress bar. Its time starts
    before, when it is made.

    Args:
        name: 'train' or 'test', for the names of the results.
        batches: Batches; the pass sets their epoch and the batch to start from.
        epoch: counted from 1.
        label: for the progress bar.
        say: prints a line, in rank 0 only.
        progress: what `progress()` returned when the pass was interrupted.
    """

    def __init__(
        self, name, batches, meters, epoch, label='test', say=distributed.say, progress=None
    ):
        self.name, self.label, self.say = name, label, say
        self.batches, self.meters, self.epoch = batches, meters, epoch
        meters.reset()
        self.step, elapsed, batches.broken_before = 0, 0, {}
        if progress:
            self.step, elapsed = progress['step'], progress['time']
            batches.broken_before = progress['broken']
            meters.load_state(progress['tally'])
        batches.epoch, batches.start = epoch, self.step
        self.started = time.perf_counter() - elapsed

    def __enter__(self):
        self.bar = ProgressBar(self.label, self.batches, self.meters, self.say)
        return self

    def __exit__(self, *_):
        self.bar.close()

    def add(self, loss, logits, targets):
        """Count a batch: its mean loss, logits (N, classes) and targets (N,)."""
        self.meters.add(loss, logits, targets)
        self.bar.update(self.batches.size(self.step))
        self.step += 1

    def progress(self):
        """The position and what was measured so far, for a checkpoint."""
        return {
            'step': self.step,
            'tally': self.meters.state(),
            'time': time.perf_counter() - self.started,
            'broken': distributed.union(self.batches.broken),
        }

    def stats(self):
        """{NAME_loss, NAME_acc, NAME_top5, NAME_time}: accuracies in percent, time in seconds."""
        loss, top1, top5 = self.meters.values()
        return {
            f'{self.name}_loss': loss,
            f'{self.name}_acc': top1,
            f'{self.name}_top5': top5,
            f'{self.name}_time': time.perf_counter() - self.started,
        }

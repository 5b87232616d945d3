"""What a training measures and shows: loss and accuracy, a progress bar, broken images."""

import math
import time

import torch

from lab import distributed
from lab.distributed import say, world
from lab.errors import UserError


class Tally:
    """Loss and top-k accuracy over an epoch in torchnet's meters, of all processes together. Fed in chunks: a GPU is not waited for, and
    no other process asked, at every step."""

    CHUNK = 20  # batches

    def __init__(self, num_classes):
        from torchnet.meter import AverageValueMeter, ClassErrorMeter

        self.topk = sorted({1, min(5, num_classes)})
        self.loss, self.accuracy, self.part = (
            AverageValueMeter(),
            *(ClassErrorMeter(topk=self.topk, accuracy=True) for _ in range(2)),
        )
        self.reset()

    def reset(self):
        self.loss.reset()
        self.accuracy.reset()
        self.pending = []
        self.batches, self.broke = (
            0,
            None,
        )  # how many are counted, and the first whose loss is not finite, with it

    def add(self, loss, logits, targets):
        self.pending.append((loss.detach(), logits.detach(), targets))
        if len(self.pending) >= self.CHUNK:
            self.flush()

    def flush(self):
        if not self.pending:
            return
        self.part.reset()
        sums = torch.zeros(len(self.pending), 2, dtype=torch.float64)
        for row, (loss, logits, targets) in zip(sums, self.pending):
            if len(targets):  # of a small last batch of a test, a process may have none
                row[0], row[1] = loss.item() * len(targets), len(targets)
                self.part.add(logits.float(), targets)
        self.pending.clear()
        for value, n in distributed.total(sums).tolist():
            self.batches += 1
            if not math.isfinite(value) and not self.broke:
                self.broke = self.batches, value
            self.loss.add(value, int(n))
        n, *errors = distributed.total(
            torch.tensor([self.part.n, *(int(self.part.sum[k]) for k in self.topk)])
        ).tolist()
        self.accuracy.n += n
        for k, wrong in zip(self.topk, errors):
            self.accuracy.sum[k] += wrong

    def values(self):
        """Mean loss, and the percentages of top-1 and top-5 (or as many as there are classes)."""
        self.flush()
        return (
            self.loss.value()[0],
            self.accuracy.value(self.topk[0]),
            self.accuracy.value(self.topk[-1]),
        )

    def state(self):
        """What was counted, as plain numbers."""
        self.flush()
        return {
            'batches': self.batches,
            'loss': {name: float(value) for name, value in vars(self.loss).items()},
            'n': int(self.accuracy.n),
            'errors': [int(self.accuracy.sum[k]) for k in self.topk],
        }

    def load_state(self, state):
        self.reset()
        self.batches = state['batches']
        vars(self.loss).update(state['loss'])
        self.accuracy.n = state['n']
        self.accuracy.sum.update(zip(self.topk, state['errors']))


class Progress:
    """tqdm's bar over the images of an epoch, with loss, accuracy, images/s and remaining time. Quiet where no one looks."""

    def __init__(self, label, n, tally, done=0):
        from tqdm import tqdm

        # disable=None: no bar where the output is no terminal
        self.bar = tqdm(
            total=n,
            initial=done,
            desc=label,
            unit='img',
            unit_scale=True,
            disable=None if distributed.rank() == 0 else True,
            leave=False,
            dynamic_ncols=True,
        )
        self.tally, self.shown = tally, 0.0

    def update(self, n):
        if not self.bar.disable and time.monotonic() - self.shown > 0.5:
            self.shown = time.monotonic()
            if world() == 1:  # of several processes, all count at once: every CHUNK batches
                self.tally.flush()
            if self.tally.batches:
                loss, top1 = (
                    self.tally.loss.value()[0],
                    self.tally.accuracy.value(self.tally.topk[0]),
                )
                self.bar.set_postfix_str(f'loss {loss:.3f}, acc {top1:.1f} %', refresh=False)
        self.bar.update(n)

    def close(self):
        self.bar.close()


class Broken:
    """Keeps account of image files that could not be used: each is named once, and more than one in a hundred end the run."""

    SHARE = 0.01

    def __init__(self, say=say):
        self.named, self.say = set(), say

    def report(self, batches):
        """Of the pass that just ended, in all processes: how many, and which were not named before. Prints those."""
        batches.broken = distributed.union(batches.broken)
        new = {path: message for path, message in batches.broken.items() if path not in self.named}
        for message in new.values():
            self.say(f'broken image: {message}')
        self.named.update(new)
        return len(batches.broken), sorted(new)

    def check(self, batches):
        """Raises UserError where too many were broken in the pass that just ended."""
        if len(batches.broken) > self.SHARE * batches.n:
            raise UserError(
                f'{len(batches.broken)} of {batches.n} image files could not be used, as {next(iter(batches.broken))}: mend the data and '
                'go on with --resume'
            )

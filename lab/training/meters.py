"""Loss and accuracy of a pass over the data, in torchnet's meters."""

import math

import torch

from lab import distributed


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
        sums = torch.zeros(len(self.pending), 2, dtype=torch.float64)  # loss, samples
        for row, (loss, logits, targets) in zip(sums, self.pending):
            if len(targets):  # a process may have no sample of a small last batch of a test
                row[0], row[1] = loss.item() * len(targets), len(targets)
                self.chunk.add(logits.float(), targets)
        self.pending.clear()
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

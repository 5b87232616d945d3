"""What a pass over the data measures and shows: loss, accuracy, a progress bar, broken images."""

import math
import time

import torch

from lab import distributed
from lab.distributed import world
from lab.errors import UserError


class Meters:
    """Mean loss and top-k accuracy of a pass over the data, for all processes together, from
    torchnet's meters.

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
        """What was measured so far, as plain numbers."""
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


class ProgressBar:
    """tqdm's bar over the images of a pass, with loss and accuracy. Only shown in a terminal."""

    def __init__(self, label, n, meters, done=0):
        from tqdm import tqdm

        self.bar = tqdm(
            total=n,
            initial=done,
            desc=label,
            unit='img',
            unit_scale=True,
            disable=None if distributed.rank() == 0 else True,  # None: if not in a terminal
            leave=False,
            dynamic_ncols=True,
        )
        self.meters, self.shown = meters, 0.0

    def update(self, n):
        if not self.bar.disable and time.monotonic() - self.shown > 0.5:
            self.shown = time.monotonic()
            self._show_meters()
        self.bar.update(n)

    def _show_meters(self):
        if world() == 1:  # several processes must flush together, so they wait for a full chunk
            self.meters.flush()
        if self.meters.batches:
            loss = self.meters.loss.value()[0]
            top1 = self.meters.accuracy.value(self.meters.topk[0])
            self.bar.set_postfix_str(f'loss {loss:.3f}, acc {top1:.1f} %', refresh=False)

    def close(self):
        self.bar.close()


class BrokenImages:
    """Names each broken image file once, and ends a run that has too many of them."""

    LIMIT = 0.01  # of the images of a pass

    def __init__(self, say=distributed.say):
        self.named, self.say = set(), say

    def report(self, batches):
        """Print the broken files of the last pass, in any process, that were not named before.

        Returns (number of broken files, sorted paths of the new ones).
        """
        batches.broken = distributed.union(batches.broken)
        new = {path: text for path, text in batches.broken.items() if path not in self.named}
        for message in new.values():
            self.say(f'broken image: {message}')
        self.named.update(new)
        return len(batches.broken), sorted(new)

    def stats(self, train_batches, test_batches):
        """What an epoch's log line says about broken files; nothing if there are none."""
        n_train, new_train = self.report(train_batches)
        n_test, new_test = self.report(test_batches)
        if not n_train and not n_test:
            return {}
        return {
            'train_broken': n_train,
            'test_broken': n_test,
            'broken_images': new_train + new_test,
        }

    def check(self, batches):
        """Raise UserError if too many files were broken in the last pass."""
        if len(batches.broken) > self.LIMIT * batches.n:
            raise UserError(
                f'{len(batches.broken)} of {batches.n} image files could not be used, such as '
                f'{next(iter(batches.broken))}: fix the data, then resume with --resume'
            )


class Pass:
    """One pass over batches: its position, time, meters and progress bar.

    It is a context for the loop over the batches; leaving it removes the progress bar.

    Args:
        name: 'train' or 'test', for the names of the results; label: for the progress bar.
        batches: Batches; the pass sets their epoch and the batch to start from.
        epoch: counted from 1.
        progress: what `progress()` returned when the pass was interrupted.
    """

    def __init__(self, name, label, batches, meters, epoch, progress=None):
        self.name, self.batches, self.meters = name, batches, meters
        self.final_progress = None
        meters.reset()
        self.step, elapsed, batches.broken_before = 0, 0, {}
        if progress:
            self.step, elapsed = progress['step'], progress['time']
            batches.broken_before = progress['broken']
            meters.load_state(progress['tally'])
        batches.epoch, batches.start = epoch, self.step
        done = min(self.step * batches.batch_size, batches.n)
        self.bar = ProgressBar(label, batches.n, meters, done)
        self.started = time.perf_counter() - elapsed

    def __enter__(self):
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
        if self.final_progress:
            return self.final_progress
        return {
            'step': self.step,
            'tally': self.meters.state(),
            'time': time.perf_counter() - self.started,
            'broken': distributed.union(self.batches.broken),
        }

    def finish(self):
        """{NAME_loss, NAME_acc, NAME_top5, NAME_time}: accuracies in percent, time in seconds."""
        loss, top1, top5 = self.meters.values()
        self.final_progress = self.progress()
        return {
            f'{self.name}_loss': loss,
            f'{self.name}_acc': top1,
            f'{self.name}_top5': top5,
            f'{self.name}_time': self.final_progress['time'],
        }

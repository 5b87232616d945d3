"""One pass over the data: its position, its time and its progress bar."""

import shutil
import time

from lab import distributed

# In a narrow terminal, loss and accuracy leave no room for tqdm's own counts.
NARROW = '{desc} {percentage:3.0f}%|{bar}| {remaining}{postfix}'
TINY = '{desc} {percentage:3.0f}% {remaining}'


def bar_format(columns):
    if columns < 50:
        return TINY
    return NARROW if columns < 100 else None


class ProgressBar:
    """tqdm's bar over the images of a pass, with loss and accuracy if there are meters. Only shown
    in a terminal."""

    def __init__(self, label, n, meters=None, done=0):
        from tqdm import tqdm

        columns = shutil.get_terminal_size().columns
        self.bar = tqdm(
            total=n,
            initial=done,
            desc=label,
            unit='img',
            unit_scale=True,
            disable=None if distributed.rank() == 0 else True,  # None: if not in a terminal
            leave=False,
            dynamic_ncols=True,
            bar_format=bar_format(columns),
        )
        self.meters, self.shown = meters, 0.0

    def update(self, n):
        if self.meters and not self.bar.disable and time.monotonic() - self.shown > 0.5:
            self.shown = time.monotonic()
            self._show_meters()
        self.bar.update(n)

    def _show_meters(self):
        if distributed.world() == 1:  # several processes must flush together
            self.meters.flush()
        if self.meters.batches:
            loss = self.meters.loss.value()[0]
            top1 = self.meters.accuracy.value(self.meters.topk[0])
            self.bar.set_postfix_str(f'loss {loss:.3f}, acc {top1:.1f} %', refresh=False)

    def close(self):
        self.bar.close()


class Pass:
    """One pass over batches: its position, time, meters and progress bar.

    It is a context for the loop over the batches, which shows the progress bar. Its time starts
    before, when it is made.

    Args:
        name: 'train' or 'test', for the names of the results; label: for the progress bar.
        batches: Batches; the pass sets their epoch and the batch to start from.
        epoch: counted from 1.
        progress: what `progress()` returned when the pass was interrupted.
    """

    def __init__(self, name, label, batches, meters, epoch, progress=None):
        self.name, self.label, self.batches, self.meters = name, label, batches, meters
        self.final_progress = None
        meters.reset()
        self.step, elapsed, batches.broken_before = 0, 0, {}
        if progress:
            self.step, elapsed = progress['step'], progress['time']
            batches.broken_before = progress['broken']
            meters.load_state(progress['tally'])
        batches.epoch, batches.start = epoch, self.step
        self.started = time.perf_counter() - elapsed

    def __enter__(self):
        n = self.batches.n
        done = min(self.step * self.batches.batch_size, n)
        self.bar = ProgressBar(self.label, n, self.meters, done)
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

    def counted(self):
        """The number of images so far, in all processes."""
        return self.meters.state()['n']

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

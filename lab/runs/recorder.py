"""Saving a training: checkpoints when they are due, and a last one when a signal stops the run."""

import signal
import time

from lab import cuda, distributed
from lab.data.names import rounded
from lab.errors import UserError
from lab.runs.checkpoint import describe_position
from lab.runs.log import format_line
from lab.runs.resume import resume_command
from lab.training.network import count_multiplications, count_parameters


class Recorder:
    """Writes the checkpoints and the log of a training to its folder.

    Args:
        folder: RunFolder; stop: Stop; state: lab.training.state.State.
        metadata: options, network, classes and preprocessing, as in a checkpoint.
        log: lines of the log so far.
    """

    def __init__(self, folder, stop, state, metadata, log):
        self.folder, self.stop, self.state = folder, stop, state
        self.metadata, self.log = metadata, log
        network, image_size = metadata['network'], metadata['preprocessing']['image_size']
        self.sizes = {
            'n_parameters': count_parameters(network),
            'n_multiplications': count_multiplications(network, image_size),  # per image
        }
        self.device = next(state.module.parameters()).device
        self.memory_is_unknown = self.device.type == 'cuda'
        self._schedule_save()

    def _schedule_save(self):
        minutes = self.metadata['options']['checkpoint_minutes']
        self.next_save = time.monotonic() + 60 * minutes

    # --- checkpoints ---

    def save_or_exit_if_due(self, train_pass):
        """After a step: save if it is time to. If a signal has come, save and exit. After the first
        step of the program, say how much memory it took on a CUDA device.

        Raises:
            UserError: the loss is not finite.
            SystemExit: a signal has come; all processes exit together.
        """
        self._check_loss(train_pass)
        if self.memory_is_unknown:
            self.memory_is_unknown = False
            peak = cuda.peak_memory(self.device)
            self.stop.say(f'{rounded(peak / 1e9, 2)} GB of memory on {self.device}')
        due = time.monotonic() >= self.next_save
        number, due = distributed.agree(self.stop.signal, int(due))
        if number:
            self.stop.ignore_signals()
        if number or due:
            self.save_within_epoch(train_pass)
        if number:
            self._exit(number, train_pass)

    def save_within_epoch(self, train_pass):
        """Write a checkpoint within a training pass, or at its end: a test is repeated if it is
        interrupted."""
        progress = train_pass.progress()  # this measures the last batches
        self._check_loss(train_pass)
        self.save(train_pass.epoch - 1, progress)

    def exit_if_stopped(self, train_pass):
        """In a test after this pass: if a signal has come, exit. All processes exit together."""
        (number,) = distributed.agree(self.stop.signal)
        if number:
            self.stop.ignore_signals()
            self._exit(number, train_pass)

    def save(self, epochs_done, progress=None):
        """Write a checkpoint, with the `progress` in the next epoch if it has begun. Raises
        UserError if a parameter is not finite: no run could resume from it."""
        content = {**self.state.content(), 'epoch': epochs_done, **self.metadata, 'log': self.log}
        position = describe_position(epochs_done, progress)
        if not all(tensor.isfinite().all() for tensor in content['params'].values()):
            raise self._diverged(f'the loss is finite but the parameters are not, after {position}')
        if progress:
            content['progress'] = progress
        self.folder.save(content, position)
        self._schedule_save()

    def _exit(self, number, train_pass):
        distributed.barrier()  # torchrun ends all processes when the first one ends
        position = describe_position(train_pass.epoch - 1, {'step': train_pass.step})
        command = resume_command(self.metadata['options'], self.folder)
        name = signal.Signals(number).name
        self.stop.last_words = f'stopped by {name} at {position}; resume with:\n    {command}'
        raise SystemExit(128 + number)

    # --- what happened ---

    def record_epoch(self, train_pass, results, broken_stats):
        """Add an epoch to the log, and save. Returns what the line of the log has.

        Args:
            results: of the training pass and the tests; broken_stats: see `BrokenImages.stats`.
        """
        stats = {
            **self.metadata['options'],
            **results,
            'epoch': train_pass.epoch,
            'num_classes': self.metadata['network']['num_classes'],
            **self.sizes,
            'train_images_per_second': train_pass.batches.n / results['train_time'],
        }
        if self.device.type == 'cuda':
            stats['train_peak_memory'] = cuda.peak_memory(self.device)
        stats.update(broken_stats)
        self.log.append(format_line(stats))
        self.folder.write_log(self.log)
        if self.metadata['options']['tensorboard']:
            self.folder.write_events(stats)
        self.save(stats['epoch'])
        return stats

    def _check_loss(self, train_pass):
        if train_pass.meters.diverged:
            step, value = train_pass.meters.diverged
            raise self._diverged(f'the loss is {value} at step {step} of epoch {train_pass.epoch}')

    def _diverged(self, what):
        last = 'there is no checkpoint yet'
        if self.folder.last_save:
            last = f'--resume continues from the last good checkpoint, {self.folder.last_save}'
        return UserError(
            f'{what}: the run stops; {last}; a new run may do better with a smaller --lr'
        )

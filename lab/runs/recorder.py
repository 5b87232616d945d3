"""Saving a training: checkpoints when they are due, and a last one when a signal stops the run."""

import signal
import time

from lab import distributed
from lab.errors import UserError
from lab.runs.checkpoint import describe_position
from lab.runs.log import format_line
from lab.runs.resume import resume_command


def stored_params(module):
    """The params of a diracnet.Network as a checkpoint has them."""
    return {key: tensor.detach().cpu().contiguous() for key, tensor in module.params().items()}


class Recorder:
    """Writes the checkpoints and the log of a training to its folder.

    Args:
        folder: RunFolder; stop: Stop.
        facts: options, network, classes and preprocessing, as in a checkpoint.
        module, optimizer, scaler, averages: what is trained; averages is an AveragedModel or None.
        meters: Meters of the current pass.
        log: lines of the log so far.
    """

    def __init__(self, folder, stop, facts, module, optimizer, scaler, averages, meters, log):
        self.folder, self.stop, self.facts, self.meters = folder, stop, facts, meters
        self.module, self.optimizer, self.scaler, self.log = module, optimizer, scaler, log
        self.averages = averages
        self._schedule_save()

    def _schedule_save(self):
        self.next_save = time.monotonic() + 60 * self.facts['options']['checkpoint_minutes']

    def save(self, epoch, progress=None):
        """Write a checkpoint. `epoch` counts finished epochs; `progress` is that of the next.

        Raises:
            UserError: the loss or a parameter is not finite, so no run could resume from it.
        """
        if progress:
            self.check_loss(epoch + 1)
        params = stored_params(self.module)
        position = describe_position(epoch, progress)
        if not all(tensor.isfinite().all() for tensor in params.values()):
            raise self._diverged(f'the loss is finite but the parameters are not, after {position}')
        content = {
            'params': params,
            'epoch': epoch,
            'optimizer': self.optimizer.state_dict(),
            'scaler': self.scaler.state_dict(),
            **self.facts,
            'log': self.log,
        }
        if self.averages:
            content['ema'] = stored_params(self.averages.module)
        if progress:
            content['progress'] = progress
        self.folder.save(content, position)
        self._schedule_save()

    def save_if_due(self, epoch, measure_progress):
        """After a step: save if it is time to. If a signal has come, save and exit.

        Args:
            epoch: number of finished epochs.
            measure_progress: returns the progress in the next one; called only to save.

        Raises:
            SystemExit: a signal has come; all processes exit together.
        """
        due = time.monotonic() >= self.next_save
        number, due = distributed.agree(self.stop.signal, int(due))
        if number:
            self.stop.ignore_signals()
        if number or due:
            progress = measure_progress()
            self.save(epoch, progress)
        if number:
            distributed.barrier()  # torchrun ends all processes when the first one ends
            name, position = signal.Signals(number).name, describe_position(epoch, progress)
            command = resume_command(self.facts['options'], self.folder)
            self.stop.last_words = f'stopped by {name} at {position}; resume with:\n    {command}'
            raise SystemExit(128 + number)

    def check_loss(self, epoch):
        """Raise UserError if a loss was not finite in this epoch, counted from 1."""
        if self.meters.diverged:
            step, value = self.meters.diverged
            raise self._diverged(f'the loss is {value} at step {step} of epoch {epoch}')

    def _diverged(self, what):
        if self.folder.last_save:
            last = f'--resume continues from the last good checkpoint, {self.folder.last_save}'
        else:
            last = 'there is no checkpoint yet'
        return UserError(
            f'{what}: the run stops; {last}; a new run may do better with a smaller --lr'
        )

    def record_epoch(self, stats):
        """Add an epoch to the log, and save."""
        self.log.append(format_line(stats))
        self.folder.write_log(self.log)
        if self.facts['options']['tensorboard']:
            self.folder.write_events(stats)
        self.save(stats['epoch'])

"""Kill runs, damage their checkpoints, and compare them with an undisturbed run."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter

import torch

from lab.errors import UserError
from lab.runs import checkpoint
from lab.runs.checkpoint import FILE_NAME, PREVIOUS
from lab.runs.log import LOG, read_log
from tools.soak.cases import family, small_disk

MINUTES = ('0', '0.005', '10')  # checkpoints at every step; every 0.3 s; after epochs only
SIGNALS = [signal.SIGKILL] * 8 + [signal.SIGTERM, signal.SIGINT]
DAMAGE_PROBABILITY = 0.15
PATIENCE = 90  # seconds in which all processes of a killed run must have ended


# --- comparing -------------------------------------------------------------------------------


def comparable_log(folder):
    """The epochs in a run's log, without times and without the options that `start` varies."""
    path = folder / LOG
    lines = read_log(path) if path.exists() and path.stat().st_size else []
    varied = ('save', 'checkpoint_minutes')
    return [
        {
            key: value
            for key, value in line.items()
            if not key.endswith('_time') and key not in varied
        }
        for line in lines
    ]


def tensors_of(folder):
    """All tensors in a run's checkpoint: parameters, running statistics and momentum."""
    content = torch.load(folder / FILE_NAME, weights_only=True)
    tensors = dict(content['params'])
    for i, state in content['optimizer']['state'].items():
        tensors[f'momentum {i}'] = state['momentum_buffer']
    return tensors


def differences(left, right):
    """What differs between two finished runs: names of tensors, and log.txt."""
    one, other = tensors_of(left), tensors_of(right)
    found = [
        key
        for key in {**one, **other}
        if key not in one or key not in other or not torch.equal(one[key], other[key])
    ]
    if comparable_log(left) != comparable_log(right):
        found.append(LOG)
    return found


def damage(path, chance):
    """Cut a checkpoint off, or flip one bit of its largest tensor. Returns which."""
    content = bytearray(path.read_bytes())
    if chance.random() < 0.5:
        del content[chance.randrange(len(content)) :]
        kind = 'cut off'
    else:
        # A bit outside the tensors may have no effect.
        tensors = torch.load(path, weights_only=True)['params'].values()
        largest = max(tensors, key=torch.numel)
        place = content.find(largest.numpy().tobytes())
        content[place + chance.randrange(1000)] ^= 1 << chance.randrange(8)
        kind = 'one bit flipped'
    path.write_bytes(content)
    return kind


# --- killing ---------------------------------------------------------------------------------


def position_of(found):
    """Where in its training a checkpoint was saved: (finished epochs, steps of the next)."""
    return found.epoch, found.progress['step'] if found.progress else 0


class Soak:
    """A worker that kills trainings.

    Args:
        case: Case.
        seed: for the random moments, signals and damage.
        work: folder for its runs.
        reference: folder of the undisturbed run.
        duration: seconds that the undisturbed run took.

    Attributes:
        counts: a Counter of what happened.
        faults: what went wrong, as texts.
        starts, differences: how often each run was started, and how its result differs.
    """

    def __init__(self, case, seed, work, reference, duration):
        self.case, self.seed, self.work = case, seed, work
        self.reference, self.duration = reference, duration
        self.chance = random.Random(seed)
        self.expected_log = comparable_log(reference)
        self.counts, self.faults = Counter(), []
        self.starts, self.differences = [], []

    def kill_runs(self, kills):
        """Train runs to their end, until there have been at least this many kills."""
        with small_disk(self.work) if self.case.fills_disk else contextlib.nullcontext():
            while self.counts['kills'] < kills:
                folder = self.work / f'run{len(self.starts)}'
                self.starts.append(0)
                self.finish_run(folder)
                self.compare(folder)
                shutil.rmtree(folder)
        return self

    def finish_run(self, folder):
        """Start and kill a run until one start reaches the end."""
        position, killed = (0, 0), True
        while killed:
            self.starts[-1] += 1
            began = time.monotonic()
            killed = self.start_and_kill(folder)
            (self.work / 'other').unlink(missing_ok=True)
            if killed:
                self.check_log(folder)
                position = self.check_position(folder, position)
        if self.starts[-1] == 1:  # undisturbed: the current duration on this machine
            self.duration = time.monotonic() - began

    def start_and_kill(self, folder):
        """Start a run and kill it at a random moment. Returns whether to start it again."""
        process = self.case.start(folder, self.chance.choice(MINUTES))
        ended = self.has_ended(process)
        if self.case.fills_disk and not ended:
            self.fill_disk()
            ended = self.has_ended(process)
        if ended:
            return self.judge_end(process.returncode, self.err)
        members = family(process.pid)
        victim = self.chance.choice(members if self.case.kills_any else members[:1])
        is_first = victim == process.pid
        number = self.chance.choice(SIGNALS) if is_first else signal.SIGKILL
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, number)
        err = self.wait_for_all(process, members)
        if process.returncode == 0:  # it was too late
            return self.judge_end(0, err)
        name = signal.Signals(number).name
        self.counts['kills'] += 1
        self.counts[name if is_first else f'{name} to one that it started'] += 1
        # Before training starts, a process still has Python's own handlers. With several processes,
        # the others end with a message.
        expected = (-number, 128 + number, *((1,) if self.case.kills_any else ()))
        if process.returncode not in expected:
            self.add_fault(f'exit status {process.returncode} after {name}: {err[-300:]}')
        if PREVIOUS in err:
            self.counts[f'{FILE_NAME} was broken, {PREVIOUS} used'] += 1
        return True

    def has_ended(self, process):
        """Whether a process ends before a random moment."""
        try:
            _, self.err = process.communicate(timeout=self.chance.uniform(0, 0.7 * self.duration))
        except subprocess.TimeoutExpired:
            return False
        return True

    def judge_end(self, status, err):
        """Whether a run that ended by itself has to be started again."""
        if status == 1 and self.case.fills_disk and 'No space left' in err:
            self.counts['ended with status 1 because the disk was full'] += 1
            return True
        if status != 0:
            self.add_fault(f'exit status {status}: {err[-300:]}')
        return False

    def wait_for_all(self, process, members):
        """Wait for all processes of a run, which have its stderr; returns what they wrote there."""
        try:
            return process.communicate(timeout=PATIENCE)[1]
        except subprocess.TimeoutExpired:
            self.add_fault(f'processes were still running {PATIENCE} seconds after the kill')
            for member in members:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(member, signal.SIGKILL)
            return process.communicate()[1]

    def fill_disk(self):
        """Leave a random number of bytes free on the disk of the runs."""
        left = self.chance.randrange(1_000_000)
        self.counts['disk filled'] += 1
        with contextlib.suppress(OSError), open(self.work / 'other', 'wb') as file:
            while (free := shutil.disk_usage(self.work).free) > left:
                file.write(bytes(min(free - left, 4096)))
                file.flush()

    def check_log(self, folder):
        log = comparable_log(folder)
        if log != self.expected_log[: len(log)]:
            self.add_fault(f'{LOG} is not the beginning of the log of the undisturbed run')

    def check_position(self, folder, last):
        """Check that a killed run has not lost progress, and perhaps damage its checkpoint.

        Args:
            last: the position after the previous kill.

        Returns:
            The position from which the run will resume.
        """
        names = (FILE_NAME, PREVIOUS)
        if not any((folder / name).exists() for name in names):
            self.counts['killed before the first checkpoint'] += 1
            return last
        try:
            found = checkpoint.load(folder)
        except UserError as error:
            self.add_fault(str(error))
            return last
        position = position_of(found)
        if position == last:
            self.counts['killed without progress since the previous kill'] += 1
        else:
            self.counts['killed with progress since the previous kill'] += 1
        if position < last:
            self.add_fault(f'at {position} after {last}')
        may_damage = not self.case.fills_disk and self.chance.random() < DAMAGE_PROBABILITY
        # Never damage both: if previous.pt7 was loaded, model.pt7 is damaged already.
        is_intact = found.path.name == FILE_NAME and all((folder / name).exists() for name in names)
        if may_damage and is_intact:
            self.counts[f'{FILE_NAME} damaged: {damage(folder / FILE_NAME, self.chance)}'] += 1
            position = position_of(checkpoint.load(folder))
        return position

    def compare(self, folder):
        """Compare a finished run with the undisturbed one."""
        found = differences(self.reference, folder)
        self.differences.append(found)
        if found:
            self.add_fault(f'{", ".join(found[:5])} differ from the undisturbed run')
        result = f'{len(found)} differences' if found else 'identical to the bit'
        print(
            f'seed {self.seed}, run {len(self.starts)}: {self.starts[-1]} starts, {result}; '
            f'{self.counts["kills"]} kills',
            flush=True,
        )

    def add_fault(self, text):
        self.faults.append(f'run {len(self.starts)}, start {self.starts[-1]}: {text}')

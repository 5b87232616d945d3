"""Kill trainings at random moments, resume them, and check that their results equal those of an
undisturbed training to the bit.

    python -m tools.soak --kills 200 --jobs 2 --out logs/reference/soak.md    # about 15 minutes

Each run trains DiracNet-10-1 on digits with --resume auto. It is killed at a random moment, mostly
with SIGKILL, sometimes with SIGTERM or SIGINT, and started again, until it finishes. After some
kills the newest checkpoint is cut off, or one of its bits is flipped. Exit status 1 means that the
results differ or that something else went wrong.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from lab.errors import OneLineParser, UserError, run
from lab.runs import checkpoint
from lab.runs.checkpoint import FILE_NAME, PREVIOUS
from lab.runs.log import LOG, read_log

ROOT = Path(__file__).resolve().parent.parent
TRAINING = (
    'train.py --dataset digits --depth 10 --epochs 60 --epoch_step [30,50] --randomcrop_pad 1 '
    '--device cpu'
)
MINUTES = ('0', '0.005', '10')  # checkpoints at every step; every 0.3 s; after epochs only
SIGNALS = [signal.SIGKILL] * 8 + [signal.SIGTERM, signal.SIGINT]
DAMAGE_PROBABILITY = 0.15


def start(folder, minutes):
    """A process that starts or resumes the run in a folder."""
    flags = ['--save', str(folder), '--resume', 'auto', '--checkpoint_minutes', minutes]
    return subprocess.Popen(
        [sys.executable, *TRAINING.split(), *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def train_undisturbed(folder):
    """Train to the end. Returns the seconds that it took. Raises UserError if it fails."""
    began = time.monotonic()
    process = start(folder, '10')
    _, err = process.communicate()
    if process.returncode != 0:
        raise UserError(f'{TRAINING} ended with status {process.returncode}: {err[-300:]}')
    return time.monotonic() - began


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


def position_of(found):
    """Where in its training a checkpoint was saved: (finished epochs, steps of the next)."""
    return found.epoch, found.progress['step'] if found.progress else 0


class Soak:
    """A worker that kills trainings.

    Args:
        seed: for the random moments, signals and damage.
        work: folder for its runs.
        reference: folder of the undisturbed run.
        duration: seconds that the undisturbed run took.

    Attributes:
        counts: a Counter of what happened.
        faults: what went wrong, as texts.
        starts, differences: how often each run was started, and how its result differs.
    """

    def __init__(self, seed, work, reference, duration):
        self.seed, self.work, self.reference, self.duration = seed, work, reference, duration
        self.chance = random.Random(seed)
        self.expected_log = comparable_log(reference)
        self.counts, self.faults = Counter(), []
        self.starts, self.differences = [], []
        work.mkdir()

    def kill_runs(self, kills):
        """Train runs to their end, until there have been at least this many kills."""
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
            if killed:
                self.check_log(folder)
                position = self.check_position(folder, position)
        if self.starts[-1] == 1:  # undisturbed: the current duration on this machine
            self.duration = time.monotonic() - began

    def start_and_kill(self, folder):
        """Start a run and kill it at a random moment. Returns whether it was still running."""
        process = start(folder, self.chance.choice(MINUTES))
        try:
            _, err = process.communicate(timeout=self.chance.uniform(0, 0.7 * self.duration))
        except subprocess.TimeoutExpired:
            number = self.chance.choice(SIGNALS)
        else:
            if process.returncode != 0:
                self.add_fault(f'exit status {process.returncode}: {err[-300:]}')
            return False
        process.send_signal(number)
        _, err = process.communicate()
        name = signal.Signals(number).name
        self.counts['kills'] += 1
        self.counts[name] += 1
        # Before training starts, a process still has Python's own handlers.
        if process.returncode not in (-number, 128 + number):
            self.add_fault(f'exit status {process.returncode} after {name}: {err[-300:]}')
        if PREVIOUS in err:
            self.counts[f'{FILE_NAME} was broken, {PREVIOUS} used'] += 1
        return True

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
        may_damage = self.chance.random() < DAMAGE_PROBABILITY
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


def summary(parts, arguments, minutes):
    """The results of all workers as a Markdown page."""
    counts = sum((part.counts for part in parts), Counter())
    starts = [n for part in parts for n in part.starts]
    faults = [fault for part in parts for fault in part.faults]
    all_differences = [found for part in parts for found in part.differences]
    rows = [
        *counts.most_common(),
        ('finished runs', len(starts)),
        (
            'of these, identical to the undisturbed run to the bit (parameters, running '
            'statistics, momentum, log without times)',
            all_differences.count([]),
        ),
        ('largest number of starts of one run', max(starts)),
        ('faults', len(faults)),
    ]
    lines = [
        '# Trainings killed at random moments',
        '',
        f'`python -m tools.soak {arguments}`, torch {torch.__version__}, '
        f'{os.environ["OMP_NUM_THREADS"]} thread per process, {minutes:.0f} minutes.',
        '',
        f'Each run is `python {TRAINING} --resume auto`, with a random choice of',
        f'`--checkpoint_minutes` {", ".join(MINUTES)} at each start.',
        '',
        '| event | count |',
        '| --- | --- |',
        *(f'| {event} | {count} |' for event, count in rows),
        '',
        *(f'- {fault}' for fault in faults),
    ]
    return '\n'.join(lines).rstrip() + '\n'


def main(arguments=None):
    parser = OneLineParser(prog='-m tools.soak', description=__doc__)
    parser.add_argument('--kills', type=int, default=200, help='number of kills (default 200)')
    parser.add_argument(
        '--seed', type=int, default=0, help='for the moments, signals and damage (default 0)'
    )
    parser.add_argument(
        '--jobs',
        type=int,
        default=1,
        help='workers that share the kills, each with its own seed (default 1)',
    )
    parser.add_argument('--out', type=Path, help='Markdown file for the summary')
    args = parser.parse_args(arguments)
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    began = time.monotonic()
    kills_each = -(-args.kills // args.jobs)
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(args.jobs) as pool:
        reference = Path(work) / 'reference'
        duration = train_undisturbed(reference)
        workers = [
            Soak(args.seed + job, Path(work) / str(job), reference, duration)
            for job in range(args.jobs)
        ]
        parts = list(pool.map(lambda worker: worker.kill_runs(kills_each), workers))
    minutes = (time.monotonic() - began) / 60
    given = f'--kills {args.kills} --seed {args.seed} --jobs {args.jobs}'
    text = summary(parts, given, minutes)
    print(text)
    if args.out:
        args.out.write_text(text)
    return 1 if any(part.faults for part in parts) else 0


if __name__ == '__main__':
    run(main, 'tools.soak')

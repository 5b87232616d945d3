"""Kill trainings at random moments, resume them, and check that their results equal those of an
undisturbed training to the bit.

    python -m tools.soak one --kills 200 --jobs 2 --out logs/reference/soak-one.md   # 15 minutes

CASE is what is trained, always with --resume auto:

    one         DiracNet-10-1 on digits, in one process
    processes   the same in two processes of torchrun
    images      a DiracNet on a folder of PNG files, with two processes that decode them
    disk        as `one`, on a small disk that other files fill (needs the right to mount one)

A run is killed at a random moment, mostly with SIGKILL, sometimes with SIGTERM or SIGINT, and
started again, until it finishes. In `processes` and `images`, the victim is any of its processes.
In `disk`, the disk also becomes full at a random moment, with a random number of bytes left. In the
others, after some kills the newest checkpoint is cut off, or one of its bits is flipped. Exit
status 1 means that the results differ or that something else went wrong.
"""

import os
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from lab.errors import OneLineParser, run
from tools.soak.cases import CASES, write_images
from tools.soak.killing import MINUTES, Soak


def summary(case, parts, arguments, minutes):
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
        f'Each run is `python {case.command} --resume auto`, with a random choice of',
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
    parser.add_argument('case', metavar='CASE', choices=CASES, help=', '.join(CASES))
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
        case, work = CASES[args.case], Path(work)
        write_images(work / 'data')
        reference = work / 'undisturbed' / 'run'
        duration = case.train_undisturbed(reference)
        workers = [
            Soak(case, args.seed + job, work / str(job), reference, duration)
            for job in range(args.jobs)
        ]
        parts = list(pool.map(lambda worker: worker.kill_runs(kills_each), workers))
    minutes = (time.monotonic() - began) / 60
    given = f'{args.case} --kills {args.kills} --seed {args.seed} --jobs {args.jobs}'
    text = summary(case, parts, given, minutes)
    print(text)
    if args.out:
        args.out.write_text(text)
    return 1 if any(part.faults for part in parts) else 0


if __name__ == '__main__':
    run(main, 'tools.soak')

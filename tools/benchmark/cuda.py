"""The proof that everything works on a CUDA GPU, and how fast: `python -m tools.benchmark cuda`.

Each part runs in a process of its own, with a time limit, so that a failure of one does not stop
the others. On the CPU, `--device cpu --quick` runs the whole program in small.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time

import torch

from lab.errors import UserError, one_line
from tools.benchmark.gpu import parts
from tools.benchmark.processes import ROOT
from tools.benchmark.report import Report

SECONDS = 470  # for all parts together
COLUMNS = [
    'measurement',
    'variant',
    'ms, median (quartiles)',
    'ratio',
    'goal',
    'images/s',
    'MB',
    'peak',
]
LEGEND = (
    'Times of steps, batches and inference are medians of 50 after a warm-up, by CUDA events (of '
    '10 if one takes more than 100 ms; with --quick of 3; on the CPU by its clock). *DiracNet* is '
    'the step of train.py with `--dtype bfloat16`, in channels_last; the other variants change one '
    'thing, except *textbook*: the formula layer by layer, in float32 without TF32, contiguous. '
    '*float32* uses TF32. The ratio is the median of DiracNet, or of its CUDA graph where that is '
    "named, divided by that of the row. *MB* is the peak memory, *peak* the share of the card's "
    'dense peak in the type of the convolutions, or - if it is not known.'
)


def bench_cuda(args):
    """Run all parts. The report's `failures` has one line for each failure."""
    device = args.device or 'cuda'
    if device == 'cuda' and not torch.cuda.is_available():
        raise UserError('there is no CUDA GPU here; --device cpu --quick runs the program in small')
    report = Report('CUDA', COLUMNS, LEGEND)
    if device == 'cuda':
        report.facts.update(card=torch.cuda.get_device_name(), cuda=torch.version.cuda)
        report.facts.update(cudnn=torch.backends.cudnn.version(), driver=driver_version())
    end = time.monotonic() + SECONDS
    for name, (limit, _) in parts(args.quick).items():
        run_part(report, name, device, args.quick, max(0, min(limit, end - time.monotonic())))
    report.add('failed parts', '; '.join(report.failures) or 'none', *[''] * (len(COLUMNS) - 2))
    return report


def run_part(report, name, device, quick, limit):
    """Add what a part measures, and what fails, to the report."""
    command = [sys.executable, '-m', 'tools.benchmark.gpu', name, device, str(int(quick))]
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile('w+') as out,
        tempfile.TemporaryFile('w+') as err,
    ):
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, 'TMPDIR': folder},  # a killed part leaves its files there
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the processes that it started, too
            process.wait()
        for file in (out, err):
            file.seek(0)
        for line in out:
            if line.startswith('{'):
                add_facts(report, json.loads(line))
        if status is None:
            report.failures.append(f'{name}: stopped after {limit:.0f} s')
        elif status != 0:
            report.failures.append(f'{name}: exit status {status}: {one_line(err.read()[-200:])}')


def add_facts(report, facts):
    """Add a line of tools.benchmark.gpu to the report: a row with its samples, or a failure."""
    if 'failure' in facts:
        report.failures.append(one_line(facts['failure']))
    else:
        report.add(*facts['row'])
        report.samples.update(facts['samples'])


def driver_version():
    query = ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader']
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return 'unknown'
    return found.stdout.split()[0]

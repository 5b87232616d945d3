"""Benchmarks of waiting times: from a command to the first step, and for torch.compile."""

import statistics
import subprocess
import sys
import tempfile
import time

from tools.benchmark.processes import ROOT, Contestant
from tools.benchmark.report import RATIO_LEGEND, SPEED_COLUMNS, Report, spread
from tools.benchmark.timing import alternate, compare_contestants, describe

START_GOALS = {'train.py --help': 1.5, 'digits, first step': 2.5}


def bench_start(args):
    """Time programs from their command to their end, and digits to its first step."""
    report = Report('Start', SPEED_COLUMNS)
    with tempfile.TemporaryDirectory() as folder:
        first_step = ('-m', 'tools.benchmark.children', 'first_step', folder)
        programs = {
            'import torch': python_program('-c', 'import torch'),
            'train.py --help': python_program('train.py', '--help'),
            'digits, first step': python_program(*first_step),
        }
        samples = alternate(programs, 2 * args.rounds)
    report.samples['start'] = samples
    shortest = statistics.median(samples['import torch'])
    for name in programs:
        ratio, goal = '', ''
        if name in START_GOALS:
            ratio = f'{statistics.median(samples[name]) / shortest:.2f} x import torch'
            goal = f'at most {START_GOALS[name]}'
        report.add('seconds from the command', name, spread(samples[name]), ratio, goal)
    return report


def python_program(*arguments):
    """A function that runs python ARGUMENTS in the repository's root."""

    def run_program():
        command = [sys.executable, *arguments]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)

    return run_program


def bench_compile(args):
    report = Report('torch.compile', SPEED_COLUMNS, RATIO_LEGEND)
    for network, batch in (((34, 1, 'CIFAR10'), 128), ((100, 1, 'digits'), 64)):
        name = describe(network, batch)
        compiled = Contestant('--compile', network, batch)
        start = time.perf_counter()
        compiled()
        seconds = time.perf_counter() - start
        compiled.close()
        report.add(f'first step of {name}, s', '--compile', f'{seconds:.1f}', '', '')
        compare_contestants(
            report,
            f'step of {name}, ms',
            ('--compile', 'DiracNet'),
            network,
            batch,
            3 * args.rounds,
            {},
        )
    return report

"""Benchmark of the time and memory of a training step at several depths."""

import statistics

import numpy as np

from tools.benchmark.processes import Contestant
from tools.benchmark.report import SPEED_COLUMNS, Report, spread_in_milliseconds
from tools.benchmark.timing import alternate, describe

DEPTHS = (16, 34, 64, 100, 202)
BATCH = 64


def bench_depth(args):
    report = Report('Cost over depth', SPEED_COLUMNS)
    networks = {depth: (depth, 1, 'digits') for depth in DEPTHS}
    contestants = {depth: Contestant('DiracNet', networks[depth], BATCH) for depth in DEPTHS}
    samples = alternate(contestants, 5 * args.rounds)
    peaks = {depth: contestant.close() for depth, contestant in contestants.items()}
    report.samples.update(seconds=samples, megabytes=peaks)
    for depth in DEPTHS:
        milliseconds = spread_in_milliseconds(samples[depth])
        report.add(describe(networks[depth], BATCH), 'ms per step', milliseconds, '', '')
        report.add('', 'peak memory, MB', f'{peaks[depth]:.0f}', '', '')
    costs = {
        'ms per step': [1000 * statistics.median(samples[depth]) for depth in DEPTHS],
        'peak memory, MB': [peaks[depth] for depth in DEPTHS],
    }
    for name, values in costs.items():
        slope, offset = np.polyfit(DEPTHS, values, 1)
        explained = np.corrcoef(DEPTHS, values)[0, 1] ** 2
        line = f'{slope:.3f} per layer + {offset:.1f}'
        report.add(f'linear fit of {name}', line, f'R^2 {explained:.4f}', '', 'linear')
    if args.out:
        plot_costs(costs, args.out)
    return report


def plot_costs(costs, out):
    """Write OUT.png: each cost over the depth, with its linear fit."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5), layout='constrained')
    for axis, (name, values) in zip(axes, costs.items()):
        fit = np.polyfit(DEPTHS, values, 1)
        axis.plot(DEPTHS, np.polyval(fit, DEPTHS), color='0.6', label='least squares')
        axis.plot(DEPTHS, values, 'ko', label='measured')
        axis.set(xlabel='depth', ylabel=name, xlim=(0, None), ylim=(0, None))
        axis.legend(frameon=False)
    figure.suptitle('A training step of DiracNet-DEPTH-1 on 8 x 8 digits, batch 64')
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out.with_suffix('.png'), dpi=150)

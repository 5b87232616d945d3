"""Benchmark of the time and memory of a training step at several depths."""

import statistics

import numpy as np

from tools.benchmark.processes import Contestant
from tools.benchmark.report import RATIO_LEGEND, SPEED_COLUMNS, Report, spread_in_milliseconds
from tools.benchmark.timing import alternate, describe

DEPTHS = (16, 34, 64, 100, 202, 400, 1000)
MIDDLE = DEPTHS.index(202)
KINDS = ('DiracNet', '--recompute')
BATCH = 64
TIME, MEMORY = 'ms per step', 'peak memory, MB'
LEGEND = (
    f'{RATIO_LEGEND} For a linear fit, it is the cost of one more layer between '
    f'{DEPTHS[MIDDLE]} and {DEPTHS[-1]} layers, divided by that between {DEPTHS[0]} and '
    f'{DEPTHS[MIDDLE]} layers.'
)


def bench_depth(args):
    report = Report('Cost over depth', SPEED_COLUMNS, LEGEND)
    contestants = {
        (kind, depth): Contestant(kind, network(depth), BATCH) for depth in DEPTHS for kind in KINDS
    }
    samples = alternate(contestants, 5 * args.rounds)
    costs = {
        TIME: {key: 1000 * statistics.median(values) for key, values in samples.items()},
        MEMORY: {key: contestant.close() for key, contestant in contestants.items()},
    }
    for kind in KINDS:
        report.samples[f'{kind}, seconds'] = over_depth(samples, kind)
        report.samples[f'{kind}, MB'] = over_depth(costs[MEMORY], kind)
    for depth in DEPTHS:
        times = [spread_in_milliseconds(samples[kind, depth]) for kind in KINDS]
        peaks = [f'{costs[MEMORY][kind, depth]:.0f}' for kind in KINDS]
        for name, texts in ((TIME, times), (MEMORY, peaks)):
            label = f'{name}, {describe(network(depth), BATCH)}'
            add_rows(report, label, depth, costs[name], texts)
    for name, values in costs.items():
        for kind in KINDS:
            add_fit(report, name, kind, list(over_depth(values, kind).values()))
    if args.out:
        plot_costs(costs, args.out)
    return report


def network(depth):
    return depth, 1, 'digits'


def over_depth(values, kind):
    """The values of one kind, by depth, of a dict by (kind, depth)."""
    return {depth: values[kind, depth] for depth in DEPTHS}


def add_rows(report, label, depth, costs, texts):
    """A row for the cost of each kind at this depth; the others are compared with the first."""
    first = costs[KINDS[0], depth]
    for kind, text in zip(KINDS, texts):
        ratio = '' if kind == KINDS[0] else f'{first / costs[kind, depth]:.3f}'
        report.add('' if ratio else label, kind, text, ratio, '')


def add_fit(report, name, kind, values):
    """A row for the linear fit of a cost over the depths, and whether a layer costs more in deep
    networks."""
    slope, offset = np.polyfit(DEPTHS, values, 1)
    explained = np.corrcoef(DEPTHS, values)[0, 1] ** 2
    fit = f'{slope:.3f} per layer {offset:+.1f}, R^2 {explained:.4f}'
    per_layer = [
        (values[end] - values[start]) / (DEPTHS[end] - DEPTHS[start])
        for start, end in ((0, MIDDLE), (MIDDLE, -1))
    ]
    ratio = f'{per_layer[1] / per_layer[0]:.3f}'
    report.add(f'linear fit of {name}', kind, fit, ratio, 'at most 1.1')


def plot_costs(costs, out):
    """Write OUT.png: each cost over the depth, with its linear fit."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5), layout='constrained')
    for axis, (name, values) in zip(axes, costs.items()):
        for kind, marker in zip(KINDS, 'os'):
            measured = list(over_depth(values, kind).values())
            fit = np.polyfit(DEPTHS, measured, 1)
            (points,) = axis.plot(DEPTHS, measured, marker, markersize=4, label=kind)
            axis.plot(DEPTHS, np.polyval(fit, DEPTHS), color=points.get_color(), linewidth=1)
        axis.set(xlabel='depth', ylabel=name, xlim=(0, None), ylim=(0, None))
        axis.legend(frameon=False, title='lines: least squares')
    figure.suptitle('A training step of DiracNet-DEPTH-1 on 8 x 8 digits, batch 64')
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out.with_suffix('.png'), dpi=150)

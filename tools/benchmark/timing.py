"""Times of several functions or contestants, measured in turn."""

import time

import numpy as np

from tools.benchmark.processes import Contestant
from tools.benchmark.report import spread_in_milliseconds


def alternate(functions, rounds):
    """Seconds per call of each function, by name: `rounds` samples each.

    The functions run in turn, in an order that rotates from round to round. An extra round at the
    beginning is not counted: it fills caches and starts processes.
    """
    samples, names = {name: [] for name in functions}, list(functions)
    for number in range(rounds + 1):
        names.append(names.pop(0))
        for name in names:
            time.sleep(0.05)  # the threads of the previous function spin for a while
            start = time.perf_counter()
            functions[name]()
            if number > 0:
                samples[name].append(time.perf_counter() - start)
    return samples


def compare_contestants(report, label, kinds, network, batch, rounds, goals):
    """Time the kinds of contestants in turn, and add a row for each to the report.

    Args:
        label: names the measurement, in milliseconds.
        kinds: names in contestants.BUILDERS; the others are compared with the first.
        goals: for each kind, the largest ratio (first kind's median / its own) that meets its goal.

    Returns:
        The peak memory of each kind, in MB.
    """
    contestants = {kind: Contestant(kind, network, batch) for kind in kinds}
    samples = alternate(contestants, rounds)
    report.samples[label] = samples
    first, *others = kinds
    report.add(label, first, spread_in_milliseconds(samples[first]), '', '')
    for kind in others:
        ratio = '{:.3f} ({:.3f} to {:.3f})'.format(*ratio_of_medians(samples[first], samples[kind]))
        goal = f'at most {goals[kind]}' if kind in goals else ''
        report.add('', kind, spread_in_milliseconds(samples[kind]), ratio, goal)
    return {kind: contestant.close() for kind, contestant in contestants.items()}


def ratio_of_medians(first, second):
    """The ratio, and its 95 % interval by a bootstrap of the rounds that measured both."""
    from scipy.stats import bootstrap

    def ratio(a, b, axis=-1):
        return np.median(a, axis) / np.median(b, axis)

    found = bootstrap((first, second), ratio, paired=True, method='percentile', random_state=0)
    return ratio(first, second), *found.confidence_interval


def describe(network, batch):
    depth, width, dataset = network
    return f'DiracNet-{depth}-{width}, {dataset}, batch {batch}'

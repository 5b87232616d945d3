"""Benchmark of training steps and epochs, and of their peak memory."""

from tools.benchmark.report import RATIO_LEGEND, SPEED_COLUMNS, Report
from tools.benchmark.timing import compare_contestants, describe

LEGEND = (
    '*DiracNet* is the step of train.py. *textbook* computes the formula layer by layer, in the '
    'default memory layout, with SGD that updates one tensor at a time. *plain* is our network '
    'with ordinary weights. *floor* runs only the convolutions, forward and backward. '
    '*ResNet step* is the step of the ResNet with two layers fewer. '
    f'{RATIO_LEGEND}'
)
# Network, batch size, factor of --rounds, goals.
STEPS = (
    ((34, 1, 'CIFAR10'), 128, 5, {'textbook': 0.65, 'plain': 1.03, 'floor': 1.25}),
    ((34, 2, 'CIFAR10'), 128, 5, {'textbook': 0.85, 'plain': 1.03}),
    ((100, 1, 'digits'), 64, 10, {'textbook': 0.62, 'plain': 1.03, 'floor': 1.35}),
)
DEEP = (((100, 1, 'digits'), 64, 10), ((1000, 1, 'digits'), 64, 5))


def bench_training(args):
    report = Report('Training', SPEED_COLUMNS, LEGEND)
    for network, batch, factor, goals in STEPS:
        compare_contestants(
            report,
            f'step of {describe(network, batch)}, ms',
            ('DiracNet', 'textbook', 'plain', 'floor'),
            network,
            batch,
            factor * args.rounds,
            goals,
        )
    for network, batch, factor in DEEP:
        compare_with_resnet(report, network, batch, factor * args.rounds)
    compare_contestants(
        report,
        'epoch of 10,000 images of 32 x 32 with the loader, DiracNet-16-1, batch 128, ms',
        ('DiracNet epoch', 'textbook epoch'),
        (16, 1, 'CIFAR10'),
        128,
        args.rounds,
        {'textbook epoch': 0.5},
    )
    compare_options(report, (34, 2, 'CIFAR10'), 128, 5 * args.rounds)
    return report


def compare_with_resnet(report, network, batch, rounds):
    """Time and peak memory of a step against those of the ResNet of the same depth."""
    label = f'step of {describe(network, batch)}'
    kinds = ('DiracNet', 'ResNet step')
    goals = {'ResNet step': 1.0}
    peaks = compare_contestants(
        report, f'{label}, against ResNet, ms', kinds, network, batch, rounds, goals
    )
    report.samples[f'peak memory, {label}'] = peaks
    ratio = f'{peaks["DiracNet"] / peaks["ResNet step"]:.3f} x ResNet'
    report.add(
        f'peak memory, {label}, MB', 'DiracNet', f'{peaks["DiracNet"]:.0f}', ratio, 'at most 1.0'
    )


def compare_options(report, network, batch, rounds):
    """Time and peak memory of --recompute, and the time of --dtype bfloat16."""
    peaks = compare_contestants(
        report,
        f'step with options of {describe(network, batch)}, ms',
        ('--recompute', 'DiracNet', 'textbook', '--dtype bfloat16'),
        network,
        batch,
        rounds,
        {'DiracNet': 1.25},
    )
    report.samples['peak memory'] = peaks
    for kind, goal in (
        ('DiracNet', 'at most 1.0'),
        ('--recompute', 'at most 0.6'),
        ('textbook', ''),
    ):
        ratio = f'{peaks[kind] / peaks["textbook"]:.3f} x textbook'
        report.add('peak memory of these steps, MB', kind, f'{peaks[kind]:.0f}', ratio, goal)

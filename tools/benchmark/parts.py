"""The parts of the benchmark that measure on the CPU. Each makes a Report; with --quick, of the
smallest networks, to try the program."""

import os
import tempfile
from pathlib import Path

from tools.benchmark.contestants import race
from tools.benchmark.images import (
    DECODERS,
    decoding_times,
    jpeg_batches,
    largest_difference,
    write_photographs,
)
from tools.benchmark.report import Report, ratio_of_medians

LEGEND = (
    "The ratio is the median of a measurement's first row divided by the median of this row, with "
    'a 95 % interval from a bootstrap of the rounds. MB is the peak memory of the process, above '
    'that of one that only imports torch.'
)

# --- steps: what, kinds, network, batch, factor of --rounds ----------------------------------

USUAL = ('DiracNet', 'textbook', 'plain')
WITH_OPTIONS = ('--recompute', 'DiracNet', 'textbook', '--dtype bfloat16')
TRAINING = [
    ('step', USUAL, (34, 1, 'CIFAR10'), 128, 5),
    ('step', USUAL, (34, 2, 'CIFAR10'), 128, 5),
    ('step', USUAL, (100, 1, 'digits'), 64, 10),
    ('step, against ResNet,', ('DiracNet', 'ResNet step'), (100, 1, 'digits'), 64, 10),
    ('step, against ResNet,', ('DiracNet', 'ResNet step'), (1000, 1, 'digits'), 64, 5),
    ('step with options', WITH_OPTIONS, (34, 2, 'CIFAR10'), 128, 5),
]
DEPTH = [
    ('step', ('DiracNet', '--recompute'), (depth, 1, 'digits'), 64, 5)
    for depth in (16, 34, 64, 100, 202, 400, 1000)
]
INFERENCE = [
    (f'inference in {runtime}', kinds, (depth, 1, 'ImageNet'), batch, factor)
    for depth in (18, 34)
    for batch, factor in ((1, 8), (16, 2))
    for runtime, kinds in (
        ('PyTorch', ('folded', 'unfolded', 'ResNet')),
        ('ONNX Runtime', ('folded ONNX', 'ResNet ONNX')),
        ('ONNX Runtime, int8,', ('folded int8', 'folded ONNX')),
    )
]


def bench_steps(title, table, args):
    report = Report(title, LEGEND)
    if args.quick:
        table = {row[0]: row for row in reversed(table)}.values()  # the first of each kind
    for what, kinds, network, batch, factor in table:
        if args.quick:
            network = network if network[2] == 'ImageNet' else (10, 1, 'digits')
            batch, factor = 2, 1
        depth, width, dataset = network
        label = f'{what} of DiracNet-{depth}-{width}, {dataset}, batch {batch}'
        contestants = {kind: (kind, network, batch) for kind in kinds}
        compare(report, label, contestants, batch, factor * args.rounds)
    return report


def compare(report, label, contestants, images, rounds):
    """Race contestants, and add a row for each.

    images: how many each of them computes in a step.
    """
    samples, peaks = race(contestants, rounds)
    base, *_ = contestants
    for name, (_, *times) in samples.items():
        found = ratio_of_medians(samples[base][1:], times)
        ratio = '' if name == base else '{:.3f} ({:.3f} to {:.3f})'.format(*found)
        report.add(label, name, times, ratio, images, peaks[name])


# --- input -----------------------------------------------------------------------------------


def bench_data(args):
    """Passes over small images and JPEGs."""
    report = Report('Input pipelines', LEGEND)
    n, n_large = (1280, 32) if args.quick else (50_000, 1024)

    def add(label, n, *contestant):
        compare(report, label, {'ours': contestant}, n, args.rounds)

    add('pass over small images, 32 x 32 x 3, batch 128, one core', n, 'small images', n)
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder), n_large)
        os.environ['THP_MEM_ALLOC_ENABLE'] = '1'  # as train.py sets it for large images
        for part, use in (('train', 'training'), ('val', 'evaluation')):
            label = f'pass over JPEGs, 500 x 375 to 224, batch 64, {use}, two cores'
            add(label, n_large, 'JPEGs', folder, part)
        del os.environ['THP_MEM_ALLOC_ENABLE']
        add_decoders(report, Path(folder), n_large, args.rounds)
    return report


def add_decoders(report, folder, n, rounds):
    """Add rows about decoders of the JPEGs in a folder, n for training and n for evaluation."""
    for part, use in (('train', 'training'), ('val', 'evaluation')):
        times = decoding_times(jpeg_batches(folder, part, workers=0), rounds)
        for name, own in times.items():
            ratio = '{:.3f} ({:.3f} to {:.3f})'.format(*ratio_of_medians(times['ours'], own))
            label = f'CPU time of a pass over these JPEGs, {use}'
            report.add(label, name, own, '' if name == 'ours' else ratio, n)
    paths = sorted(folder.glob('train/*/*'))[:100]
    for name in DECODERS:
        difference = largest_difference(name, paths)
        report.add('largest difference to our pixels, of 255', name, str(difference))

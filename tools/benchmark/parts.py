"""The parts of the benchmark that measure on the CPU. Each makes a Report; with --quick, of the
smallest networks, to try the program."""

import os
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from subprocess import DEVNULL

import numpy as np

from tools.benchmark.contestants import alternate, race, seconds
from tools.benchmark.images import write_photographs
from tools.benchmark.report import ROOT, Report, spread

SMALLEST = (10, 1, 'digits')


def compare(report, label, contestants, rounds):
    """Add the milliseconds of each contestant of `race`; returns what race returns."""
    samples, peaks = race(contestants, rounds)
    milliseconds = {name: [1000 * value for value in own[1:]] for name, own in samples.items()}
    report.compare(f'{label}, ms', milliseconds)
    return samples, peaks


def steps(kinds, network, batch):
    return {kind: (kind, network, batch) for kind in kinds}


def describe(network, batch):
    depth, width, dataset = network
    return f'DiracNet-{depth}-{width}, {dataset}, batch {batch}'


# --- training --------------------------------------------------------------------------------

USUAL = ('DiracNet', 'textbook', 'plain', 'floor')
WITH_OPTIONS = ('--recompute', 'DiracNet', 'textbook', '--dtype bfloat16')
TRAINING = [  # label, kinds, network, batch, factor of --rounds
    ('step', USUAL, (34, 1, 'CIFAR10'), 128, 5),
    ('step', USUAL, (34, 2, 'CIFAR10'), 128, 5),
    ('step', USUAL, (100, 1, 'digits'), 64, 10),
    ('step, against ResNet,', ('DiracNet', 'ResNet step'), (100, 1, 'digits'), 64, 10),
    ('step, against ResNet,', ('DiracNet', 'ResNet step'), (1000, 1, 'digits'), 64, 5),
    ('step with options', WITH_OPTIONS, (34, 2, 'CIFAR10'), 128, 5),
]


def bench_training(args):
    report = Report('Training')
    table = {row[0]: row for row in TRAINING}.values() if args.quick else TRAINING
    for label, kinds, network, batch, factor in table:
        if args.quick:
            network, batch, factor = SMALLEST, 4, 1
        label = f'{label} of {describe(network, batch)}'
        contestants = steps(kinds, network, batch)
        _, peaks = compare(report, label, contestants, factor * args.rounds)
        report.compare(f'peak memory, {label}, MB', in_lists(peaks))
    n = 128 if args.quick else 10_000
    label = f'epoch of {n:,} images of 32 x 32 with the loader, DiracNet-16-1, batch 128'
    kinds = ('DiracNet epoch', 'textbook epoch')
    compare(report, label, steps(kinds, (16, 1, 'CIFAR10'), n), args.rounds)
    return report


def in_lists(values):
    return {name: [value] for name, value in values.items()}


def bench_compile(args):
    report = Report('torch.compile')
    table = [((34, 1, 'CIFAR10'), 128), ((100, 1, 'digits'), 64)]
    for network, batch in [(SMALLEST, 4)] if args.quick else table:
        name = describe(network, batch)
        contestants = steps(('--compile', 'DiracNet'), network, batch)
        samples, _ = compare(report, f'step of {name}', contestants, 3 * args.rounds)
        report.compare(f'first step of {name}, s', {'--compile': samples['--compile'][:1]})
    return report


# --- depth -----------------------------------------------------------------------------------

DEPTHS = (16, 34, 64, 100, 202, 400, 1000)
DEPTH_KINDS = ('DiracNet', '--recompute')


def bench_depth(args):
    depths, middle = (DEPTHS[:3], 34) if args.quick else (DEPTHS, 202)
    first, last, batch = depths[0], depths[-1], 64
    legend = (
        f'The ratio of a linear fit is the cost of one more layer between {middle} and {last} '
        f'layers, divided by that between {first} and {middle} layers.'
    )
    report = Report('Cost over depth', legend)
    networks = {depth: (depth, 1, 'digits') for depth in depths}
    keys = [(kind, depth) for depth in depths for kind in DEPTH_KINDS]
    contestants = {(kind, depth): (kind, networks[depth], batch) for kind, depth in keys}
    samples, peaks = race(contestants, 5 * args.rounds)
    times = {key: [1000 * value for value in values[1:]] for key, values in samples.items()}
    curves = {}  # {(cost, kind): its medians over the depths}
    for cost, values in (('ms per step', times), ('peak memory, MB', in_lists(peaks))):
        for depth, network in networks.items():
            own = {kind: values[kind, depth] for kind in DEPTH_KINDS}
            report.compare(f'{cost}, {describe(network, batch)}', own)
        for kind in DEPTH_KINDS:
            curves[cost, kind] = [statistics.median(values[kind, depth]) for depth in depths]
    for (cost, kind), curve in curves.items():
        slope, offset = np.polyfit(depths, curve, 1)
        explained = np.corrcoef(depths, curve)[0, 1] ** 2
        fit = f'{slope:.3f} per layer {offset:+.1f}, R^2 {explained:.4f}'
        at_middle = curve[depths.index(middle)]
        late = (curve[-1] - at_middle) / (last - middle)
        early = (at_middle - curve[0]) / (middle - first)
        report.add(f'linear fit of {cost}', kind, fit, f'{late / early:.3f}')
    if args.out:
        plot_curves(depths, curves, args.out.with_suffix('.png'))
    return report


def plot_curves(depths, curves, path):
    """Draw each cost over the depth, with its linear fit."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5), layout='constrained')
    for number, ((cost, kind), curve) in enumerate(curves.items()):
        axis = axes[number // 2]
        (points,) = axis.plot(depths, curve, 'os'[number % 2], markersize=4, label=kind)
        fit = np.polyval(np.polyfit(depths, curve, 1), depths)
        axis.plot(depths, fit, color=points.get_color(), linewidth=1)
        axis.set(xlabel='depth', ylabel=cost, xlim=(0, None), ylim=(0, None))
        axis.legend(frameon=False, title='lines: least squares')
    figure.suptitle('A training step of DiracNet-DEPTH-1 on 8 x 8 digits, batch 64')
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


# --- inference -------------------------------------------------------------------------------

INFERENCE = {
    'PyTorch': ('folded', 'unfolded', 'ResNet'),
    'PyTorch, bfloat16': ('folded bfloat16', 'folded'),
    'ONNX Runtime': ('folded ONNX', 'ResNet ONNX'),
    'ONNX Runtime, int8': ('folded int8', 'folded ONNX'),
}


def bench_inference(args):
    report = Report('Inference')
    for depth in (18,) if args.quick else (18, 34):
        for batch, factor in ((1, 1),) if args.quick else ((1, 8), (16, 2)):
            for group, kinds in INFERENCE.items():
                label = f'inference of {depth} layers, 224 x 224, batch {batch}, {group}'
                contestants = steps(kinds, (depth, 1, 'ImageNet'), batch)
                compare(report, label, contestants, factor * args.rounds)
    return report


# --- start -----------------------------------------------------------------------------------

FIRST_STEP = """
import os, tempfile, train
from torch.optim.optimizer import register_optimizer_step_post_hook
register_optimizer_step_post_hook(lambda *_: os._exit(0))
train.main(['--dataset', 'digits', '--save', f'{tempfile.mkdtemp()}/run'])
"""
PROGRAMS = {
    'import torch': ('-c', 'import torch'),
    'train.py --help': ('train.py', '--help'),
    'digits, first step': ('-c', FIRST_STEP),
}


def bench_start(args):
    """Time programs from their command to their end, and digits to its first step."""
    report = Report('Start')
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, 'TMPDIR': folder}  # for the runs of FIRST_STEP

        def run(arguments):
            command = [sys.executable, *arguments]
            subprocess.run(command, cwd=ROOT, env=environment, stdout=DEVNULL, check=True)

        programs = {name: partial(seconds, partial(run, own)) for name, own in PROGRAMS.items()}
        samples = alternate(programs, args.rounds if args.quick else 2 * args.rounds)
    report.samples['start'] = samples = {name: values[1:] for name, values in samples.items()}
    shortest = statistics.median(samples['import torch'])
    for name, values in samples.items():
        ratio = f'{statistics.median(values) / shortest:.2f} x import torch'
        report.add('seconds from the command', name, spread(values), ratio)
    return report


# --- input -----------------------------------------------------------------------------------


def bench_data(args):
    report = Report('Input pipelines')
    n, many = (1280, 2560) if args.quick else (12_800, 50_000)
    compare_rates(
        report,
        'small images, 32 x 32 x 3, batch 128, training, images/s per core',
        {'ours': ('small images', n), 'torchvision': ('small images, torchvision', n)},
        {'ours': n, 'torchvision': n / 2},  # its workers keep two cores busy
        args.rounds,
    )
    _, peaks = race(
        {
            f'two passes over {many:,} images of 32 x 32': ('small images', many),
            'steps of DiracNet-16-1 on 128 of them': ('DiracNet', (16, 1, 'CIFAR10'), 128),
        },
        1,
    )
    for name, peak in peaks.items():
        report.compare(f'peak memory, {name}, MB', {'ours': [peak]})
    with tempfile.TemporaryDirectory() as folder:
        compare_photographs(report, Path(folder, 'large'), args.images, args.rounds)
        small, n = Path(folder, 'small'), 30 * args.images
        write_photographs(small, n, (32, 32), quality=75)
        label = f'reading {2 * n:,} JPEGs of 32 x 32, images/s'
        compare_rates(report, label, {'ours': ('small files', small)}, {'ours': 2 * n}, args.rounds)
    return report


def compare_rates(report, label, contestants, n, rounds):
    """Add the rates of passes. n: {name: images in a pass, or images per core}."""
    samples, _ = race(contestants, rounds)
    rates = {name: [n[name] / value for value in own[1:]] for name, own in samples.items()}
    report.compare(label, rates)


def compare_photographs(report, folder, n, rounds):
    write_photographs(folder, n)
    os.environ['THP_MEM_ALLOC_ENABLE'] = '1'  # as train.py sets it for large images
    for part, use in (('train', 'training'), ('val', 'evaluation')):
        label = f'JPEG, 500 x 375 to 224, batch 64, {use}, images/s per core'
        contestants = {
            'ours': ('JPEGs', folder, part),
            'torchvision': ('JPEGs, torchvision', folder, part),
        }
        compare_rates(report, label, contestants, dict.fromkeys(contestants, n / 2), rounds)
    del os.environ['THP_MEM_ALLOC_ENABLE']

"""The parts of the benchmark that measure on the CPU: each makes a Report.

With --quick they try the program on the smallest network.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np

from tools.benchmark import contestants
from tools.benchmark.contestants import alternate, race, seconds
from tools.benchmark.images import write_photographs
from tools.benchmark.report import RATIO_LEGEND, Report, spread

ROOT = Path(__file__).resolve().parents[2]
SMALLEST = (10, 1, 'digits')
TRAINING_LEGEND = (
    '*DiracNet* is the step of train.py. *textbook* computes the formula layer by layer, in the '
    'default memory layout, with SGD that updates one tensor at a time. *plain* is our network '
    'with ordinary weights. *floor* runs only the convolutions, forward and backward. '
    '*ResNet step* is the step of the ResNet with two layers fewer. '
    f'{RATIO_LEGEND}'
)
INFERENCE_LEGEND = (
    '*folded* is a folded DiracNet, *unfolded* the same network before folding. *ResNet* is '
    "torchvision's of the same depth, with its batch norms folded. *int8* is the file that "
    'tools.export writes, here with random weights. A folded RepVGG is the network that a folded '
    f'DiracNet is. {RATIO_LEGEND}'
)
INFERENCE = {
    'PyTorch': ('folded', 'unfolded', 'ResNet'),
    'PyTorch, bfloat16': ('folded bfloat16', 'folded'),
    'ONNX Runtime': ('folded ONNX', 'ResNet ONNX'),
    'ONNX Runtime, int8': ('folded int8', 'folded ONNX'),
}
STEPS = ('DiracNet', 'textbook', 'plain', 'floor')
TRAINING = (  # label, kinds, network, batch, factor of --rounds
    ('step', STEPS, (34, 1, 'CIFAR10'), 128, 5),
    ('step', STEPS, (34, 2, 'CIFAR10'), 128, 5),
    ('step', STEPS, (100, 1, 'digits'), 64, 10),
    ('step, against ResNet,', ('DiracNet', 'ResNet step'), (100, 1, 'digits'), 64, 10),
    ('step, against ResNet,', ('DiracNet', 'ResNet step'), (1000, 1, 'digits'), 64, 5),
    (
        'step with options',
        ('--recompute', 'DiracNet', 'textbook', '--dtype bfloat16'),
        (34, 2, 'CIFAR10'),
        128,
        5,
    ),
)
DEPTHS = (16, 34, 64, 100, 202, 400, 1000)
DEPTH_KINDS = ('DiracNet', '--recompute')
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


def bench_training(args):
    report = Report('Training', TRAINING_LEGEND)
    for label, kinds, network, batch, factor in TRAINING:
        if args.quick:
            network, batch = SMALLEST, 4
        label = f'{label} of {describe(network, batch)}'
        peaks = compare_steps(report, label, kinds, network, batch, factor * args.rounds)
        compare_peaks(report, f'peak memory, {label}, MB', peaks)
    compare_epochs(report, 256 if args.quick else 10_000, args.rounds)
    return report


def compare_steps(report, label, kinds, network, batch, rounds):
    """Add the times of kinds of steps in ms. Returns the peak memory of each kind in MB."""
    samples, peaks = race({kind: (kind, network, batch) for kind in kinds}, rounds)
    report.compare(f'{label}, ms', in_milliseconds(samples))
    return peaks


def compare_epochs(report, n, rounds):
    kinds = ('DiracNet epoch', 'textbook epoch')
    samples, _ = race({kind: (kind, (16, 1, 'CIFAR10'), n) for kind in kinds}, rounds)
    label = f'epoch of {n:,} images of 32 x 32 with the loader, DiracNet-16-1, batch 128, ms'
    report.compare(label, in_milliseconds(samples))


def compare_peaks(report, label, peaks):
    report.compare(label, {kind: [round(peak)] for kind, peak in peaks.items()})


def in_milliseconds(samples):
    return {name: [1000 * value for value in values] for name, values in samples.items()}


def describe(network, batch):
    depth, width, dataset = network
    return f'DiracNet-{depth}-{width}, {dataset}, batch {batch}'


def bench_compile(args):
    report = Report('torch.compile', RATIO_LEGEND)
    for network, batch in (((34, 1, 'CIFAR10'), 128), ((100, 1, 'digits'), 64)):
        if args.quick:
            network, batch = SMALLEST, 4
        name = describe(network, batch)
        compiled = contestants.Contestant('--compile', network, batch)
        report.add(f'first step of {name}, s', '--compile', f'{compiled():.1f}', '')
        compiled.close()
        kinds = ('--compile', 'DiracNet')
        compare_steps(report, f'step of {name}', kinds, network, batch, 3 * args.rounds)
    return report


# --- depth -----------------------------------------------------------------------------------


def bench_depth(args):
    depths, middle = (DEPTHS[:3], 1) if args.quick else (DEPTHS, DEPTHS.index(202))
    batch = 4 if args.quick else 64
    legend = (
        f'{RATIO_LEGEND} For a linear fit, it is the cost of one more layer between '
        f'{depths[middle]} and {depths[-1]} layers, divided by that between {depths[0]} and '
        f'{depths[middle]} layers.'
    )
    report = Report('Cost over depth', legend)
    networks = {depth: (depth, 1, 'digits') for depth in depths}
    specifications = {
        (kind, depth): (kind, networks[depth], batch) for depth in depths for kind in DEPTH_KINDS
    }
    times, peaks = race(specifications, 5 * args.rounds)
    times = in_milliseconds(times)
    for depth in depths:
        name = describe(networks[depth], batch)
        report.compare(f'ms per step, {name}', {kind: times[kind, depth] for kind in DEPTH_KINDS})
        compare_peaks(
            report, f'peak memory, MB, {name}', {kind: peaks[kind, depth] for kind in DEPTH_KINDS}
        )
    medians = {key: statistics.median(values) for key, values in times.items()}
    costs = {'ms per step': medians, 'peak memory, MB': peaks}
    curves = {  # (cost, kind): a value for each depth
        (name, kind): [cost[kind, depth] for depth in depths]
        for name, cost in costs.items()
        for kind in DEPTH_KINDS
    }
    for (name, kind), values in curves.items():
        report.add(f'linear fit of {name}', kind, *linear_fit(depths, values, middle))
    if args.out:
        plot_costs(depths, curves, args.out)
    return report


def linear_fit(depths, values, middle):
    """The fit as a text, and how many times as much a layer costs beyond the middle depth."""
    slope, offset = np.polyfit(depths, values, 1)
    explained = np.corrcoef(depths, values)[0, 1] ** 2
    low, high = (
        (values[end] - values[start]) / (depths[end] - depths[start])
        for start, end in ((0, middle), (middle, -1))
    )
    return f'{slope:.3f} per layer {offset:+.1f}, R^2 {explained:.4f}', f'{high / low:.3f}'


def plot_costs(depths, curves, out):
    """Write OUT.png: each cost over the depth, with its linear fit."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    names = list(dict.fromkeys(name for name, _ in curves))
    figure, axes = pyplot.subplots(1, len(names), figsize=(9, 3.5), layout='constrained')
    for (name, kind), values in curves.items():
        axis = axes[names.index(name)]
        (points,) = axis.plot(depths, values, 'os'[kind == '--recompute'], ms=4, label=kind)
        fit = np.polyval(np.polyfit(depths, values, 1), depths)
        axis.plot(depths, fit, color=points.get_color(), linewidth=1)
        axis.set(xlabel='depth', ylabel=name, xlim=(0, None), ylim=(0, None))
        axis.legend(frameon=False, title='lines: least squares')
    figure.suptitle('A training step of DiracNet-DEPTH-1 on 8 x 8 digits')
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out.with_suffix('.png'), dpi=150)


# --- inference, start, input -----------------------------------------------------------------


def bench_inference(args):
    """Inference with images of 224 x 224."""
    report = Report('Inference', INFERENCE_LEGEND)
    for depth in (18,) if args.quick else (18, 34):
        for batch in (1,) if args.quick else (1, 16):
            for group, kinds in INFERENCE.items():
                label = f'inference of {depth} layers, 224 x 224, batch {batch}, {group}'
                rounds = args.rounds * (1 if args.quick else 8 if batch == 1 else 2)
                compare_steps(report, label, kinds, (depth, 1, 'ImageNet'), batch, rounds)
    return report


def bench_start(args):
    """Time programs from their command to their end, and digits to its first step."""
    report = Report('Start')
    programs = {name: partial(program_seconds, program) for name, program in PROGRAMS.items()}
    samples = alternate(programs, args.rounds if args.quick else 2 * args.rounds)
    report.samples['start'] = samples
    shortest = statistics.median(samples['import torch'])
    for name, values in samples.items():
        ratio = f'{statistics.median(values) / shortest:.2f} x import torch'
        report.add('seconds from the command', name, spread(values), ratio)
    return report


def program_seconds(arguments):
    """The time of python ARGUMENTS in the repository's root."""
    with tempfile.TemporaryDirectory() as folder:
        run = partial(
            subprocess.run,
            [sys.executable, *arguments],
            cwd=ROOT,
            env={**os.environ, 'TMPDIR': folder},  # for the run of FIRST_STEP
            stdout=subprocess.DEVNULL,
            check=True,
        )
        return seconds(run)


def bench_data(args):
    report = Report('Input pipelines', f'Speeds are those of whole passes. {RATIO_LEGEND}')
    n = 1280 if args.quick else 12_800
    contestants = {
        'ours': (1, 'small images', n),
        'torchvision': (2, 'small images, torchvision', n),
    }
    compare_rates(report, 'small images, 32 x 32 x 3, batch 128', contestants, n, args.rounds)
    measure_memory(report, n if args.quick else 50_000)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_photographs(folder / 'large', args.images)
        os.environ['THP_MEM_ALLOC_ENABLE'] = '1'  # as train.py sets it for large images
        for part, use in (('train', 'training'), ('val', 'evaluation')):
            contestants = {
                'ours': (2, 'JPEGs', folder / 'large', part),
                'torchvision': (2, 'JPEGs, torchvision', folder / 'large', part),
            }
            label = f'JPEG, 500 x 375 to 224, batch 64, {use}'
            compare_rates(report, label, contestants, args.images, args.rounds)
        del os.environ['THP_MEM_ALLOC_ENABLE']
        compare_small_files(report, folder / 'small', 30 * args.images, args.rounds)
    return report


def compare_rates(report, label, specifications, n, rounds):
    """Add the images per second of passes over n images.

    specifications: {name: (cores that it keeps busy, kind, *arguments)}.
    """
    samples, _ = race({name: given for name, (_, *given) in specifications.items()}, rounds)
    cores = {name: given[0] for name, given in specifications.items()}
    rates = {name: [n / value / cores[name] for value in samples[name]] for name in samples}
    report.compare(f'{label}, images/s per core', rates)


def measure_memory(report, n):
    """What training needs in memory for the images, and for the steps."""
    specifications = {
        f'two passes over {n:,} images of 32 x 32': ('small images', n),
        'steps of DiracNet-16-1 on one batch of 128 of them': ('DiracNet', (16, 1, 'CIFAR10'), 128),
    }
    _, peaks = race(specifications, 1)
    for name, peak in peaks.items():
        report.compare(f'peak memory, {name}, MB', {'ours': [round(peak)]})


def compare_small_files(report, folder, n, rounds):
    """Small images in files, which are read into memory once, against images made in memory."""
    write_photographs(folder, n, (32, 32), quality=75)
    reading = {'ours': (1, 'reading of small files', folder)}
    compare_rates(report, f'reading {2 * n:,} JPEGs of 32 x 32', reading, 2 * n, rounds)
    passes = {'from JPEGs': (1, 'small files', folder), 'made in memory': (1, 'small images', n)}
    compare_rates(report, 'small images, 32 x 32 x 3, batch 128', passes, n, 20 * rounds)

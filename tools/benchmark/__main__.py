"""Measure speed and memory against what one would otherwise write, in turns, medians and spreads.

    python -m tools.benchmark data --out logs/reference/benchmark-data

prints a table, and writes it as OUT.md and with all samples as OUT.json. Ratios are of medians; images per second are per core.
Run it alone on the machine: everything else that runs shows in the numbers.

    data        the input pipelines against torchvision's per-sample transforms in a DataLoader, and their memory
    train       steps and epochs against the textbook's network, plain weights and convolutions alone; peak memory
    inference   folded networks against unfolded ones and torchvision's ResNets, in PyTorch and ONNX Runtime
    depth       time and memory of a step over the depth of the network; OUT.png
    start       from the command to the first training step
    compile     what --compile takes, and what it gives
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lab.errors import OneLineParser, OptionError, run

ROOT = Path(__file__).resolve().parents[2]


def machine():
    """Facts that every table comes with."""
    import torch

    try:
        with open('/proc/cpuinfo') as file:
            model = next(
                line.split(':')[1].strip() for line in file if line.startswith('model name')
            )
    except (OSError, StopIteration):
        model = platform.processor()
    from importlib.metadata import version

    return {
        'cpu': model,
        'cores': os.cpu_count(),
        'torch threads': torch.get_num_threads(),
        'python': platform.python_version(),
        **{
            name: version(name)
            for name in ('torch', 'torchvision', 'numpy', 'opencv-python', 'pillow')
        },
    }


def alternate(functions, rounds):
    """Seconds of each function, called in turns, whose order rotates; the first turn, in which caches fill and processes start, doesn't
    count. Before each there is a pause, as threads of the one before go on waiting busily for a while."""
    samples, names = {name: [] for name in functions}, list(functions)
    for turn in range(rounds + 1):
        names.append(names.pop(0))
        for name in names:
            time.sleep(0.05)
            start = time.perf_counter()
            functions[name]()
            if turn:
                samples[name].append(time.perf_counter() - start)
    return samples


def spread(samples):
    """Median with the lower and upper quartile, as text with the unit of the samples."""
    low, middle, high = statistics.quantiles(samples, n=4)
    return f'{middle:.4g} ({low:.4g} to {high:.4g})'


SPEED = ['what', 'which', 'median (quartiles)', 'first over this', 'goal']
LEGEND = (
    'textbook: the network as the formula reads, layer by layer, in the default memory layout, SGD over single tensors; plain: ours with ordinary '
    'weights; floor: the convolutions alone, forward and backward; resnet: torchvision\'s, batch norms folded. "First over this" is the first '
    "row's median over this row's."
)


class Report:
    """Rows of a Markdown table, and the samples behind them."""

    def __init__(self, title, columns):
        self.title, self.columns, self.rows, self.samples = title, columns, [], {}
        self.facts = machine()

    def add(self, *row):
        self.rows.append([str(cell) for cell in row])
        print('  '.join(self.rows[-1]), flush=True)

    def markdown(self):
        lines = [
            f'# {self.title}',
            '',
            ', '.join(f'{name} {value}' for name, value in self.facts.items()) + '.',
            '',
            *([LEGEND, ''] if self.columns is SPEED else []),
            '| ' + ' | '.join(self.columns) + ' |',
            '|' + ' --- |' * len(self.columns),
        ]
        return '\n'.join([*lines, *('| ' + ' | '.join(row) + ' |' for row in self.rows)]) + '\n'

    def write(self, out):
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_suffix('.md').write_text(self.markdown())
        out.with_suffix('.json').write_text(
            json.dumps(
                {
                    'facts': self.facts,
                    'columns': self.columns,
                    'rows': self.rows,
                    'samples': self.samples,
                },
                indent=1,
            )
            + '\n'
        )


# --- data ------------------------------------------------------------------------------------------------------------


def photographs(folder, n):
    """n JPEGs of 500 x 375 pixels and quality 90, cut from scikit-learn's two photographs, in train/ and val/ of one class."""
    import cv2
    import numpy as np
    from sklearn.datasets import load_sample_images

    images, random = load_sample_images().images, np.random.default_rng(0)
    for part in ('train', 'val'):
        (folder / part / 'all').mkdir(parents=True)
        for i in range(n):
            top, left = random.integers(0, 427 - 375 + 1), random.integers(0, 640 - 500 + 1)
            cv2.imwrite(
                str(folder / part / 'all' / f'{i:04}.jpg'),
                images[i % 2][top : top + 375, left : left + 500, ::-1],
                [cv2.IMWRITE_JPEG_QUALITY, 90],
            )


def consume(batches):
    for _ in batches:
        pass


def compare(report, name, ours, theirs, n, cores, goal, rounds):
    """Whole passes over n images, ours and theirs in turns."""
    samples = alternate({'ours': ours, 'torchvision': theirs}, rounds)
    rates = {
        key: [n / seconds / cores[key] for seconds in values] for key, values in samples.items()
    }
    report.samples[name] = rates
    ratio = statistics.median(rates['ours']) / statistics.median(rates['torchvision'])
    report.add(
        name,
        spread(rates['ours']),
        spread(rates['torchvision']),
        f'{ratio:.1f}',
        f'at least {goal}',
    )


# A fresh process that ends by printing what memory it holds, in MB. In the one that reads CIFAR-10, torchvision is told the
# checksums of the made files where it is imported: in the child of that process which reads them.
CHILD = """
import json, sys
sys.path.insert(0, '.')
import torch
def resident():
    with open('/proc/self/status') as file:
        return next(int(line.split()[1]) for line in file if line.startswith('VmRSS')) / 1024
"""
CIFAR_CHILD = (
    CHILD
    + """
from lab.data import datasets as data
read = data._read_torchvision
def read_made(name, root, download):
    from torchvision.datasets import CIFAR10
    sums = json.loads(sys.argv[2])
    for part in (CIFAR10.train_list, CIFAR10.test_list):
        part[:] = [[name, sums[name]] for name, _ in part]
    CIFAR10.meta['md5'] = sums['batches.meta']
    return read(name, root, download)
data._read_torchvision = read_made
source = data.load('CIFAR10', sys.argv[1])
batches = source.batches(True, batch_size=128, pad=4)
"""
)
LOADING = (
    CIFAR_CHILD
    + """
for _ in range(2):
    batches.epoch += 1
    for inputs, targets in batches: pass
print(json.dumps(resident()))
"""
)
STEPS = """
import train
from diracnet import Network, define_diracnet
module = Network(*define_diracnet(16, 1, 'CIFAR10'))
optimizer = train.make_optimizer(module, {'lr': 0.1, 'weight_decay': 5e-4})
for step in range(30):
    inputs, targets = next(batches)
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(module(inputs), targets).backward()
    optimizer.step()
print(json.dumps(resident()))
"""
TRAINING = CIFAR_CHILD + 'batches = iter(batches)' + STEPS
RANDOM_BATCH = (
    CHILD
    + """
import itertools
inputs = torch.randn(128, 3, 32, 32).contiguous(memory_format=torch.channels_last)
batches = itertools.repeat((inputs, torch.arange(128) % 10))
"""
    + STEPS
)
FOLDER = (
    CHILD
    + """
import glob, data
source = data.load('folder', sys.argv[1])
batches = source.batches(True, batch_size=64, workers=2)
def together():
    pids = ['self', *(worker.pid for worker in batches.loader._iterator._workers)]
    kilobytes = 0
    for pid in pids:
        with open(f'/proc/{pid}/smaps_rollup') as file:
            kilobytes += sum(int(line.split()[1]) for line in file if line.startswith('Pss:'))
    return kilobytes / 1024
sizes = []
for epoch in range(12):
    batches.epoch = epoch
    for inputs, targets in batches: pass
    sizes.append(together())
print(json.dumps(sizes))
"""
)


def child(code, *arguments):
    """The JSON that a fresh Python process prints last."""
    result = subprocess.run(
        [sys.executable, '-c', code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != 'THP_MEM_ALLOC_ENABLE'},
    )
    return json.loads(result.stdout.splitlines()[-1])


def cifar_files(root):
    """Six files in CIFAR-10's format and size, of random pixels; returns their MD5 sums by name."""
    import hashlib
    import pickle

    import numpy as np

    folder, random, sums = root / 'cifar-10-batches-py', np.random.default_rng(0), {}
    folder.mkdir(parents=True)
    batch = [f'data_batch_{i}' for i in range(1, 6)] + ['test_batch']
    for name in [*batch, 'batches.meta']:
        content = (
            {'label_names': [f'class{i}' for i in range(10)]}
            if name == 'batches.meta'
            else {
                'data': random.integers(0, 256, (10_000, 3072)).astype(np.uint8),
                'labels': random.integers(0, 10, 10_000).tolist(),
            }
        )
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    return sums


def bench_data(report, args):
    import torch
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    from lab.data import datasets as data
    from tools import contestants

    os.environ['THP_MEM_ALLOC_ENABLE'] = (
        '1'  # as train.py has it for image files, here for ours and theirs
    )
    facts = {'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225)}

    # small images
    n = 12_800
    ours, theirs = contestants.our_batches(n), contestants.per_sample_batches(n)
    threads = torch.get_num_threads()
    # The reference keeps two cores busy with its workers; ours runs on one thread, and counts as one core.
    torch.set_num_threads(1)
    compare(
        report,
        'small images, training: 32 x 32 x 3, batch 128',
        lambda: consume(ours),
        lambda: consume(theirs),
        n,
        {'ours': 1, 'torchvision': 2},
        25,
        args.rounds,
    )
    del theirs

    # JPEGs, with two worker processes each
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        photographs(folder, args.images)
        source = data.load('folder', folder)
        pipelines = {
            'train': transforms.Compose(
                [
                    transforms.RandomResizedCrop(224),
                    transforms.RandomHorizontalFlip(),
                    transforms.ToTensor(),
                    transforms.Normalize(**facts),
                ]
            ),
            'val': transforms.Compose(
                [
                    transforms.Resize(256),
                    transforms.CenterCrop(224),
                    transforms.ToTensor(),
                    transforms.Normalize(**facts),
                ]
            ),
        }
        for part, label, goal in (
            ('train', 'JPEG training: 500 x 375 to 224, batch 64', 2),
            ('val', 'JPEG evaluation: 500 x 375 to 224, batch 64', 1.3),
        ):
            ours = source.batches(part == 'train', batch_size=64, workers=2)
            theirs = torch.utils.data.DataLoader(
                ImageFolder(folder / part, pipelines[part]),
                batch_size=64,
                shuffle=part == 'train',
                num_workers=2,
                persistent_workers=True,
            )
            compare(
                report,
                label,
                lambda: consume(ours),
                lambda: consume(theirs),
                args.images,
                {'ours': 2, 'torchvision': 2},
                goal,
                args.rounds,
            )
        del ours, theirs
        torch.set_num_threads(threads)

        sizes = child(FOLDER, folder)
        report.samples['memory of the folder loader'] = sizes
        early, late = statistics.median(sizes[2:7]), statistics.median(sizes[7:])
        report.add(
            'memory of the folder loader with 2 workers, MB: median after epochs 3 to 7, after epochs 8 to 12',
            f'{early:.0f}, {late:.0f}',
            '',
            f'{late - early:+.0f} MB',
            'no growth',
        )
        sums = cifar_files(folder / 'cifar')
        bare = child(CHILD + 'print(json.dumps(resident()))')
        for label, code in (
            ('CIFAR-10, two epochs of batches', LOADING),
            ('CIFAR-10, DiracNet-16-1 in training, batch 128', TRAINING),
            ('the same network in training on one random batch, without CIFAR-10', RANDOM_BATCH),
        ):
            samples = [child(code, folder / 'cifar', json.dumps(sums)) - bare for _ in range(3)]
            report.samples[label] = samples
            report.add(
                f'{label}: MB above an interpreter with torch ({bare:.0f} MB)',
                f'{statistics.median(samples):.0f}',
                '',
                '',
                'under 250' if code is LOADING else '',
            )


# --- training --------------------------------------------------------------------------------------------------------

# What is compared runs in a process of its own each, in turns: so that each has the memory allocator that it would have, which for ours is
# part of what train.py does, and so that its peak memory can be told.
SERVE = 'import sys; from tools import contestants; contestants.serve(sys.argv[1])'


class Contestant:
    """A process that does a step (or what else `kind` says) whenever it is called; see tools.contestants."""

    def __init__(self, kind, network, batch=128):
        self.process = subprocess.Popen(
            [sys.executable, '-c', SERVE, json.dumps([kind, network, batch])],
            text=True,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.ask('ready')

    def ask(self, what):
        self.process.stdin.write(what + '\n')
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def __call__(self):
        return self.ask('step')

    def close(self):
        """Ends the process; returns its peak memory, MB above what it had before there was a network."""
        peak = self.ask('peak')
        self.process.stdin.close()
        self.process.wait()
        return peak


def compete(report, label, kinds, network, batch, rounds, goals, memory=()):
    """Times of the kinds in turns, one row each: milliseconds, and the first kind's over it. Returns peak memory of each."""
    contestants = {kind: Contestant(kind, network, batch) for kind in kinds}
    samples = alternate(contestants, rounds)
    report.samples[label] = samples
    ours = kinds[0]
    for kind in kinds:
        ratio = statistics.median(samples[ours]) / statistics.median(samples[kind])
        report.add(
            label if kind == ours else '',
            kind,
            spread([1000 * seconds for seconds in samples[kind]]),
            '' if kind == ours else f'{ratio:.3f}',
            f'at most {goals[kind]}' if kind in goals else '',
        )
    return {kind: contestant.close() for kind, contestant in contestants.items()}


def bench_train(report, args):
    compete(
        report,
        'step of DiracNet-34-1, CIFAR-10, batch 128, ms',
        ('DiracNet', 'textbook', 'plain', 'floor'),
        (34, 1, 'CIFAR10'),
        128,
        3 * args.rounds,
        {'textbook': 0.65, 'plain': 1.03, 'floor': 1.25},
    )
    compete(
        report,
        'step of DiracNet-34-2, CIFAR-10, batch 128, ms',
        ('DiracNet', 'textbook', 'plain', 'floor'),
        (34, 2, 'CIFAR10'),
        128,
        args.rounds,
        {'textbook': 0.85, 'plain': 1.02},
    )
    compete(
        report,
        'step of DiracNet-100-1, digits, batch 64, ms',
        ('DiracNet', 'textbook', 'plain', 'floor'),
        (100, 1, 'digits'),
        64,
        10 * args.rounds,
        {'textbook': 0.62, 'plain': 1.08},
    )
    compete(
        report,
        'epoch over 10,000 images of 32 x 32 with the loader, DiracNet-16-1, batch 128, ms',
        ('DiracNet epoch', 'textbook epoch'),
        (16, 1, 'CIFAR10'),
        128,
        args.rounds,
        {'textbook epoch': 0.5},
    )
    peaks = compete(
        report,
        'step of DiracNet-34-2, CIFAR-10, batch 128, ms',
        ('--recompute', 'DiracNet', 'textbook', '--dtype bfloat16'),
        (34, 2, 'CIFAR10'),
        128,
        args.rounds,
        {'DiracNet': 1.25},
    )
    report.samples['peak memory'] = peaks
    for kind, goal in (('DiracNet', 1.0), ('--recompute', 0.6), ('textbook', None)):
        report.add(
            'its peak memory, MB',
            kind,
            f'{peaks[kind]:.0f}',
            f'{peaks[kind] / peaks["textbook"]:.3f} x textbook',
            f'at most {goal}' if goal else '',
        )


def bench_compile(report, args):
    for network, batch in (((34, 1, 'CIFAR10'), 128), ((100, 1, 'digits'), 64)):
        name = f'DiracNet-{network[0]}-{network[1]}, {network[2]}, batch {batch}'
        compiled = Contestant('--compile', network, batch)
        start = time.perf_counter()
        compiled()
        report.add(
            f'first step of {name}, s', '--compile', f'{time.perf_counter() - start:.1f}', '', ''
        )
        compiled.close()
        compete(
            report,
            f'step of {name}, ms',
            ('--compile', 'DiracNet'),
            network,
            batch,
            3 * args.rounds,
            {},
        )


def bench_depth(report, args):
    import numpy as np

    depths = (16, 34, 64, 100, 202)
    contestants = {depth: Contestant('DiracNet', (depth, 1, 'digits'), 64) for depth in depths}
    samples = alternate(contestants, 5 * args.rounds)
    peaks = {depth: contestant.close() for depth, contestant in contestants.items()}
    report.samples.update(seconds=samples, megabytes=peaks)
    times = {depth: 1000 * statistics.median(samples[depth]) for depth in depths}
    for depth in depths:
        report.add(
            f'DiracNet-{depth}-1, digits, batch 64',
            'ms per step',
            spread([1000 * value for value in samples[depth]]),
            '',
            '',
        )
        report.add('', 'peak memory, MB', f'{peaks[depth]:.0f}', '', '')
    fits = {}
    for name, values in (('ms per step', times), ('peak memory, MB', peaks)):
        slope, offset = fits[name] = np.polyfit(depths, list(values.values()), 1)
        explained = np.corrcoef(depths, list(values.values()))[0, 1] ** 2
        report.add(
            f'{name}: line through them',
            f'{slope:.3f} a layer, and {offset:.1f}',
            f'R^2 {explained:.4f}',
            '',
            'linear',
        )
    if args.out:
        import matplotlib

        matplotlib.use('Agg')
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5), layout='constrained')
        for axis, (name, values) in zip(axes, (('ms per step', times), ('peak memory, MB', peaks))):
            axis.plot(depths, np.polyval(fits[name], depths), color='0.6', label='least squares')
            axis.plot(depths, list(values.values()), 'ko', label='measured')
            axis.set(xlabel='depth', ylabel=name, xlim=(0, None), ylim=(0, None))
            axis.legend(frameon=False)
        figure.suptitle('A training step of DiracNet-DEPTH-1 on 8 x 8 digits, batch 64')
        args.out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(args.out.with_suffix('.png'), dpi=150)


def bench_inference(report, args):
    for depth, goals in (
        (18, {'textbook': 0.7, 'unfolded': 0.7, 'resnet': 1.0}),
        (34, {'resnet': 0.95}),
    ):
        for batch in (1, 16):
            for runtime in ('', ' onnx'):
                kinds = [
                    f'folded{runtime}',
                    *([] if runtime else ['unfolded', 'textbook eval']),
                    f'resnet{runtime}',
                ]
                compete(
                    report,
                    f'inference of {depth} layers at 224 x 224, batch {batch}{"," if runtime else ""}{runtime}, ms',
                    kinds,
                    (depth, 1, 'ImageNet'),
                    batch,
                    args.rounds * (8 if batch == 1 else 2),
                    {
                        kind: goals[kind.split()[0]]
                        for kind in kinds[1:]
                        if kind.split()[0] in goals
                    },
                )


def bench_start(report, args):
    """Programs from their command, and digits to its first step."""

    def program(*arguments):
        return lambda: subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
        )

    samples = alternate(
        {
            'import torch': program('-c', 'import torch'),
            'train.py --help': program('train.py', '--help'),
            'digits, first step': program('-c', FIRST_STEP),
        },
        2 * args.rounds,
    )
    report.samples['start'] = samples
    for name, goal in (
        ('import torch', None),
        ('train.py --help', 1.5),
        ('digits, first step', 2.5),
    ):
        ratio = statistics.median(samples[name]) / statistics.median(samples['import torch'])
        report.add(
            'seconds from the command',
            name,
            spread(samples[name]),
            f'{ratio:.2f} x import torch' if goal else '',
            f'at most {goal}' if goal else '',
        )


# train.py --dataset digits, ended by the optimizer's first step.
FIRST_STEP = """
import os, sys, tempfile
import train
def step(self, closure):
    closure()
    self.optimizer.step()
    os._exit(0)
train.Scaled.step = step
train.main(['--dataset', 'digits', '--save', tempfile.mkdtemp() + '/run'])
"""


BENCHMARKS = {
    'data': (
        bench_data,
        'Input pipelines',
        ['images per second and core', 'ours', "torchvision's", 'ratio', 'goal'],
    ),
    'train': (bench_train, 'Training', SPEED),
    'compile': (bench_compile, 'torch.compile', SPEED),
    'inference': (bench_inference, 'Inference', SPEED),
    'depth': (bench_depth, 'Cost over depth', SPEED),
    'start': (bench_start, 'Start', SPEED),
}


def main(arguments=None):
    parser = OneLineParser(prog='-m tools.benchmark', description=__doc__)
    parser.add_argument('what', choices=BENCHMARKS)
    parser.add_argument(
        '--rounds', type=int, default=7, help='turns of each measurement (default 7)'
    )
    parser.add_argument(
        '--images', type=int, default=1024, help='JPEGs for each part (default 1024)'
    )
    parser.add_argument('--out', type=Path, metavar='OUT', help='write OUT.md and OUT.json')
    args = parser.parse_args(arguments)
    if args.rounds < 3 or args.images < 1:
        raise OptionError('--rounds must be at least 3, and --images at least 1')
    function, title, columns = BENCHMARKS[args.what]
    report = Report(title, columns)
    function(report, args)
    print(report.markdown())
    if args.out:
        report.write(args.out)


if __name__ == '__main__':
    run(main, 'tools.benchmark')

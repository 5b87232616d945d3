"""Measure speed and memory against what one would otherwise write, alternating in one process, medians and spreads.

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

from errors import OneLineParser, OptionError, run


def machine():
    """Facts that every table comes with."""
    import torch
    try:
        with open('/proc/cpuinfo') as file:
            model = next(line.split(':')[1].strip() for line in file if line.startswith('model name'))
    except (OSError, StopIteration):
        model = platform.processor()
    from importlib.metadata import version
    return {'cpu': model, 'cores': os.cpu_count(), 'torch threads': torch.get_num_threads(), 'python': platform.python_version(),
            **{name: version(name) for name in ('torch', 'torchvision', 'numpy', 'opencv-python', 'pillow')}}


def alternate(functions, rounds):
    """Seconds of each function, called in turns; the first turn, in which caches fill and processes start, doesn't count."""
    samples = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if turn:
                samples[name].append(time.perf_counter() - start)
    return samples


def spread(samples):
    """Median with the lower and upper quartile, as text with the unit of the samples."""
    low, middle, high = statistics.quantiles(samples, n=4)
    return f'{middle:.4g} ({low:.4g} to {high:.4g})'


class Report:
    """Rows of a Markdown table, and the samples behind them."""

    def __init__(self, title, columns):
        self.title, self.columns, self.rows, self.samples = title, columns, [], {}
        self.facts = machine()

    def add(self, *row):
        self.rows.append([str(cell) for cell in row])
        print('  '.join(self.rows[-1]), flush=True)

    def markdown(self):
        lines = [f'# {self.title}', '', ', '.join(f'{name} {value}' for name, value in self.facts.items()) + '.', '',
                 '| ' + ' | '.join(self.columns) + ' |', '|' + ' --- |' * len(self.columns)]
        return '\n'.join([*lines, *('| ' + ' | '.join(row) + ' |' for row in self.rows)]) + '\n'

    def write(self, out):
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_suffix('.md').write_text(self.markdown())
        out.with_suffix('.json').write_text(json.dumps({'facts': self.facts, 'columns': self.columns, 'rows': self.rows,
                                                        'samples': self.samples}, indent=1) + '\n')


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
            cv2.imwrite(str(folder / part / 'all' / f'{i:04}.jpg'), images[i % 2][top:top + 375, left:left + 500, ::-1],
                        [cv2.IMWRITE_JPEG_QUALITY, 90])


def consume(batches):
    for _ in batches:
        pass


def compare(report, name, ours, theirs, n, cores, goal, rounds):
    """Whole passes over n images, ours and theirs in turns."""
    samples = alternate({'ours': ours, 'torchvision': theirs}, rounds)
    rates = {key: [n / seconds / cores[key] for seconds in values] for key, values in samples.items()}
    report.samples[name] = rates
    ratio = statistics.median(rates['ours']) / statistics.median(rates['torchvision'])
    report.add(name, spread(rates['ours']), spread(rates['torchvision']), f'{ratio:.1f}', f'at least {goal}')


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
CIFAR_CHILD = CHILD + """
import data
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
LOADING = CIFAR_CHILD + """
for _ in range(2):
    batches.epoch += 1
    for inputs, targets in batches: pass
print(json.dumps(resident()))
"""
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
RANDOM_BATCH = CHILD + """
import itertools
inputs = torch.randn(128, 3, 32, 32).contiguous(memory_format=torch.channels_last)
batches = itertools.repeat((inputs, torch.arange(128) % 10))
""" + STEPS
FOLDER = CHILD + """
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


def child(code, *arguments):
    """The JSON that a fresh Python process prints last."""
    result = subprocess.run([sys.executable, '-c', code, *map(str, arguments)], capture_output=True, text=True, check=True,
                            cwd=Path(__file__).resolve().parent.parent,
                            env={name: value for name, value in os.environ.items() if name != 'THP_MEM_ALLOC_ENABLE'})
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
        content = {'label_names': [f'class{i}' for i in range(10)]} if name == 'batches.meta' else {
            'data': random.integers(0, 256, (10_000, 3072)).astype(np.uint8), 'labels': random.integers(0, 10, 10_000).tolist()}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    return sums


def bench_data(report, args):
    import numpy as np
    import torch
    from PIL import Image
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    import data

    os.environ['THP_MEM_ALLOC_ENABLE'] = '1'  # as train.py has it for image files, here for ours and theirs
    random = np.random.default_rng(0)
    facts = {'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225)}

    # small images
    n = 12_800
    pixels = random.integers(0, 256, (n, 32, 32, 3)).astype(np.uint8)
    targets = torch.zeros(n, dtype=torch.int64)
    per_sample = transforms.Compose([transforms.Pad(4, padding_mode='reflect'), transforms.RandomHorizontalFlip(), transforms.RandomCrop(32),
                                     transforms.ToTensor(), transforms.Normalize(**facts)])

    class PerSample(torch.utils.data.Dataset):
        def __len__(self):
            return n

        def __getitem__(self, index):
            return per_sample(Image.fromarray(pixels[index])), 0

    source = data.Data('CIFAR10', (torch.from_numpy(pixels), targets), None, (), data.PREPROCESSING['CIFAR10'])
    ours = source.batches(True, batch_size=128, pad=4)
    theirs = torch.utils.data.DataLoader(PerSample(), batch_size=128, shuffle=True, num_workers=2, persistent_workers=True)
    threads = torch.get_num_threads()
    # The reference keeps two cores busy with its workers; ours runs on one thread, and counts as one core.
    torch.set_num_threads(1)
    compare(report, 'small images, training: 32 x 32 x 3, batch 128', lambda: consume(ours), lambda: consume(theirs), n,
            {'ours': 1, 'torchvision': 2}, 25, args.rounds)
    del theirs

    # JPEGs, with two worker processes each
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        photographs(folder, args.images)
        source = data.load('folder', folder)
        pipelines = {
            'train': transforms.Compose([transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
                                         transforms.Normalize(**facts)]),
            'val': transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor(),
                                       transforms.Normalize(**facts)])}
        for part, label, goal in (('train', 'JPEG training: 500 x 375 to 224, batch 64', 2), ('val', 'JPEG evaluation: 500 x 375 to 224, batch 64', 1.3)):
            ours = source.batches(part == 'train', batch_size=64, workers=2)
            theirs = torch.utils.data.DataLoader(ImageFolder(folder / part, pipelines[part]), batch_size=64, shuffle=part == 'train',
                                                 num_workers=2, persistent_workers=True)
            compare(report, label, lambda: consume(ours), lambda: consume(theirs), args.images, {'ours': 2, 'torchvision': 2}, goal,
                    args.rounds)
        del ours, theirs
        torch.set_num_threads(threads)

        sizes = child(FOLDER, folder)
        report.samples['memory of the folder loader'] = sizes
        early, late = statistics.median(sizes[2:7]), statistics.median(sizes[7:])
        report.add('memory of the folder loader with 2 workers, MB: median after epochs 3 to 7, after epochs 8 to 12',
                   f'{early:.0f}, {late:.0f}', '', f'{late - early:+.0f} MB', 'no growth')
        sums = cifar_files(folder / 'cifar')
        bare = child(CHILD + 'print(json.dumps(resident()))')
        for label, code in (('CIFAR-10, two epochs of batches', LOADING), ('CIFAR-10, DiracNet-16-1 in training, batch 128', TRAINING),
                            ('the same network in training on one random batch, without CIFAR-10', RANDOM_BATCH)):
            samples = [child(code, folder / 'cifar', json.dumps(sums)) - bare for _ in range(3)]
            report.samples[label] = samples
            report.add(f'{label}: MB above an interpreter with torch ({bare:.0f} MB)', f'{statistics.median(samples):.0f}', '', '',
                       'under 250' if code is LOADING else '')


# --- training --------------------------------------------------------------------------------------------------------


def training_step(f, params, inputs, targets, short=None):
    """A step as train.py does it, for a model as f, params."""
    import torch
    import torch.nn.functional as F

    import train
    from diracnet import Network
    module = Network(f, params).to(memory_format=torch.channels_last)
    optimizer = train.make_optimizer(module, {'lr': 1e-3, 'weight_decay': 5e-4})
    inputs = inputs.contiguous(memory_format=torch.channels_last)

    def step(inputs=inputs, targets=targets):
        optimizer.zero_grad()
        with train.autocast(inputs.device, short):
            logits = module(inputs)
        F.cross_entropy(logits.float(), targets).backward()
        optimizer.step()
    return step


def textbook_step(network, inputs, targets):
    import torch.nn.functional as F

    from tools import references
    f, params = references.define_textbook(*network)
    optimizer = references.textbook_optimizer(params)

    def step(inputs=inputs, targets=targets):
        optimizer.zero_grad()
        F.cross_entropy(f(inputs, params, True), targets).backward()
        optimizer.step()
    return step


def random_batch(network, batch):
    import torch
    size, channels = (8, 1) if network[2] == 'digits' else (32, 3)
    torch.manual_seed(0)
    return torch.randn(batch, channels, size, size), torch.arange(batch) % 10


def ratios(report, label, samples, ours, goals):
    """A row for each of what was measured in turns with `ours`, milliseconds, and ours over it."""
    report.samples[label] = samples
    milliseconds = {name: [1000 * seconds for seconds in values] for name, values in samples.items()}
    report.add(label, ours, spread(milliseconds[ours]), '', '')
    for name in samples:
        if name != ours:
            ratio = statistics.median(samples[ours]) / statistics.median(samples[name])
            report.add('', name, spread(milliseconds[name]), f'{ratio:.3f}', f'at most {goals[name]}' if name in goals else '')


def bench_train(report, args):
    from functools import partial

    import diracnet
    import train
    from resnet import define_plain
    from tools import references
    train.keep_freed_memory()
    for network, batch, rounds, goals in (
            ((34, 1, 'CIFAR10'), 128, 3 * args.rounds, {'textbook': 0.65, 'plain': 1.03, 'floor': 1.25}),
            ((34, 2, 'CIFAR10'), 128, args.rounds, {'textbook': 0.85, 'plain': 1.02}),
            ((100, 1, 'digits'), 64, 10 * args.rounds, {'textbook': 0.62, 'plain': 1.08})):
        inputs, targets = random_batch(network, batch)
        steps = {'DiracNet': training_step(*diracnet.define_diracnet(*network), inputs, targets),
                 'textbook': textbook_step(network, inputs, targets),
                 'plain': training_step(*define_plain(*network), inputs, targets),
                 'floor': references.floor(diracnet.layout(*network), inputs)}
        ratios(report, f'step of DiracNet-{network[0]}-{network[1]}, {network[2]}, batch {batch}, ms', alternate(steps, rounds),
               'DiracNet', goals)

    network = (34, 2, 'CIFAR10')
    inputs, targets = random_batch(network, 128)
    f, params = diracnet.define_diracnet(*network)
    steps = {'--recompute': training_step(partial(f, block=diracnet.recomputed_block), params, inputs, targets),
             'DiracNet': training_step(*diracnet.define_diracnet(*network), inputs, targets)}
    ratios(report, 'the same with --recompute, DiracNet-34-2, ms', alternate(steps, args.rounds), '--recompute', {'DiracNet': 1.25})
    bench_epoch(report, args)
    peaks = {name: [child(PEAK, name) for _ in range(3)] for name in ('textbook', 'DiracNet', '--recompute')}
    report.samples['peak memory'] = peaks
    least = statistics.median(peaks['textbook'])
    for name, goal in (('DiracNet', 1.0), ('--recompute', 0.6)):
        report.add('peak memory of a step of DiracNet-34-2, batch 128, MB', name, spread(peaks[name]),
                   f'{statistics.median(peaks[name]) / least:.3f} of textbook ({least:.0f})', f'at most {goal}')


# Peak of what a few steps need, above what the process has before there is a network.
PEAK = CHILD + """
from functools import partial
import diracnet, train
from tools import benchmark
network = (34, 2, 'CIFAR10')
batch = benchmark.random_batch(network, 128)
import torch.optim.sgd, torch._dynamo
if sys.argv[1] != 'textbook':
    train.keep_freed_memory()
torch.nn.functional.conv2d(torch.randn(8, 8, 8, 8), torch.randn(8, 8, 3, 3))
before = resident()
with open('/proc/self/clear_refs', 'w') as file:
    file.write('5')
if sys.argv[1] == 'textbook':
    step = benchmark.textbook_step(network, *batch)
else:
    f, params = diracnet.define_diracnet(*network)
    step = benchmark.training_step(partial(f, block=diracnet.recomputed_block if sys.argv[1] == '--recompute' else diracnet.block), params, *batch)
for _ in range(3):
    step()
with open('/proc/self/status') as file:
    peak = next(int(line.split()[1]) for line in file if line.startswith('VmHWM')) / 1024
print(json.dumps(peak - before))
"""


def bench_epoch(report, args):
    """A whole epoch over 10,000 CIFAR-format images: with our batches, and as one would otherwise write it."""
    import numpy as np
    import torch
    from PIL import Image
    from torchvision import transforms

    import data
    import diracnet
    network = (16, 1, 'CIFAR10')
    n = 10_000
    random = np.random.default_rng(0)
    pixels, targets = random.integers(0, 256, (n, 32, 32, 3)).astype(np.uint8), torch.arange(n) % 10
    facts = {'mean': (0.491, 0.482, 0.447), 'std': (0.247, 0.243, 0.262)}
    per_sample = transforms.Compose([transforms.Pad(4, padding_mode='reflect'), transforms.RandomHorizontalFlip(), transforms.RandomCrop(32),
                                     transforms.ToTensor(), transforms.Normalize(**facts)])

    class PerSample(torch.utils.data.Dataset):
        def __len__(self):
            return n

        def __getitem__(self, index):
            return per_sample(Image.fromarray(pixels[index])), int(targets[index])
    theirs = torch.utils.data.DataLoader(PerSample(), batch_size=128, shuffle=True, num_workers=2, persistent_workers=True)
    source = data.Data('CIFAR10', (torch.from_numpy(pixels), targets), None, (), data.PREPROCESSING['CIFAR10'])
    ours = source.batches(True, batch_size=128, pad=4)
    inputs, labels = random_batch(network, 128)
    steps = {'DiracNet': (training_step(*diracnet.define_diracnet(*network), inputs, labels), ours),
             'textbook, per-sample loader': (textbook_step(network, inputs, labels), theirs)}

    def epoch(step, batches):
        for inputs, targets in batches:
            step(inputs, targets)
    samples = alternate({name: (lambda pair=pair: epoch(*pair)) for name, pair in steps.items()}, args.rounds)
    ratios(report, f'epoch over {n:,} images of 32 x 32, DiracNet-16-1, batch 128, ms', samples, 'DiracNet',
           {'textbook, per-sample loader': 0.5})


SPEED = ['what', 'which', 'median (quartiles)', 'ratio', 'goal']
BENCHMARKS = {'data': (bench_data, 'Input pipelines', ['images per second and core', 'ours', "torchvision's", 'ratio', 'goal']),
              'train': (bench_train, 'Training', SPEED)}


def main(arguments=None):
    parser = OneLineParser(prog='-m tools.benchmark', description=__doc__)
    parser.add_argument('what', choices=BENCHMARKS)
    parser.add_argument('--rounds', type=int, default=7, help='turns of each measurement (default 7)')
    parser.add_argument('--images', type=int, default=1024, help='JPEGs for each part (default 1024)')
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

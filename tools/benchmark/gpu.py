"""The proof that everything works on a CUDA GPU, and how fast: `python -m tools.benchmark cuda`.

Each part runs in a process of its own, with a time limit, so that a failure of one does not stop
the others. On the CPU, `--device cpu --quick` runs the whole program in small.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import diracnet
from diracnet import define_diracnet, make_architecture
from lab import cuda
from lab.data import datasets
from lab.device import autocast
from lab.errors import UserError
from lab.models.plain import define_plain
from lab.training.optimizers import make_optimizer
from lab.training.recompute import compiled_chain
from tools.benchmark.contestants import folded, textbook_params, textbook_training_step
from tools.benchmark.made_data import random_batch, random_cifar, write_photographs
from tools.benchmark.processes import ROOT
from tools.benchmark.report import Report, spread

COLUMNS = [
    'measurement',
    'variant',
    'ms, median (quartiles)',
    'ratio',
    'goal',
    'images/s',
    'MB',
    'peak',
]
LEGEND = (
    'Times are medians of 50 after a warm-up, by CUDA events. *DiracNet* is the step of train.py '
    'with `--dtype bfloat16`, in channels_last; the other variants change one thing, except '
    '*textbook*: the formula layer by layer, in float32 without TF32, contiguous. The ratio is the '
    'median of the first row of a group divided by that of this row. *MB* is the peak memory, '
    "*peak* the share of the card's dense peak, if it is known here."
)
SECONDS = 470  # for all parts together
# Dense TFLOP/s with TF32 and with bfloat16, from NVIDIA's data sheets (SXM).
PEAKS = {'H200': (494.7, 989.4), 'H100': (494.7, 989.4), 'A100': (156, 312)}
NETWORKS = [  # depth, width, data set, batch
    *((34, 2, 'CIFAR10', batch) for batch in (128, 512)),
    *((28, 10, 'CIFAR10', batch) for batch in (128, 512)),
    (18, 1, 'ImageNet', 256),
]
SMALL = [(10, 0.25, 'CIFAR10', 8)]


class Part:
    """What a part needs to know, and the rows that it finds."""

    def __init__(self, device, quick):
        self.device, self.quick = torch.device(device), quick
        self.rows, self.samples = [], {}

    def add(self, label, variant, times, ratio='', goal='', images=0, megabytes='', share=''):
        speed = f'{1000 * images / median(times):.0f}' if images else ''
        self.samples[f'{label}, {variant}, ms'] = times
        self.rows.append([label, variant, spread(times), ratio, goal, speed, megabytes, share])

    def time(self, step):
        """Milliseconds of each call of a step."""
        warm_up, rounds = (1, 3) if self.quick else (10, 50)
        if self.device.type == 'cuda':
            return cuda.milliseconds(step, warm_up, rounds)
        times = []
        for _ in range(warm_up + rounds):
            start = time.perf_counter()
            step()
            times.append(1000 * (time.perf_counter() - start))
        return times[warm_up:]


# --- correctness -----------------------------------------------------------------------------


def test_suite(part):
    """The tests that are marked for every device."""
    chosen = ['tests/test_diracconv.py'] if part.quick else []
    # Without pyproject.toml's options, which need pytest-xdist.
    command = [sys.executable, '-m', 'pytest', '-q', '-o', 'addopts=', '-m', 'device', *chosen]
    start = time.perf_counter()
    result = subprocess.run(
        [*command, '--device', part.device.type], cwd=ROOT, capture_output=True, text=True
    )
    last = (result.stdout.strip().splitlines() or [result.stderr])[-1]
    if result.returncode:
        raise UserError(f'the tests: {last}')
    part.add('tests on the device', last.strip('= '), 3 * [1000 * (time.perf_counter() - start)])


def several_processes(part):
    """Digits under torchrun, with one process and with one for each GPU."""
    for n in sorted({1, max(1, torch.cuda.device_count())}):
        with tempfile.TemporaryDirectory() as folder:
            options = f'--dataset digits --epochs 6 --device {part.device.type} --save {folder}/run'
            start = time.perf_counter()
            subprocess.run(
                [sys.executable, '-m', 'torch.distributed.run', '--standalone']
                + [f'--nproc_per_node={n}', 'train.py', *options.split()],
                cwd=ROOT,
                check=True,
                capture_output=True,
            )
            accuracy = json.loads(Path(folder, 'run/log.txt').read_text().splitlines()[-1][12:])
        if accuracy['test_acc'] < 85:
            raise UserError(f'{n} processes reach only {accuracy["test_acc"]:.1f} %')
        milliseconds = 3 * [1000 * (time.perf_counter() - start)]
        part.add(f'digits, {n} processes', f'{accuracy["test_acc"]:.1f} %', milliseconds)


# --- speed -----------------------------------------------------------------------------------


def training_step(make, network, inputs, targets, short=torch.bfloat16, layout=None):
    """A training step, as that of train.py, on fixed tensors. `make` makes the module."""
    layout = layout or torch.channels_last
    module = make(network).to(inputs.device, memory_format=layout)
    optimizer = make_optimizer(module, {'lr': 1e-3, 'weight_decay': 5e-4})
    inputs = inputs.contiguous(memory_format=layout)

    def step():
        optimizer.zero_grad()
        with autocast(inputs.device, short):
            logits = module(inputs)
        F.cross_entropy(logits.float(), targets).backward()
        optimizer.step()

    return step


def make_diracnet(network):
    return diracnet.Network(*define_diracnet(*network))


def make_plain(network):
    return diracnet.Network(*define_plain(*network))


def make_compiled(network):
    _, params = define_diracnet(*network)
    return diracnet.Network(partial(compiled_chain(), make_architecture(*network)), params)


def make_resnet18(_):
    import torchvision

    return torchvision.models.resnet18()


def textbook_step(network, inputs, targets):
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision('highest')
    params = {
        key: tensor.detach().to(inputs.device).requires_grad_(tensor.requires_grad)
        for key, tensor in textbook_params(network).items()
    }
    return partial(textbook_training_step(params), inputs, targets)


def variants(network, batch, on_cuda):
    """The variants of a training step: functions of (network, inputs, targets)."""
    found = {
        'DiracNet': partial(training_step, make_diracnet),
        'plain': partial(training_step, make_plain),
        'float, TF32': partial(training_step, make_diracnet, short=None),
        'contiguous': partial(training_step, make_diracnet, layout=torch.contiguous_format),
    }
    if network[2] == 'ImageNet':
        found['ResNet-18'] = partial(training_step, make_resnet18)
    if on_cuda and batch < 512:  # compiling takes most of the time
        found['--compile'] = partial(training_step, make_compiled)
    if on_cuda:
        found['CUDA graph'] = lambda *args: cuda.graphed(found['DiracNet'](*args))
        found['plain, CUDA graph'] = lambda *args: cuda.graphed(found['plain'](*args))
    found['textbook'] = textbook_step  # the last, because it switches TF32 off
    return found


def training_steps(network, part):
    *network, batch = network
    inputs, targets = (t.to(part.device) for t in random_batch(network[2], batch))
    on_cuda = part.device.type == 'cuda'
    if on_cuda:
        cuda.set_up()
    label, first, fastest = f'step of DiracNet-{network[0]}-{network[1]}, batch {batch}', None, None
    with FlopCounterMode(display=False) as counter:
        training_step(make_diracnet, network, inputs, targets, None)()
    for name, build in variants(network, batch, on_cuda).items():
        if on_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        times = part.time(build(network, inputs, targets))
        megabytes = f'{torch.cuda.max_memory_allocated() / 2**20:.0f}' if on_cuda else ''
        first, fastest = first or median(times), min(fastest or median(times), median(times))
        ratio, goal = (fastest if name == 'textbook' else first) / median(times), ''
        if network[:2] == [34, 2]:
            goal = {'plain': 'at most 1.02', 'textbook': 'at most 0.5'}.get(name, '')
        share = peak_share(counter.get_total_flops(), median(times), name)
        part.add(label, name, times, f'{ratio:.3f}', goal, batch, megabytes, share)


def peak_share(operations, milliseconds, variant):
    """The share of the card's peak as a text; '' if that is not known."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else ''
    for name, (tf32, bfloat16) in PEAKS.items():
        if name in card and variant != 'textbook':
            peak = tf32 if variant == 'float, TF32' else bfloat16
            return f'{operations / milliseconds / 1e9 / peak:.2f}'
    return ''


def data_on_the_device(part):
    """Batches of CIFAR-10's size, without and with training."""
    n = 1000 if part.quick else 50_000
    preprocessing = datasets.PREPROCESSING['CIFAR10']
    data = datasets.Data('CIFAR10', random_cifar(n), None, (), preprocessing)
    batches = data.batches(True, batch_size=128, device=part.device, pad=4)
    batches.epoch = 1

    def read():
        for _ in batches:
            pass

    alone = part.time(read)[:5]
    inputs, targets = (t.to(part.device) for t in random_batch('CIFAR10', 128))
    network = SMALL[0][:3] if part.quick else NETWORKS[0][:3]
    steps = len(batches) * median(part.time(training_step(make_diracnet, network, inputs, targets)))
    share = median(alone) / (median(alone) + steps)
    part.add(
        'an epoch of batches',
        'without training',
        alone,
        f'{share:.3f} of the epoch',
        'at most 0.03',
        n,
    )


def image_files(part):
    """JPEGs decoded by one process and by one for each core."""
    n = 32 if part.quick else 2000
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder), n)
        data = datasets.load('folder', folder)
        for workers in sorted({1, os.cpu_count()}):
            batches = data.batches(True, batch_size=16, device=part.device, workers=workers)
            times = []
            for epoch in (1, 2):
                batches.epoch, start = epoch, time.perf_counter()
                for _ in batches:
                    pass
                times.append(1000 * (time.perf_counter() - start))
            if workers == 1:
                busy = step_rate(part) / (1000 * n / times[1])
            label = 'JPEGs of 500 x 375 to 224 x 224'
            part.add(label, f'{workers} processes', 2 * times[1:], images=n)
    part.rows[-1][3] = f'{busy:.1f} cores keep DiracNet-18 busy'


def step_rate(part):
    """The images that training steps of DiracNet-18 take per second."""
    batch = 2 if part.quick else 256
    inputs, targets = (t.to(part.device) for t in random_batch('ImageNet', batch))
    times = part.time(training_step(make_diracnet, (18, 1, 'ImageNet'), inputs, targets))
    return 1000 * batch / median(times)


def inference(part):
    net = folded((18, 1, 'ImageNet')).to(part.device, memory_format=torch.channels_last)
    for batch in (1,) if part.quick else (1, 16, 256):
        inputs = random_batch('ImageNet', batch)[0].to(part.device)
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        for dtype in (torch.float, torch.bfloat16):
            model, images = net.to(dtype), inputs.to(dtype)
            with torch.inference_mode():
                times = part.time(partial(model, images))
            name = str(dtype).removeprefix('torch.')
            part.add(f'folded DiracNet-18, batch {batch}', name, times, images=batch)


def parts(quick):
    """{name: (limit in seconds, function of a Part)}"""
    steps = {
        f'steps {network}': (90, partial(training_steps, network))
        for network in (SMALL if quick else NETWORKS)
    }
    return {
        'tests': (150, test_suite),
        'processes': (60, several_processes),
        **steps,
        'data': (40, data_on_the_device),
        'image files': (60, image_files),
        'inference': (40, inference),
    }


def bench_cuda(args):
    """Run all parts. The report's `failures` has one line for each that failed."""
    device = args.device or 'cuda'
    if device == 'cuda' and not torch.cuda.is_available():
        raise UserError('there is no CUDA GPU here; --device cpu --quick runs the program in small')
    report = Report('CUDA', COLUMNS, LEGEND)
    if device == 'cuda':
        report.facts.update(card=torch.cuda.get_device_name(), cuda=torch.version.cuda)
        report.facts.update(cudnn=torch.backends.cudnn.version(), driver=driver_version())
    deadline = time.monotonic() + SECONDS
    for name, (limit, _) in parts(args.quick).items():
        limit = max(1, min(limit, deadline - time.monotonic()))
        command = [sys.executable, '-m', 'tools.benchmark.gpu', name, device, str(int(args.quick))]
        try:
            result = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, timeout=limit
            )
            rows, samples, problem = json.loads(result.stdout.splitlines()[-1])
        except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
            late = isinstance(error, subprocess.TimeoutExpired)
            rows, samples = [], {}
            problem = f'more than {limit:.0f} s' if late else result.stderr[-200:]
        for row in rows:
            report.add(*row)
        report.samples.update(samples)
        if problem:
            report.failures.append(f'{name}: {" ".join(problem.split())}')
    report.add('failed parts', '; '.join(report.failures) or 'none', *[''] * (len(COLUMNS) - 2))
    return report


def driver_version():
    found = subprocess.run(
        ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader'],
        capture_output=True,
        text=True,
    )
    return found.stdout.split()[0] if found.returncode == 0 else 'unknown'


def main(name, device, quick):
    """Run one part, and print [rows, samples, what failed] as the last line."""
    part, problem = Part(device, quick == '1'), ''
    try:
        parts(part.quick)[name][1](part)
    except Exception as error:  # whatever fails is reported
        problem = f'{type(error).__name__}: {error}'
    print(json.dumps([part.rows, part.samples, problem]))


if __name__ == '__main__':
    main(*sys.argv[1:])

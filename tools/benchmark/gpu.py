"""What `python -m tools.benchmark cuda` measures. Each part runs in a process of its own:

    python -m tools.benchmark.gpu NAME DEVICE QUICK

prints each row, and each failure, as a line of JSON at once: what comes later cannot lose it.
"""

import contextlib
import importlib.util
import json
import os
import re
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
from diracnet import define_diracnet
from diracparams import make_architecture
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
from tools.benchmark.report import plain, spread

# Dense TFLOP/s in float32, with TF32 and with bfloat16, from NVIDIA's data sheets.
PEAKS = {
    'NVIDIA H200': (66.9, 494.7, 989.4),
    'NVIDIA H100 80GB HBM3': (66.9, 494.7, 989.4),
    'NVIDIA H100 PCIe': (51, 378, 756),
    'NVIDIA A100-SXM4-40GB': (19.5, 156, 312),
    'NVIDIA A100-SXM4-80GB': (19.5, 156, 312),
    'NVIDIA A100-PCIE-40GB': (19.5, 156, 312),
    'NVIDIA A100 80GB PCIe': (19.5, 156, 312),
}
NETWORKS = [  # depth, width, data set, batch
    *((34, 2, 'CIFAR10', batch) for batch in (128, 512)),
    (18, 1, 'ImageNet', 256),
    *((28, 10, 'CIFAR10', batch) for batch in (128, 512)),
]
SMALL = [(10, 0.25, 'CIFAR10', 8)]


GOALS = {'plain': 'at most 1.02', 'plain, CUDA graph': 'at most 1.02', 'textbook': 'at most 0.5'}
# The lines of a failed command that say why.
TELLING = re.compile(r'(SUB)?FAILED|ERROR|\d+ failed|train\.py|\w*Error')


class Part:
    """What a part needs to know, and how it reports."""

    def __init__(self, device, quick):
        self.device, self.quick = torch.device(device), quick
        self.on_cuda = self.device.type == 'cuda'

    def add(self, label, variant, times, ratio='', goal='', images=0, megabytes='', share=''):
        speed = f'{1000 * images / median(times):.0f}' if images else ''
        time = spread(times) if len(times) > 1 else plain(times[0])
        row = [label, variant, time, ratio, goal, speed, megabytes, share]
        tell(row=row, samples={f'{label}, {variant}, ms': times})

    @contextlib.contextmanager
    def reporting(self, what):
        """Report whatever the body raises."""
        try:
            yield
        except Exception as error:
            tell(failure=f'{what}: {type(error).__name__}: {error}')

    def time(self, step):
        """Milliseconds of each call of a step."""
        warm_up, rounds = (1, 3) if self.quick else (10, 50)
        if self.on_cuda:
            [duration] = cuda.milliseconds(step, warm_up, 1)
            return cuda.milliseconds(step, 0, 10 if duration > 100 else rounds)
        return [milliseconds(step) for _ in range(warm_up + rounds)][warm_up:]


def milliseconds(function):
    start = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - start)


def tell(**facts):
    print(json.dumps(facts), flush=True)


# --- correctness -----------------------------------------------------------------------------


def run_command(*command):
    """Run Python in the repository's root. Returns the lines that it prints, and milliseconds.

    Raises:
        UserError: it failed; with the lines that say why.
    """
    start = time.perf_counter()
    result = subprocess.run(
        [sys.executable, '-m', *command], cwd=ROOT, capture_output=True, text=True
    )
    lines = (result.stdout + result.stderr).splitlines()
    if result.returncode:
        telling = [line for line in lines if TELLING.match(line)]
        raise UserError('; '.join([f'exit status {result.returncode}', *telling[-5:]]))
    return lines, 1000 * (time.perf_counter() - start)


def test_suite(part):
    """The tests that are marked for every device."""
    chosen = ['tests/test_diracconv.py'] if part.quick else []
    # pyproject.toml's options need pytest-xdist, which may be missing.
    options = ['-q', '-o', 'addopts=', '-m', 'device', '--device', part.device.type]
    if importlib.util.find_spec('xdist'):
        options += ['-n', str(min(4, len(os.sched_getaffinity(0))))]
    lines, duration = run_command('pytest', *options, '--continue-on-collection-errors', *chosen)
    [summary] = (line.strip('= ') for line in lines if re.search(r'\d+ passed.* in ', line))
    part.add('tests on the device', summary, [duration])


def several_processes(part):
    """Digits under torchrun, with one process and with one for each GPU."""
    for n in sorted({1, max(1, torch.cuda.device_count())}):
        with part.reporting(f'{n} processes'), tempfile.TemporaryDirectory() as folder:
            options = f'--dataset digits --epochs 6 --device {part.device.type} --save {folder}/run'
            launch = ('torch.distributed.run', '--standalone', f'--nproc_per_node={n}')
            _, duration = run_command(*launch, 'train.py', *options.split())
            accuracy = json.loads(Path(folder, 'run/log.txt').read_text().splitlines()[-1][12:])
            accuracy = accuracy['test_acc']
            if accuracy < 85:
                raise UserError(f'they reach only {accuracy:.1f} %')
            part.add(f'digits, {n} processes', f'{accuracy:.1f} %', [duration])


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
    cuda.use_tf32(False)
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
        'float32': partial(training_step, make_diracnet, short=None),
        'contiguous': partial(training_step, make_diracnet, layout=torch.contiguous_format),
    }
    if network[2] == 'ImageNet':
        found['ResNet-18'] = partial(training_step, make_resnet18)
    if on_cuda and batch < 512 and network[1] < 10:  # compiling takes most of the time
        found['--compile'] = partial(training_step, make_compiled)
    if on_cuda:
        found['CUDA graph'] = lambda *args: cuda.graphed(found['DiracNet'](*args))
        found['plain, CUDA graph'] = lambda *args: cuda.graphed(found['plain'](*args))
    found['textbook'] = textbook_step  # the last, because it switches TF32 off
    return found


def training_steps(network, part):
    *network, batch = network
    label = f'step of DiracNet-{network[0]}-{network[1]}, batch {batch}'
    inputs, targets = (t.to(part.device) for t in random_batch(network[2], batch))
    arguments = (network, inputs, targets)
    ours = operations(make_diracnet, *arguments)
    medians = {}
    for name, build in variants(network, batch, part.on_cuda).items():
        with part.reporting(f'{label}, {name}'):
            if part.on_cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            times = part.time(build(*arguments))
            medians[name] = median(times)
            memory = f'{torch.cuda.max_memory_allocated() / 2**20:.0f}' if part.on_cuda else ''
            goal = GOALS.get(name, '') if network[:2] == [34, 2] else ''
            count = operations(make_resnet18, *arguments) if name == 'ResNet-18' else ours
            share = peak_share(part, count, name, times)
            part.add(label, name, times, ratio(name, medians), goal, batch, memory, share)


def ratio(name, medians):
    """Our median divided by that of a variant: with a CUDA graph if the variant has one, too, or is
    the textbook. '' if ours failed."""
    ours = 'DiracNet'
    if name in ('plain, CUDA graph', 'textbook') and 'CUDA graph' in medians:
        ours = 'CUDA graph'
    if ours not in medians:
        return ''
    of = ' of CUDA graph' if ours == 'CUDA graph' else ''
    return f'{medians[ours] / medians[name]:.3f}{of}'


def operations(make, network, inputs, targets):
    """The floating-point operations of a training step, counted without computing it."""
    with FlopCounterMode(display=False) as counter:
        logits = make(network).to('meta')(inputs.to('meta'))
        F.cross_entropy(logits, targets.to('meta')).backward()
    return counter.get_total_flops()


def peak_share(part, n_operations, variant, times):
    """The share of the card's peak as a text; '-' if that is not known."""
    card = torch.cuda.get_device_name() if part.on_cuda else ''
    if card not in PEAKS:
        return '-'
    in_float32, tf32, bfloat16 = PEAKS[card]
    peak = {'textbook': in_float32, 'float32': tf32}.get(variant, bfloat16)
    return f'{n_operations / median(times) / 1e9 / peak:.3f}'


def data_on_the_device(part):
    """Batches of CIFAR-10's size, without and with training."""
    n = 1000 if part.quick else 50_000
    preprocessing = datasets.PREPROCESSING['CIFAR10']
    data = datasets.Data('CIFAR10', random_cifar(n), None, (), preprocessing, mirrored=True)
    batches = data.batches(True, batch_size=128, device=part.device, pad=4)
    batches.epoch = 1
    alone = part.time(partial(read, batches))
    inputs, targets = (t.to(part.device) for t in random_batch('CIFAR10', 128))
    network = SMALL[0][:3] if part.quick else NETWORKS[0][:3]
    steps = len(batches) * median(part.time(training_step(make_diracnet, network, inputs, targets)))
    share = f'{median(alone) / (median(alone) + steps):.3f} of the epoch'
    part.add('an epoch of batches', 'without training', alone, share, 'at most 0.03', n)


def read(batches):
    for _ in batches:
        pass


def image_files(part):
    """JPEGs decoded by one process, and by one for each core."""
    n, label = 32 if part.quick else 2000, 'JPEGs of 500 x 375 to 224 x 224'
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder), n)
        data = datasets.load('folder', folder)
        alone = decoding_time(data, part, workers=1)
        cores = f'{step_rate(part) * alone / 1000 / n:.1f} cores keep DiracNet-18 busy'
        part.add(label, 'one process', [alone], cores, images=n)
        workers = min(16, len(os.sched_getaffinity(0)))
        together = decoding_time(data, part, workers)
        part.add(label, f'{workers} processes', [together], images=n)


def decoding_time(data, part, workers):
    """Milliseconds of the second epoch; the first also starts the processes."""
    batches = data.batches(True, batch_size=16, device=part.device, workers=workers)
    for epoch in (1, 2):
        batches.epoch = epoch
        duration = milliseconds(partial(read, batches))
    return duration


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
    """{name: (limit in seconds, function of a Part)}; the most important come first."""
    steps = {
        f'steps {network}': (90, partial(training_steps, network))
        for network in (SMALL if quick else NETWORKS)
    }
    return {
        'tests': (150, test_suite),
        'processes': (60, several_processes),
        'data': (40, data_on_the_device),
        'image files': (60, image_files),
        'inference': (40, inference),
        **steps,
    }


def main(name, device, quick):
    """Run one part."""
    part = Part(device, quick == '1')
    if part.on_cuda:
        cuda.set_up()
    with part.reporting(name):
        parts(part.quick)[name][1](part)


if __name__ == '__main__':
    main(*sys.argv[1:])

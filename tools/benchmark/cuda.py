"""The proof that everything works on a CUDA GPU, and how fast: `python -m tools.benchmark cuda`.

A part that fails does not stop the others. On the CPU, `--device cpu --quick` runs the whole
program in small.
"""

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

from lab import cuda
from lab.errors import UserError, one_line
from tools.benchmark.contestants import (
    folded,
    in_pytorch,
    on_a_batch,
    one_pass,
    textbook_on_a_batch,
)
from tools.benchmark.images import small_batches
from tools.benchmark.report import ROOT, Report

LEGEND = (
    "The ratio is the median of a measurement's DiracNet divided by the median of this row. Times "
    'are those of torch.utils.benchmark, after a warm-up: each sample is the mean of a block of '
    'calls. MB is the peak memory of tensors.'
)
SECONDS = 430  # no part begins later
NETWORKS = [  # (depth, width, data set), batch
    *(((34, 2, 'CIFAR10'), batch) for batch in (128, 512)),
    ((18, 1, 'ImageNet'), 256),
    *(((28, 10, 'CIFAR10'), batch) for batch in (128, 512)),
]
SMALL = [((10, 0.25, 'CIFAR10'), 8)]


def bench_cuda(args):
    """Run all parts. The report's `failures` has one line for each failure."""
    device = args.device
    if device == 'cuda' and not torch.cuda.is_available():
        raise UserError('there is no CUDA GPU here; --device cpu --quick runs the program in small')
    report = Report('CUDA', LEGEND)
    if device == 'cuda':
        cuda.set_up()
        card, cudnn = torch.cuda.get_device_name(), torch.backends.cudnn.version()
        report.facts.update(card=card, cuda=torch.version.cuda, cudnn=cudnn)
    end = time.monotonic() + SECONDS
    for name, part in parts(device, args.quick):
        if time.monotonic() > end:
            report.failures.append(f'{name}: no time was left')
            continue
        try:
            part(report)
        except Exception as error:
            report.failures.append(one_line(f'{name}: {type(error).__name__}: {error}'))
    report.add('failed parts', '; '.join(report.failures) or 'none', '')
    return report


def parts(device, quick):
    """Pairs (name, function of a report); the most important come first."""
    yield 'tests', partial(run_tests, device, quick)
    yield 'processes', partial(run_processes, device)
    for label, variant, build, images in steps(device, quick):
        yield f'{label}, {variant}', partial(measure, label, variant, build, images, device, quick)


# --- programs --------------------------------------------------------------------------------


def run_tests(device, quick, report):
    """The tests that are marked for every device."""
    chosen = ['tests/test_diracconv.py'] if quick else []
    # pyproject.toml's options need pytest-xdist, which may be missing.
    options = ['-q', '-o', 'addopts=', '-m', 'device', '--device', device]
    if importlib.util.find_spec('xdist'):
        options += ['-n', str(min(4, len(os.sched_getaffinity(0))))]
    start = time.perf_counter()
    lines = run_python(150, 'pytest', *options, '--continue-on-collection-errors', *chosen)
    [summary] = (line.strip('= ') for line in lines if re.search(r'\d+ passed.* in ', line))
    report.add('tests on the device', summary, [1000 * (time.perf_counter() - start)])


def run_processes(device, report):
    """Digits under torchrun, with a process for each GPU."""
    n = max(1, torch.cuda.device_count())
    launch = ('torch.distributed.run', '--standalone', f'--nproc_per_node={n}')
    with tempfile.TemporaryDirectory() as folder:
        options = f'--dataset digits --epochs 6 --device {device} --save {folder}/run'
        start = time.perf_counter()
        run_python(60, *launch, 'train.py', *options.split())
        duration = time.perf_counter() - start
        last = Path(folder, 'run/log.txt').read_text().splitlines()[-1]
    accuracy = json.loads(last.removeprefix('json_stats: '))['test_acc']
    report.add(f'digits, {n} processes', f'{accuracy:.1f} %', [1000 * duration])


def run_python(limit, *arguments):
    """The lines that python -m ARGUMENTS prints, within `limit` seconds. Raises UserError with
    the last of them if it fails."""
    command = [sys.executable, '-m', *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
    text = result.stdout + result.stderr
    if result.returncode:
        raise UserError(f'exit status {result.returncode}: {text[-900:]}')
    return text.splitlines()


# --- steps -----------------------------------------------------------------------------------


def steps(device, quick):
    """Tuples (label, variant, function that builds a step, number of images in it)."""
    n = 1000 if quick else 50_000
    yield 'pass over small images', 'ours', partial(one_pass, small_batches, n, device), n
    for batch in (1,) if quick else (1, 16, 256):
        for dtype in (torch.float32, torch.bfloat16):
            build = partial(in_pytorch, folded, (18, 1, 'ImageNet'), batch, device, dtype)
            name = str(dtype).removeprefix('torch.')
            yield f'folded DiracNet-18, batch {batch}', name, build, batch
    for network, batch in SMALL if quick else NETWORKS:
        label = f'step of DiracNet-{network[0]}-{network[1]}, batch {batch}'
        variants = training_steps(network, batch, device)
        for name, build in variants.items():
            yield label, name, build, batch
        for name in ('DiracNet', 'plain') if device == 'cuda' else ():
            build = partial(as_graph, variants[name])
            yield f'{label}, as a CUDA graph', name, build, batch


def training_steps(network, batch, device):
    """{variant of a training step: the function that builds it}"""
    ours = partial(on_a_batch, network, batch, device, dtype='bfloat16')
    variants = {
        'DiracNet': ours,
        'plain': partial(ours, model='plain'),
        '--recompute': partial(ours, recompute=True),
        'float32': partial(ours, dtype='float'),
        'contiguous': partial(ours, layout=torch.contiguous_format),
        'textbook': partial(textbook_on_a_batch, network, batch, device),
    }
    if network[2] == 'ImageNet':
        variants['ResNet-18'] = partial(ours, model='resnet')
    if device == 'cuda' and batch < 512 and network[1] < 10:  # compiling takes most of the time
        variants['--compile'] = partial(ours, compile=True)
    return variants


def as_graph(build):
    return cuda.graphed(build())


def measure(label, variant, build, images, device, quick, report):
    """Add the row of a step."""
    from torch.utils.benchmark import Timer  # without a GPU, it may log a warning

    if device == 'cuda':
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step = build()
    for _ in range(1 if quick else 3):
        step()
    timer = Timer('step()', globals={'step': step}, num_threads=torch.get_num_threads())
    times = timer.blocked_autorange(min_run_time=0.1 if quick else 2).times
    times = [1000 * value for value in times]
    ours = times if variant == 'DiracNet' else report.samples.get(label, {}).get('DiracNet')
    ratio = f'{median(ours) / median(times):.3f}' if ours else ''
    memory = torch.cuda.max_memory_allocated() / 2**20 if device == 'cuda' else None
    report.add(label, variant, times, ratio, images, memory)

"""The proof that everything works on a CUDA GPU, and how fast: `python -m tools.benchmark cuda`.

The most important parts come first, and each row is printed as soon as it is measured. A part that
fails or takes too long does not stop the others. On the CPU, `--device cpu --quick` runs the whole
program in small.
"""

import contextlib
import gc
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from functools import partial
from pathlib import Path
from statistics import mean, median

import torch

from lab import cuda
from lab.errors import UserError, one_line
from tools.benchmark.contestants import build_reference, folded, in_pytorch, on_a_batch, one_pass
from tools.benchmark.images import small_batches, write_cifar10
from tools.benchmark.report import ROOT, Report, ratio_of_medians

LEGEND = (
    'The ratio is the median of DiracNet divided by that of the row, measured in turn, with a 95 % '
    'interval from a bootstrap of the rounds. Each sample is the mean of a block of calls, timed '
    'by torch.utils.benchmark after a warm-up. MB is the peak memory of tensors.'
)
SECONDS = 470  # of all parts
FIRST = ((34, 2, 'CIFAR10'), 128)  # (depth, width, data set), batch; most goals are about it
OTHERS = [((28, 10, 'CIFAR10'), 128), ((18, 1, 'ImageNet'), 256), (FIRST[0], 512)]
TORCHVISION = "torchvision's ResNet-18"
SMALL = ((10, 0.25, 'CIFAR10'), 8)
MODES = {
    'eager': {'graph': False},
    'graph': {'graph': True},
    'compile + graph': {'graph': True, 'compile': True},
}
EPOCHS = 4  # of train.py on CIFAR-10; the first one warms up
# The largest values that are good enough, on an H100 in bfloat16:
STEP_GOALS = {(*FIRST, 'graph'): 4, (*FIRST, 'compile + graph'): 2.5}  # ms
EPOCH_GOAL = 2000  # ms, training and test
BATCHES_GOAL = 0.03  # share of an epoch's steps that a pass over the images takes
MEMORY_GOAL = 1.3  # of a graph
RELATIVE_MB = 'MB, relative to eager,'


def bench_cuda(args):
    """Run all parts. The report's `failures` has one line for each failure."""
    device = args.device
    if device == 'cuda' and not torch.cuda.is_available():
        raise UserError('there is no CUDA GPU here; --device cpu --quick runs the program in small')
    report = Report('CUDA', LEGEND)
    if device == 'cuda':
        cuda.set_up(torch.device('cuda', torch.cuda.current_device()))
        card, cudnn = torch.cuda.get_device_name(), torch.backends.cudnn.version()
        report.facts.update(card=card, cuda=torch.version.cuda, cudnn=cudnn)
    end = time.monotonic() + SECONDS
    for name, seconds, part in parts(device, args.quick):
        left = min(seconds, end - time.monotonic())
        try:
            if left <= 0:
                raise UserError('no time was left')
            with limited(left):
                part(report)
        except Exception as error:
            report.failures.append(one_line(f'{name}: {type(error).__name__}: {error}'))
            print('failed:', report.failures[-1], flush=True)
        if args.out:
            report.write(args.out)  # also for a run that is cut off
    report.add('failed parts', '; '.join(report.failures) or 'none', '')
    return report


@contextlib.contextmanager
def limited(seconds):
    """Raise TimeoutError in the body after so many seconds."""

    def stop(*_):
        raise TimeoutError(f'stopped after {seconds:.0f} s')

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def parts(device, quick):
    """Tuples (name, seconds it may take, function of a report); the most important come first."""
    first, *others = networks = [SMALL] if quick else [FIRST, *OTHERS]
    eager, graph, compiled = MODES
    # To compile a network takes longer than everything else that is measured of it.
    modes, slow_modes = ([eager, graph], [compiled]) if device == 'cuda' else ([eager], [])
    yield 'tests', 120, partial(run_tests, device, quick)
    yield from steps(*first, 'bfloat16', modes + slow_modes, device, quick)
    yield 'epoch', 90, partial(run_epochs, *first, modes[-1], device, quick)
    yield 'batches', 20, partial(measure_batches, *first, device, quick)
    for network in others:
        yield from steps(*network, 'bfloat16', modes, device, quick)
    for mode in slow_modes:
        yield f'epoch, {mode}', 90, partial(run_epochs, *first, mode, device, quick)
    for network in networks[1:3]:
        yield from steps(*network, 'bfloat16', slow_modes, device, quick)
    yield 'processes', 60, partial(run_processes, device)
    yield from inference(device, quick)
    for network in networks:
        yield from steps(*network, 'float32', modes, device, quick)
    for network in networks[3:]:
        yield from steps(*network, 'bfloat16', slow_modes, device, quick)
    for network in networks:
        yield from steps(*network, 'float32', slow_modes, device, quick)


# --- programs --------------------------------------------------------------------------------


def run_tests(device, quick, report):
    """The tests that are marked for every device. Those that fail are printed at once."""
    chosen = ['tests/test_diracconv.py'] if quick else []
    # pyproject.toml's options need pytest-xdist, which may be missing.
    options = ['-v', '-o', 'addopts=', '-m', 'device', '--device', device]
    if importlib.util.find_spec('xdist'):
        options += ['-n', str(min(8, len(os.sched_getaffinity(0))))]
    start = time.perf_counter()
    for line in lines_of('-m', 'pytest', *options, '--continue-on-collection-errors', *chosen):
        if re.search(r'\b(FAILED|ERROR)\b', line):
            print(line, flush=True)
        if re.search(r'\d+ passed.* in ', line):
            summary = line
    report.add('tests on the device', summary.strip('= '), [1000 * (time.perf_counter() - start)])


def run_epochs(network, batch, mode, device, quick, report):
    """train.py on random images in the format of CIFAR-10, from its command to its log."""
    depth, width, _ = network
    flags = ' '.join(f'--{name}' for name, is_on in MODES[mode].items() if is_on)
    n, n_test = (640, 200) if quick else (50_000, 10_000)
    options = f'--depth {depth} --width {width} --batch_size {batch} --dtype bfloat16 {flags}'
    # torchvision would refuse the images, because of their MD5 sums.
    program = (
        'import sys, torchvision, train; '
        'torchvision.datasets.cifar.check_integrity = lambda *_: True; '
        'sys.exit(train.main(sys.argv[1:]))'
    )
    with tempfile.TemporaryDirectory() as folder:
        write_cifar10(Path(folder), n, n_test)
        options += f' --epochs {EPOCHS} --device {device} --dataroot {folder} --save {folder}/run'
        lines = printed(lines_of('-c', program, *options.split()))
        is_watched = device == 'cuda' and shutil.which('nvidia-smi')
        utilization = utilization_during(lines) if is_watched else deque(lines, 0)
        epochs = log_of(folder)[1:]
    label = f'epoch of {name_of(network, batch)}, bfloat16, {mode}, by train.py'
    training, test = (
        [1000 * line[f'{part}_time'] for line in epochs] for part in ('train', 'test')
    )
    both = [sum(pair) for pair in zip(training, test)]
    report.add(label, 'training', training, '', n)
    report.add(label, 'test', test, '', n_test)
    report.add(label, 'training and test', both, '', n)
    check(report, 'ms', median(both), EPOCH_GOAL)
    if utilization:
        idle = 100 - mean(map(float, utilization))
        report.add(label, 'GPU without work', f'{idle:.1f} % of the time')


def utilization_during(lines):
    """The percentages of the time in which the GPU ran a kernel, as nvidia-smi prints them every
    0.1 s from the end of train.py's first epoch to that of the last. `lines`: what it prints."""
    choice = '--id=' + os.environ.get('CUDA_VISIBLE_DEVICES', '0').partition(',')[0]
    what = ('--query-gpu=utilization.gpu', '--format=csv,noheader,nounits', '--loop-ms=100')
    samples = []
    with contextlib.ExitStack() as stack:
        for line in lines:
            if line.startswith('epoch 1/'):
                command = ['nvidia-smi', choice, *what]
                sampler = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
                stack.callback(sampler.kill)
            elif line.startswith(f'epoch {EPOCHS}/'):
                sampler.terminate()
                samples = sampler.communicate()[0].split()
    return samples


def run_processes(device, report):
    """Digits under torchrun, with a process for each GPU."""
    n = max(1, torch.cuda.device_count())
    launch = ('torch.distributed.run', '--standalone', f'--nproc_per_node={n}')
    with tempfile.TemporaryDirectory() as folder:
        options = f'--dataset digits --epochs 6 --device {device} --save {folder}/run'
        start = time.perf_counter()
        deque(lines_of('-m', *launch, 'train.py', *options.split()), 0)
        duration = time.perf_counter() - start
        accuracy = log_of(folder)[-1]['test_acc']
    report.add(f'digits, {n} processes', f'{accuracy:.1f} %', [1000 * duration])


def printed(lines):
    for line in lines:
        print('  ', line, flush=True)
        yield line


def log_of(folder):
    """The log of the run in folder/run: a dict for each epoch."""
    lines = Path(folder, 'run/log.txt').read_text().splitlines()
    return [json.loads(line.removeprefix('json_stats: ')) for line in lines]


def lines_of(*arguments):
    """Yield the lines that python ARGUMENTS prints, as they come. Raises UserError with the last
    of them if it fails or is stopped."""
    last = deque(maxlen=20)
    command = [sys.executable, *arguments]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    # On a busy CPU, threads would wait for each other in each small operation.
    pipes['env'] = {**os.environ, 'OMP_NUM_THREADS': '1'}
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes) as process:
        try:
            for line in process.stdout:
                last.append(line)
                yield line.rstrip()
            status = f'exit status {process.wait()}' if process.wait() else ''
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)  # and the processes that it started
            if not isinstance(error, TimeoutError):
                raise
            status = str(error)
    if status:
        raise UserError(f'{status}: {"".join(last)[-900:]}')


# --- steps -----------------------------------------------------------------------------------


def steps(network, batch, dtype, modes, device, quick):
    """The parts that measure a training step of a DiracNet, and of what it is compared with."""
    kept = {}  # of the DiracNet: the step that the others are measured in turn with, and its MB
    for mode in modes:
        label = f'step of {name_of(network, batch)}, {dtype}, {mode}'
        options = {'dtype': dtype.removesuffix('32'), **MODES[mode]}
        for variant, build in contestants(network, batch, device, options).items():
            limits = goals(network, batch, dtype, mode, variant)
            part = partial(measure_step, kept, limits, label, variant, build, batch, device, quick)
            yield f'{label}, {variant}', 90, part


def contestants(network, batch, device, options):
    """{name: the function that builds its training step}; the DiracNet is the first."""
    depth, width, dataset = network
    ours = partial(on_a_batch, network, batch, device, **options)
    others = {'plain': partial(ours, model='plain')}
    if options['dtype'] == 'bfloat16' and dataset == 'ImageNet':
        import torchvision

        build = partial(build_reference, torchvision.models.resnet18)
        others = {TORCHVISION: partial(ours, build=build), **others}
    elif options['dtype'] == 'bfloat16' and width < 10:  # a wide one would take long to compile
        build, shallower = partial(build_reference, None), (depth - 2, width, dataset)
        resnet = partial(on_a_batch, shallower, batch, device, build, model='resnet', **options)
        others[f'ResNet-{depth - 2}-{width}'] = resnet
    return {'DiracNet': ours, **others}


def goals(network, batch, dtype, mode, variant):
    """{what: the largest value that is good enough}"""
    if dtype != 'bfloat16':
        return {}
    if variant == 'plain':
        return {'ratio': 1.02 if network == (28, 10, 'CIFAR10') else 1.03}
    if variant == TORCHVISION:
        return {'ratio': 1}
    if variant != 'DiracNet':
        return {}
    memory = {RELATIVE_MB: MEMORY_GOAL} if mode == 'graph' else {}
    case = (network, batch, mode)
    return {**memory, 'ms': STEP_GOALS[case]} if case in STEP_GOALS else memory


def measure_step(kept, limits, label, variant, build, batch, device, quick, report):
    """Add the row of a training step, and say whether it reaches its goals."""
    if variant == 'DiracNet':
        kept.pop('step', None)
    against = kept.get('step')
    step, found = measure(label, variant, build, batch, device, quick, report, against)
    if variant == 'DiracNet':
        kept['step'] = step
        if RELATIVE_MB not in limits:
            kept['MB'] = found['MB']
        elif 'MB' in kept:
            found[RELATIVE_MB] = found['MB'] / kept['MB']
    for what, limit in limits.items():
        if what in found:
            check(report, what, found[what], limit)


def measure(label, variant, build, images, device, quick, report, against=None):
    """Add the row of a step that computes so many images, in turn with another step, `against`.
    Returns the step, and {ms, ratio, MB}."""
    is_cuda, before = device == 'cuda', 0
    if is_cuda:
        gc.collect()  # steps that failed, and captured ones, are in cycles
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
    step = build()
    step()  # cuDNN tries its algorithms, with more memory
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(1 if quick else 6):  # a graph is captured within these
        step()
    memory = (torch.cuda.max_memory_allocated() - before) / 2**20 if is_cuda else None
    *others, times = in_turn([against, step] if against else [step], quick)
    found = {'ms': median(times), 'MB': memory}
    ratio = ''
    if against:
        found['ratio'], *interval = ratio_of_medians(others[0], times)
        ratio = '{:.3f} ({:.3f} to {:.3f})'.format(found['ratio'], *interval)
        report.samples.setdefault(label, {})[f'in turn with {variant}'] = others[0]
    report.add(label, variant, times, ratio, images, memory)
    return step, found


def in_turn(steps, quick):
    """The ms of each of the steps, in rounds: each is the mean of a block of calls."""
    from torch.utils.benchmark import Timer  # without a GPU, it may log a warning

    rounds, seconds = (3, 0.02) if quick else (10, 0.1)
    threads = torch.get_num_threads()
    timers = [Timer('step()', globals={'step': step}, num_threads=threads) for step in steps]
    sizes = [max(1, round(seconds / timer.timeit(2).mean)) for timer in timers]
    times = [[] for _ in steps]
    for _ in range(rounds):
        for timer, size, samples in zip(timers, sizes, times):
            samples.append(1000 * timer.timeit(size).mean)
    return times


def measure_batches(network, batch, device, quick, report):
    """A pass over the training images without training, and its share of an epoch's steps."""
    n = 1000 if quick else 50_000
    build = partial(one_pass, small_batches, n, device)
    _, found = measure('pass over small images', 'ours', build, n, device, quick, report)
    for mode in MODES:
        step = report.samples.get(f'step of {name_of(network, batch)}, bfloat16, {mode}', {})
        if 'DiracNet' in step:
            share = found['ms'] / (n / batch * median(step['DiracNet']))
            check(report, f"share of an epoch's steps, {mode},", share, BATCHES_GOAL)


def inference(device, quick):
    """The parts that measure folded networks."""
    for batch in (1,) if quick else (1, 16, 256):
        for dtype in (torch.float32, torch.bfloat16):
            build = partial(in_pytorch, folded, (18, 1, 'ImageNet'), batch, device, dtype)
            label, variant = f'folded DiracNet-18, batch {batch}', str(dtype).partition('.')[2]
            yield label, 30, partial(measure, label, variant, build, batch, device, quick)


def name_of(network, batch):
    depth, width, _ = network
    return f'DiracNet-{depth}-{width}, batch {batch}'


def check(report, what, value, limit):
    """Add a row that says whether the measurement before it reaches its goal, which is one of a
    GPU."""
    if not torch.cuda.is_available():
        return
    verdict = 'reached' if value <= limit else 'missed'
    report.add(f'goal: {what} at most {limit:g}', f'{verdict}: {value:.4g}', '')

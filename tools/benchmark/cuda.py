"""The proof that everything works on a CUDA GPU, and how fast: `python -m tools.benchmark cuda`.

Each part runs in a process of its own, with a time limit, so that a failure of one does not stop
the others. On the CPU, `--device cpu --quick` runs the whole program in small.

    python -m tools.benchmark.cuda NAME DEVICE QUICK

runs one part. It prints each row, and each failure, as a line of JSON at once: what comes later
cannot lose it.
"""

import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode

from lab import cuda
from lab.data import datasets
from lab.errors import UserError, one_line
from tools.benchmark.contestants import folded, in_pytorch, on_a_batch, seconds, textbook_on_a_batch
from tools.benchmark.images import our_batches, read, write_photographs
from tools.benchmark.report import ROOT, Report, spread

COLUMNS = ['measurement', 'variant', 'ms, median (quartiles)', 'ratio', 'images/s', 'MB', 'peak']
LEGEND = (
    'Times of steps, batches and inference are those of torch.utils.benchmark, after a warm-up: '
    'each sample is the mean of a block of calls.'
)
SECONDS = 470  # for all parts together
# Dense TFLOP/s in float32, with TF32 and with bfloat16, from NVIDIA's data sheets.
PEAKS = {
    'H200': (66.9, 494.7, 989.4),
    'H100 80GB HBM3': (66.9, 494.7, 989.4),
    'H100 PCIe': (51, 378, 756),
    'A100': (19.5, 156, 312),
}
NETWORKS = [  # depth, width, data set, batch
    *((34, 2, 'CIFAR10', batch) for batch in (128, 512)),
    (18, 1, 'ImageNet', 256),
    *((28, 10, 'CIFAR10', batch) for batch in (128, 512)),
]
SMALL = [(10, 0.25, 'CIFAR10', 8)]
# The lines of a failed command that say why.
TELLING = re.compile(r'(SUB)?FAILED|ERROR|\d+ failed|train\.py|\w*Error')


def bench_cuda(args):
    """Run all parts. The report's `failures` has one line for each failure."""
    device = args.device or 'cuda'
    if device == 'cuda' and not torch.cuda.is_available():
        raise UserError('there is no CUDA GPU here; --device cpu --quick runs the program in small')
    report = Report('CUDA', LEGEND, COLUMNS)
    if device == 'cuda':
        report.facts.update(card=torch.cuda.get_device_name(), cuda=torch.version.cuda)
        query = 'nvidia-smi --query-gpu=driver_version --format=csv,noheader'
        driver = subprocess.getoutput(query).splitlines()[0]
        report.facts.update(cudnn=torch.backends.cudnn.version(), driver=driver)
    end = time.monotonic() + SECONDS
    for name, (limit, _) in parts(args.quick).items():
        run_part(report, name, device, args.quick, max(0, min(limit, end - time.monotonic())))
    report.add('failed parts', '; '.join(report.failures) or 'none', *[''] * (len(COLUMNS) - 2))
    return report


def run_part(report, name, device, quick, limit):
    """Add what a part measures, and what fails, to the report."""
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile('w+') as output,
    ):
        process = subprocess.Popen(
            [sys.executable, '-m', 'tools.benchmark.cuda', name, device, str(int(quick))],
            cwd=ROOT,
            env={**os.environ, 'TMPDIR': folder},  # a killed part leaves its files there
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        status = 0
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            report.failures.append(f'{name}: stopped after {limit:.0f} s')
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the processes that it started, too
            process.wait()
        output.seek(0)
        lines = output.read().splitlines()
    if status:
        end = ' '.join(lines)[-200:]
        report.failures.append(one_line(f'{name}: exit status {status}: {end}'))
    for line in lines:
        if line.startswith('{"row"'):
            told = json.loads(line)
            report.add(*told['row'])
            report.samples.update(told['samples'])
        elif line.startswith('{"failure"'):
            report.failures.append(one_line(json.loads(line)['failure']))


# --- within a part ---------------------------------------------------------------------------


def tell(label, variant, times, ratio='', images=0, megabytes='', share=''):
    """Print a row of the table; times are in ms."""
    speed = f'{1000 * images / median(times):.0f}' if images else ''
    row = [label, variant, spread(times), ratio, speed, megabytes, share]
    print(json.dumps({'row': row, 'samples': {f'{label}, {variant}, ms': times}}), flush=True)


@contextlib.contextmanager
def reporting(what):
    """Print whatever the body raises."""
    try:
        yield
    except Exception as error:
        print(json.dumps({'failure': f'{what}: {type(error).__name__}: {error}'}), flush=True)


def milliseconds(step, quick):
    """The times of a step: the mean of each block of calls, after a warm-up."""
    from torch.utils.benchmark import Timer  # without a GPU, it may log a warning

    for _ in range(1 if quick else 3):
        step()
    timer = Timer('step()', globals={'step': step}, num_threads=torch.get_num_threads())
    times = timer.blocked_autorange(min_run_time=0.1 if quick else 2).times
    return [1000 * value for value in times]


def run_python(*arguments):
    """The lines that python -m ARGUMENTS prints. Raises UserError with those that say why it
    failed."""
    command = [sys.executable, '-m', *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = (result.stdout + result.stderr).splitlines()
    if result.returncode:
        telling = [line for line in lines if TELLING.match(line)]
        raise UserError('; '.join([f'exit status {result.returncode}', *telling[-5:]]))
    return lines


def test_suite(device, quick):
    """The tests that are marked for every device."""
    chosen = ['tests/test_diracconv.py'] if quick else []
    # pyproject.toml's options need pytest-xdist, which may be missing.
    options = ['-q', '-o', 'addopts=', '-m', 'device', '--device', device]
    if importlib.util.find_spec('xdist'):
        options += ['-n', str(min(4, len(os.sched_getaffinity(0))))]
    start = time.perf_counter()
    lines = run_python('pytest', *options, '--continue-on-collection-errors', *chosen)
    [summary] = (line.strip('= ') for line in lines if re.search(r'\d+ passed.* in ', line))
    tell('tests on the device', summary, [1000 * (time.perf_counter() - start)])


def several_processes(device, quick):
    """Digits under torchrun, with one process and with one for each GPU."""
    for n in sorted({1, max(1, torch.cuda.device_count())}):
        with reporting(f'{n} processes'), tempfile.TemporaryDirectory() as folder:
            options = f'--dataset digits --epochs 6 --device {device} --save {folder}/run'
            launch = ('torch.distributed.run', '--standalone', f'--nproc_per_node={n}')
            duration = seconds(partial(run_python, *launch, 'train.py', *options.split()))
            last = Path(folder, 'run/log.txt').read_text().splitlines()[-1]
            accuracy = json.loads(last.removeprefix('json_stats: '))['test_acc']
            if accuracy < 85:
                raise UserError(f'they reach only {accuracy:.1f} %')
            tell(f'digits, {n} processes', f'{accuracy:.1f} %', [1000 * duration])


def data_on_the_device(device, quick):
    """Batches of CIFAR-10's size, without and with training."""
    n = 1000 if quick else 50_000
    batches = our_batches(n, device)
    alone = milliseconds(partial(read, batches), quick)
    *network, batch = (SMALL if quick else NETWORKS)[0]
    step = on_a_batch(network, batch, device, dtype='bfloat16')
    steps = n / batch * median(milliseconds(step, quick))
    share = f'{median(alone) / (median(alone) + steps):.3f} of the epoch'
    tell('an epoch of batches', 'without training', alone, share, n)


def image_files(device, quick):
    """JPEGs decoded by one process, and by one for each core; how many DiracNet-18 needs."""
    label, n, batch = 'JPEGs of 500 x 375 to 224 x 224', 2000, 256
    if quick:
        n, batch = 32, 2
    step = on_a_batch((18, 1, 'ImageNet'), batch, device, dtype='bfloat16')
    training = n / batch * median(milliseconds(step, quick))
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder), n)
        data = datasets.load('folder', folder)
        for workers in (1, min(16, len(os.sched_getaffinity(0)))):
            batches = data.batches(True, batch_size=16, device=device, workers=workers)
            read(batches)  # starts the processes
            duration = 1000 * seconds(partial(read, batches))
            if workers == 1:
                cores = f'{duration / training:.1f} cores keep DiracNet-18 busy'
                tell(label, 'one process', [duration], cores, n)
            else:
                tell(label, f'{workers} processes', [duration], images=n)


def inference(device, quick):
    for batch in (1,) if quick else (1, 16, 256):
        for dtype in (torch.float32, torch.bfloat16):
            step = in_pytorch(folded, (18, 1, 'ImageNet'), batch, device, dtype)
            name = str(dtype).removeprefix('torch.')
            tell(f'folded DiracNet-18, batch {batch}', name, milliseconds(step, quick), '', batch)


def training_steps(network, device, quick):
    """Times, peak memory and share of the card's peak of the variants of a training step.

    network: as in NETWORKS.
    """
    *network, batch = network
    label = f'step of DiracNet-{network[0]}-{network[1]}, batch {batch}'
    card = torch.cuda.get_device_name() if device == 'cuda' else ''
    medians, n_operations, memory = {}, 0, ''
    for name, build in variants(network, batch, device).items():
        with reporting(f'{label}, {name}'):
            if device == 'cuda':
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            step = build()
            times = milliseconds(step, quick)
            medians[name] = median(times)
            if device == 'cuda':
                memory = f'{torch.cuda.max_memory_allocated() / 2**20:.0f}'
            if name == 'DiracNet':
                n_operations = operations(step)
            count = operations(step) if name == 'ResNet-18' else n_operations
            share = peak_share(card, name, count, medians[name])
            tell(label, name, times, ratio(name, medians), batch, memory, share)


def variants(network, batch, device):
    """{variant of a training step: the function that builds it}."""
    ours = partial(on_a_batch, network, batch, device, dtype='bfloat16')
    plain = partial(ours, model='plain')
    builders = {
        'DiracNet': ours,
        'plain': plain,
        'float32': partial(ours, dtype='float'),
        'contiguous': partial(ours, layout=torch.contiguous_format),
    }
    if network[2] == 'ImageNet':
        builders['ResNet-18'] = partial(ours, model='resnet')
    if device == 'cuda':
        if batch < 512 and network[1] < 10:  # compiling takes most of the time
            builders['--compile'] = partial(ours, compile=True)
        builders['CUDA graph'] = lambda: cuda.graphed(ours())
        builders['plain, CUDA graph'] = lambda: cuda.graphed(plain())
    # The last, because it switches TF32 off.
    builders['textbook'] = partial(textbook_on_a_batch, network, batch, device)
    return builders


def ratio(name, medians):
    """Our median divided by that of a variant: with a CUDA graph if the variant has one, too, or is
    the textbook. '' if ours failed."""
    with_graph = name in ('plain, CUDA graph', 'textbook') and 'CUDA graph' in medians
    ours = 'CUDA graph' if with_graph else 'DiracNet'
    if ours not in medians:
        return ''
    return f'{medians[ours] / medians[name]:.3f}{" of CUDA graph" if with_graph else ""}'


def operations(step):
    """The floating-point operations of a step."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def peak_share(card, variant, n_operations, duration):
    """The share of the card's peak as a text; '-' if that is not known. duration: ms."""
    for name, (in_float32, tf32, bfloat16) in PEAKS.items():
        if name in card and n_operations:
            peak = {'textbook': in_float32, 'float32': tf32}.get(variant, bfloat16)
            return f'{n_operations / duration / 1e9 / peak:.3f}'
    return '-'


def parts(quick):
    """{name: (limit in seconds, function of device and quick)}; the most important come first."""
    networks = SMALL if quick else NETWORKS
    return {
        'tests': (150, test_suite),
        'processes': (60, several_processes),
        'data': (40, data_on_the_device),
        'image files': (60, image_files),
        'inference': (40, inference),
        **{f'steps {network}': (90, partial(training_steps, network)) for network in networks},
    }


def main(name, device, quick):
    """Run one part."""
    if device == 'cuda':
        cuda.set_up()
    with reporting(name):
        parts(quick == '1')[name][1](device, quick == '1')


if __name__ == '__main__':
    main(*sys.argv[1:])

"""The device to train on, floating-point types, and torch's settings for both."""

import contextlib
import functools
import os
from pathlib import Path

import torch

from diracparams import DATASETS
from lab import cuda, distributed
from lab.distributed import say
from lab.errors import OptionError
from lab.memory import keep_freed_memory

# --dtype: the type of the parameters, and the type that autocast uses for convolutions, if any.
UNTESTED = ('mps', 'xpu')  # devices that torch has, but that this program was never run on
DTYPES = {
    'float': (torch.float32, None),
    'double': (torch.float64, None),
    'bfloat16': (torch.float32, torch.bfloat16),
    'half': (torch.float32, torch.float16),
}


@functools.cache
def has_bfloat16():
    """Whether this machine has a CUDA GPU, or a CPU with instructions for bfloat16, which are
    known only on Linux."""
    try:
        flags = Path('/proc/cpuinfo').read_text().split()
    except OSError:
        flags = []
    return torch.cuda.is_available() or not {'avx512_bf16', 'amx_bf16'}.isdisjoint(flags)


def autocast(device, short):
    """A context in which convolutions run in the type `short`; None leaves all types alone."""
    return torch.autocast(device.type, short) if short else contextlib.nullcontext()


def choose_device(cli_options):
    """The torch device that the options device, cuda, gpu_id and ngpu ask for. Raises OptionError
    if there is none, or if they contradict each other."""
    dataset = cli_options.get('dataset', 'CIFAR10')
    if (cli_options.get('form') or DATASETS[dataset][0]) == 'imagenet':
        # Allocate large tensors in huge pages (Linux; torch reads this at its first allocation,
        # below). Otherwise the page faults of a batch of 224 x 224 images take several times as
        # long as its normalization. Small images do not gain, and would use more memory.
        os.environ.setdefault('THP_MEM_ALLOC_ENABLE', '1')
    name, n_devices = _device_name(cli_options), torch.cuda.device_count()
    kind = name.partition(':')[0]
    if cli_options.get('graph') and kind != 'cuda':
        raise OptionError(f'--graph needs CUDA, but the device is {name}')
    if kind in ('cpu', *UNTESTED) and (cli_options.get('cuda') or 'gpu_id' in cli_options):
        raise OptionError(f'--cuda and --gpu_id contradict --device {name}; use one of the two')
    _check_processes(cli_options.get('ngpu', distributed.local_world()), name, n_devices)
    if name == 'cuda':
        name = f'cuda:{distributed.local_rank()}'
    try:
        if kind in ('cpu', 'cuda', *UNTESTED):
            return torch.ones(1, device=name).device
    except (RuntimeError, AssertionError):
        pass
    raise OptionError(
        f'--device {name!r} cannot be used: this program trains on cpu, cuda (cuda:1, '
        f'...), mps and xpu, if torch finds them, and this machine has {n_devices} CUDA devices'
    )


def _device_name(cli_options):
    uses_gpu = cli_options.get('cuda') or 'gpu_id' in cli_options or torch.cuda.is_available()
    name = cli_options.get('device', 'cuda' if uses_gpu else 'cpu')
    return f'cuda:{cli_options["gpu_id"]}' if name == 'cuda' and 'gpu_id' in cli_options else name


def _check_processes(n, name, n_devices):
    """Raise OptionError if n processes cannot train on the device of this name."""
    if distributed.under_torchrun() and n != distributed.local_world():
        raise OptionError(
            f'--ngpu {n}, but torchrun started {distributed.local_world()} processes on this '
            'machine; use one of the two'
        )
    if name.startswith('cuda:') and n > 1:
        raise OptionError(
            f'{name} is one device, but each of the {n} processes needs its own; '
            'choose devices with CUDA_VISIBLE_DEVICES'
        )
    if name.startswith(UNTESTED) and n > 1:
        raise OptionError(f'--ngpu {n}: only cpu and cuda train in several processes')
    if name == 'cuda' and n > max(n_devices, 1):
        raise OptionError(f'--ngpu {n} needs as many CUDA devices; this machine has {n_devices}')


def _has_double(device):
    try:
        return torch.ones(1, dtype=torch.double, device=device).dtype == torch.double
    except (TypeError, RuntimeError):
        return False


def set_up(options, device):
    """Set torch's global switches. Raises OptionError for a dtype that the device cannot train."""
    options['graph'] &= device.type == 'cuda'  # a resumed run may have been on another device
    if options['dtype'] == 'half' and device.type != 'cuda':
        raise OptionError(f'--dtype half needs CUDA, but the device is {device}; use bfloat16')
    if options['dtype'] == 'double' and not _has_double(device):
        raise OptionError(f'--dtype double: {device} has no double precision; use float')
    if device.type in UNTESTED:
        say(f'{device} is untested: compare the first epochs with those of --device cpu')
    if device.type == 'cuda':
        cuda.set_up(device)
    elif not options['recompute']:  # --recompute saves memory, so malloc should return it
        keep_freed_memory()

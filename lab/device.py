"""The device to train on, floating-point types, and torch's settings for both."""

import contextlib
import functools
import os
from pathlib import Path

import torch

from diracparams import DATASETS
from lab import cuda, distributed
from lab.errors import OptionError
from lab.memory import keep_freed_memory

# --dtype: the type of the parameters, and the type that autocast uses for convolutions, if any.
DTYPES = {
    'float': (torch.float32, None),
    'double': (torch.float64, None),
    'bfloat16': (torch.float32, torch.bfloat16),
    'half': (torch.float32, torch.float16),
}


@functools.cache
def has_bfloat16():
    """Whether this machine has a CUDA GPU, or a CPU with instructions for bfloat16.

    The instructions are known only on Linux; elsewhere, only a GPU counts.
    """
    try:
        flags = Path('/proc/cpuinfo').read_text().split()
    except OSError:
        flags = []
    return torch.cuda.is_available() or not {'avx512_bf16', 'amx_bf16'}.isdisjoint(flags)


def autocast(device, short):
    """A context in which convolutions run in the type `short`; None leaves all types alone."""
    return torch.autocast(device.type, short) if short else contextlib.nullcontext()


def choose_device(given):
    """The torch device that the options device, cuda, gpu_id and ngpu ask for.

    Raises:
        OptionError: there is no such device, or the options contradict each other.
    """
    dataset = given.get('dataset', 'CIFAR10')
    if (given.get('form') or DATASETS[dataset][0]) == 'imagenet':
        # Allocate large tensors in huge pages (Linux; torch reads this at its first allocation,
        # below). Otherwise the page faults of a batch of 224 x 224 images take several times as
        # long as its normalization. Small images do not gain, and would use more memory.
        os.environ.setdefault('THP_MEM_ALLOC_ENABLE', '1')
    n_devices = torch.cuda.device_count()
    processes = given.get('ngpu', distributed.local_world())
    if distributed.under_torchrun() and processes != distributed.local_world():
        raise OptionError(
            f'--ngpu {processes}, but torchrun started {distributed.local_world()} processes on '
            'this machine; use one of the two'
        )
    name = _device_name(given, n_devices)
    if name.partition(':')[0] not in ('cpu', 'cuda'):
        raise OptionError(
            f'--device {name!r} cannot be used: this program trains on cpu and cuda (cuda:1, ...)'
        )
    if name.startswith('cuda:') and processes > 1:
        raise OptionError(
            f'{name} is one device, but each of the {processes} processes needs its own; '
            'choose devices with CUDA_VISIBLE_DEVICES'
        )
    try:
        device = torch.device(name)
        if name == 'cuda':
            device = torch.device(name, distributed.local_rank())
        if device.type == 'cuda' and max(device.index, processes - 1) >= n_devices:
            wanted = name if processes == 1 else f'--ngpu {processes}'
            raise OptionError(
                f'{wanted} is not available: this machine has {n_devices} CUDA devices; '
                '--device cpu works everywhere'
            )
        torch.empty(1, device=device).add_(1)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise OptionError(
            f'--device {name} cannot be used here; --device cpu works everywhere'
        ) from None
    for flag in ('cuda', 'gpu_id'):
        if given.get(flag) is not None and device.type != 'cuda':
            raise OptionError(f'--{flag} contradicts --device {name}; use one of the two')
    return device


def _device_name(given, n_devices):
    if given.get('device') is not None:
        name = given['device']
    elif given.get('cuda') or given.get('gpu_id') or n_devices:
        name = 'cuda'
    else:
        name = 'cpu'
    if name == 'cuda' and given.get('gpu_id') is not None:
        name = f'cuda:{given["gpu_id"]}'
    return name


def set_up(options, device):
    """Set torch's global switches. Raises OptionError for a dtype that the device cannot train."""
    if options['dtype'] == 'half' and device.type != 'cuda':
        raise OptionError(f'--dtype half needs CUDA, but the device is {device}; use bfloat16')
    if device.type == 'cuda':
        cuda.set_up()
    elif not options['recompute']:  # --recompute saves memory, so malloc should return it
        keep_freed_memory()

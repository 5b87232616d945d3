"""What Linux's malloc does with the memory of tensors on the CPU. Elsewhere these functions do nothing."""

import ctypes
import sys


def _libc(name):
    """A function of the C library; None where it has none of that name."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == 'linux' else None


def keep_freed_memory():
    """Have malloc keep what is freed. Else each training step gives its activations back to the system, and page faults for the next
    step's take a tenth of the time."""
    mallopt = _libc('mallopt')
    if mallopt:
        trim_threshold, mmap_threshold = -1, -3  # M_ constants of malloc.h
        for option, size in (
            (mmap_threshold, 2**25),
            (mmap_threshold, 2**30),
            (trim_threshold, 2**31 - 1),
        ):
            mallopt(option, size)  # a size that is too large for an older glibc changes nothing


def release_freed_memory():
    """Give back what malloc holds free."""
    trim = _libc('malloc_trim')
    if trim:
        trim(0)

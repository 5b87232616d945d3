"""The machine's memory, and how malloc treats that of CPU tensors (on Linux; elsewhere, those
functions do nothing)."""

import contextlib
import ctypes
import os
import sys
from pathlib import Path

# The limit of a container, if there is one: control groups, versions 2 and 1.
LIMITS = ('/sys/fs/cgroup/memory.max', '/sys/fs/cgroup/memory/memory.limit_in_bytes')


def total_memory():
    """The bytes of memory of this machine, or of this container."""
    sizes = [sys.maxsize]
    with contextlib.suppress(AttributeError, OSError, ValueError):  # not on every system
        sizes.append(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'))
    for path in LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no such file, or no limit
            sizes.append(int(Path(path).read_text()))
    return min(sizes)


def libc_function(name):
    """A function of the C library, or None."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == 'linux' else None


def keep_freed_memory():
    """Make malloc keep freed memory.

    By default each training step returns its activations to the system. The page faults of the
    next step then take a tenth of its time.
    """
    mallopt = libc_function('mallopt')
    if mallopt:
        trim_threshold, mmap_threshold = -1, -3  # the M_ constants of malloc.h
        # An older glibc ignores a size that is too large for it.
        mallopt(mmap_threshold, 2**25)
        mallopt(mmap_threshold, 2**30)
        mallopt(trim_threshold, 2**31 - 1)


def release_freed_memory():
    """Return to the system the free memory that malloc holds."""
    malloc_trim = libc_function('malloc_trim')
    if malloc_trim:
        malloc_trim(0)

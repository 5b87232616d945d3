"""Shared by the tests of several processes: starting torchrun, waiting, finding its processes."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from conftest import start

DIGITS = ['--dataset', 'digits', '--depth', '10', '--device', 'cpu']


def torchrun(*arguments, nodes=('--standalone',), n=2, path=''):
    """A running torchrun, its processes with one thread each."""
    return start(
        *('-m', 'torch.distributed.run', *nodes, f'--nproc_per_node={n}', *arguments),
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(path)},
    )


def end(process, status=0, timeout=120):
    """Wait for a process to end with this status; returns what it printed."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()  # its workers notice, and end
        raise
    assert process.returncode == status, err
    return out + err


def until(condition, process, seconds=60):
    """Wait until condition() holds while the process runs."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


def processes_of(folder):
    """Ids of the training processes of a run, by rank."""
    processes = {}
    for entry in Path('/proc').glob('[0-9]*'):
        try:
            command = (entry / 'cmdline').read_bytes().split(b'\0')
            environment = (entry / 'environ').read_bytes().split(b'\0')
        except OSError:  # it has ended
            continue
        ranks = [int(line[5:]) for line in environment if line.startswith(b'RANK=')]
        if ranks and os.fsencode(folder) in command:
            processes[ranks[0]] = int(entry.name)
    return processes


needs_proc = pytest.mark.skipif(not os.path.isdir('/proc/self'), reason='finds processes in /proc')

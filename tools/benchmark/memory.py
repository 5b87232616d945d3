"""Memory of processes in MB, from Linux's /proc."""

from pathlib import Path


def resident_memory():
    """Memory that this process now has in RAM."""
    return read_field('self/status', 'VmRSS')


def peak_memory():
    """The largest resident memory since the start of this process or the last `reset_peak`."""
    return read_field('self/status', 'VmHWM')


def reset_peak():
    Path('/proc/self/clear_refs').write_text('5')


def proportional_memory(process):
    """Resident memory of a process (a pid, or 'self'), with its share of shared pages."""
    return read_field(f'{process}/smaps_rollup', 'Pss')


def read_field(file, field):
    for line in Path('/proc', file).read_text().splitlines():
        if line.startswith(f'{field}:'):
            return int(line.split()[1]) / 1024
    raise ValueError(f'/proc/{file} has no field {field}')

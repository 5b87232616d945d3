"""Tables of measurements, written as Markdown and, with all samples, as JSON."""

import json
import os
import platform
import statistics
from pathlib import Path

import torch

from lab.runs.provenance import versions

PACKAGES = ('torch', 'torchvision', 'numpy', 'opencv-python', 'pillow')
SPEED_COLUMNS = ['measurement', 'variant', 'median (quartiles)', 'ratio', 'goal']
RATIO_LEGEND = (
    "The ratio is the median of a group's first row divided by the median of this row, with a 95 % "
    'interval from a bootstrap of the rounds.'
)


def machine_facts():
    """The processor and the versions that every table names."""
    return {
        'cpu': processor_name(),
        'cores': os.cpu_count(),
        'torch threads': torch.get_num_threads(),
        'python': platform.python_version(),
        **versions(PACKAGES),
    }


def processor_name():
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith('model name'):
            return line.split(':')[1].strip()
    return platform.processor()


def spread(samples):
    """The median and the quartiles as text, in the unit of the samples."""
    low, middle, high = map(plain, statistics.quantiles(samples, n=4))
    return f'{middle} ({low} to {high})'


def plain(value):
    """A number with four digits, or more if it is large."""
    return f'{value:.0f}' if value >= 1000 else f'{value:.4g}'


def spread_in_milliseconds(seconds):
    return spread([1000 * value for value in seconds])


class Report:
    """The rows of a table, and `samples`: all measured values by the name of the measurement."""

    def __init__(self, title, columns, legend=''):
        self.title, self.columns, self.legend = title, columns, legend
        self.facts = machine_facts()
        self.rows, self.samples = [], {}
        self.failures = []  # of parts that could not be measured

    def add(self, *row):
        """Add a row and print it."""
        self.rows.append([str(cell) for cell in row])
        print('  '.join(self.rows[-1]), flush=True)

    def markdown(self):
        facts = ', '.join(f'{name} {value}' for name, value in self.facts.items())
        paragraphs = [f'# {self.title}', f'{facts}.']
        if self.legend:
            paragraphs.append(self.legend)
        header = ['| ' + ' | '.join(self.columns) + ' |', '|' + ' --- |' * len(self.columns)]
        rows = ['| ' + ' | '.join(row) + ' |' for row in self.rows]
        return '\n\n'.join([*paragraphs, '\n'.join([*header, *rows])]) + '\n'

    def write(self, out):
        """Write OUT.md and OUT.json."""
        content = {
            'facts': self.facts,
            'columns': self.columns,
            'rows': self.rows,
            'samples': self.samples,
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_suffix('.md').write_text(self.markdown())
        out.with_suffix('.json').write_text(json.dumps(content, indent=1) + '\n')

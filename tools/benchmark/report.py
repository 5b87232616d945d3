"""Tables of measurements, written as Markdown and, with all samples, as JSON."""

import json
import os
import platform
import re
import statistics
from pathlib import Path

import numpy as np
import torch

from lab.runs.provenance import versions

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ('torch', 'torchvision', 'numpy', 'opencv-python', 'pillow')
COLUMNS = ['measurement', 'variant', 'ms, median (quartiles)', 'ratio', 'images/s', 'MB']


class Report:
    """The rows of a table, and `samples`: all measured values by the name of the measurement."""

    def __init__(self, title, legend):
        self.title, self.legend = title, f'{legend} docs/performance.md explains the variants.'
        self.facts = {
            'cpu': processor_name(),
            'cores': os.cpu_count(),
            'torch threads': torch.get_num_threads(),
            'python': platform.python_version(),
            **versions(PACKAGES),
        }
        self.rows, self.samples = [], {}
        self.failures = []  # of parts that could not be measured

    def add(self, label, variant, times, ratio='', images=0, memory=None):
        """Add the row of a variant and its samples, and print the row.

        Args:
            times: a list of ms, or a text.
            images: how many were computed in each of these times.
            memory: MB.
        """
        rate = f'{1000 * images / statistics.median(times):.0f}' if images else ''
        if not isinstance(times, str):
            self.samples.setdefault(label, {})[variant] = times
            times = spread(times)
        memory = '' if memory is None else f'{memory:.0f}'
        self.rows.append([label, variant, times, ratio, rate, memory])
        print('  '.join(self.rows[-1]), flush=True)

    def markdown(self):
        facts = ', '.join(f'{name} {value}' for name, value in self.facts.items())
        rows = [COLUMNS, ['---'] * len(COLUMNS), *self.rows]
        table = '\n'.join('| ' + ' | '.join(row) + ' |' for row in rows)
        return f'# {self.title}\n\n{facts}.\n\n{self.legend}\n\n{table}\n'

    def write(self, out):
        """Write OUT.md and OUT.json."""
        content = {'facts': self.facts, 'columns': COLUMNS, 'rows': self.rows}
        content['samples'] = self.samples
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_suffix('.md').write_text(self.markdown())
        out.with_suffix('.json').write_text(json.dumps(content, indent=1) + '\n')


def processor_name():
    path = Path('/proc/cpuinfo')
    found = re.search(r'model name\s*: (.*)', path.read_text()) if path.exists() else None
    return found[1] if found else platform.processor()


def spread(samples):
    """The median and the quartiles as text."""
    if len(samples) == 1:
        return plain(samples[0])
    low, middle, high = map(plain, statistics.quantiles(samples, n=4))
    return f'{middle} ({low} to {high})'


def plain(value):
    """A number with four digits, or more if it is large."""
    return f'{value:.0f}' if value >= 1000 else f'{value:.4g}'


def ratio_of_medians(first, second):
    """The ratio, and its 95 % interval by a bootstrap of the rounds that measured both."""
    from scipy.stats import bootstrap

    def ratio(a, b, axis=-1):
        return np.median(a, axis) / np.median(b, axis)

    found = bootstrap((first, second), ratio, paired=True, method='percentile', random_state=0)
    return ratio(first, second), *found.confidence_interval

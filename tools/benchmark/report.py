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
COLUMNS = ['measurement', 'variant', 'median (quartiles)', 'ratio']
LEGEND = (
    "The ratio is the median of a group's first row divided by the median of this row, with a 95 % "
    'interval from a bootstrap of the rounds, unless its cell says otherwise. '
    'docs/performance.md explains the variants.'
)


class Report:
    """The rows of a table, and `samples`: all measured values by the name of the measurement."""

    def __init__(self, title, legend='', columns=COLUMNS):
        self.title, self.columns, self.legend = title, columns, legend
        self.facts = {
            'cpu': processor_name(),
            'cores': os.cpu_count(),
            'torch threads': torch.get_num_threads(),
            'python': platform.python_version(),
            **versions(PACKAGES),
        }
        self.rows, self.samples = [], {}
        self.failures = []  # of parts that could not be measured

    def add(self, *row):
        """Add a row and print it."""
        self.rows.append([str(cell) for cell in row])
        print('  '.join(self.rows[-1]), flush=True)

    def compare(self, label, samples):
        """Add a row for each variant in `samples`; the others are compared with the first.

        Args:
            label: names the measurement and its unit.
            samples: {variant: values, one per round}.
        """
        self.samples[label] = samples
        first = next(iter(samples.values()))
        for variant, values in samples.items():
            if values is first:
                self.add(label, variant, spread(values), '')
            elif len(values) == 1:
                self.add('', variant, spread(values), f'{first[0] / values[0]:.3f}')
            else:
                ratio, low, high = ratio_of_medians(first, values)
                self.add('', variant, spread(values), f'{ratio:.3f} ({low:.3f} to {high:.3f})')

    def markdown(self):
        facts = ', '.join(f'{name} {value}' for name, value in self.facts.items())
        rows = [self.columns, ['---'] * len(self.columns), *self.rows]
        table = '\n'.join('| ' + ' | '.join(row) + ' |' for row in rows)
        legend = f'{LEGEND} {self.legend}'.rstrip()
        return f'# {self.title}\n\n{facts}.\n\n{legend}\n\n{table}\n'

    def write(self, out):
        """Write OUT.md and OUT.json."""
        names = ('facts', 'columns', 'rows', 'samples')
        content = {name: getattr(self, name) for name in names}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_suffix('.md').write_text(self.markdown())
        out.with_suffix('.json').write_text(json.dumps(content, indent=1) + '\n')


def processor_name():
    path = Path('/proc/cpuinfo')
    found = re.search(r'model name\s*: (.*)', path.read_text()) if path.exists() else None
    return found[1] if found else platform.processor()


def spread(samples):
    """The median and the quartiles as text, in the unit of the samples."""
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

"""The runs of a study: their command lines, their folders, and what they have done."""

import os
import shlex
import sys
from itertools import product
from pathlib import Path

from lab.errors import OptionError, UserError
from lab.files import write_atomically
from lab.models.registry import flags
from lab.runs.checkpoint import FILE_NAME
from lab.runs.folder import COMMANDS, read_commands
from lab.runs.log import LOG, read_lines
from lab.training.options import CHANGEABLE_ON_RESUME, check_combination, complete, parse

ROOT = Path(__file__).resolve().parents[2]
FAILED = 'failed.txt'  # why a run diverged


def expand(options):
    """One dict for each combination of the elements of all values that are lists.

    epoch_step is an exception: its value for a single run is a list already.
    """
    choices = {
        name: value if isinstance(value, list) and name != 'epoch_step' else [value]
        for name, value in options.items()
        if name != 'seeds'
    }
    return [dict(zip(choices, values)) for values in product(*choices.values())]


class Run:
    """One training of a study: one row of its table with one seed.

    Raises:
        OptionError: train.py would not accept its options.
    """

    def __init__(self, study, row, seed, dataset, folder):
        self.row = {name: value for name, value in row.items() if name != 'reported'}
        self.reported = row.get('reported', '')
        self.seed, self.keep = seed, study.keep
        recipe = study.recipes.get(dataset, {})
        options = {'dataset': dataset, **study.options, **recipe, **self.row, 'seed': seed}
        try:
            self.options = parse(flags(options))  # converts types: YAML reads 1e-2 as text
            self.all_options = complete(self.options)
            check_combination(self.all_options)
        except OptionError as error:
            raise OptionError(f'{study.path}: {" ".join(flags(options))}: {error}') from None
        self.n_epochs = self.all_options['epochs']
        name = '-'.join(map(str, self.row.values())) or study.name
        name = name.replace('/', '_').replace('..', '_').replace(' ', '')
        self.folder = folder / name / f'seed{seed}'

    def log(self):
        """The epochs in its log so far."""
        path = self.folder / LOG
        if not os.path.exists(path):
            return []
        return [stats for _, stats in read_lines(path) if stats is not None]

    @property
    def failed(self):
        """Why it diverged; None if it did not."""
        path = self.folder / FAILED
        return path.read_text().strip() if path.exists() else None

    def started_with(self):
        """The options of its last start, which diverged before its log had an epoch."""
        _, _, *arguments = shlex.split(read_commands(self.folder / COMMANDS)[-1]['command'])
        return complete(parse(arguments))

    def is_done(self):
        """Whether it has diverged, or trained all its epochs.

        Raises:
            UserError: the run in its folder has other options.
        """
        log = self.log()
        epochs = log[-1]['epoch'] if log else 0
        stored = log[-1] if log else self.started_with() if self.failed else {}
        changed = [name for name in self.all_options if name not in CHANGEABLE_ON_RESUME]
        if epochs > self.n_epochs:  # fewer are resumed
            changed.insert(0, 'epochs')
        for name in changed:
            value = self.all_options[name]
            if stored.get(name, value) != value:
                is_default = name == 'epoch_step' and name not in self.options
                reason = f', the default for {self.n_epochs} epochs' if is_default else ''
                raise UserError(
                    f'{self.folder} was run with --{name} {stored[name]}, but the study has '
                    f'{value}{reason}: move the folder away, or change the study'
                )
        return bool(self.failed) or epochs >= self.n_epochs

    def next_stop(self):
        """The epoch to train to next: one whose checkpoint is kept, or the last."""
        done = len(self.log())
        return min([epoch for epoch in self.keep if epoch > done] + [self.n_epochs])

    def keep_checkpoint(self):
        """Copy the newest checkpoint if it is one to keep. Does nothing if that is done already."""
        done = len(self.log())
        kept = self.folder / f'epoch{done}.pt7'
        if done in self.keep and not kept.exists():
            write_atomically(kept, (self.folder / FILE_NAME).read_bytes())

    def command(self, device):
        """The command line that trains it to its next stop."""
        options = dict(self.options)
        if self.keep:
            options['epochs'] = self.next_stop()
            options['epoch_step'] = self.all_options['epoch_step']  # of all epochs
        if device:
            options['device'] = device
        is_inside = self.folder.is_relative_to(ROOT)
        options['save'] = self.folder.relative_to(ROOT) if is_inside else self.folder
        return [sys.executable, 'train.py', *flags(options), '--resume', 'auto']


def all_runs(study, seeds, dataset, folder):
    """All runs of a study, seed by seed. An element of `runs` may have fewer seeds than others.

    Raises:
        OptionError: train.py would not accept the options of a run.
        UserError: a seed is there twice, no run has an option of the table, or two runs would have
            the same row of the table or the same folder.
    """
    for seed in seeds:
        if seeds.count(seed) > 1:
            raise UserError(f'{study.path}: the seeds {seeds} have {seed} twice')
    rows = [(row, options.get('seeds', seeds)) for options in study.runs for row in expand(options)]
    runs = [
        Run(study, row, seed, dataset, folder)
        for seed in seeds
        for row, own_seeds in rows
        if seed in own_seeds
    ]
    for name in study.table:
        if not any(name in one.all_options for one in runs):
            raise UserError(f'{study.path}: its table has {name}, an option that no run has')
    by_place = {}
    for one in runs:
        cells = [one.all_options.get(name) for name in (*study.table, 'seed')]
        for place, value in (('row of the table', str(cells)), ('folder', str(one.folder))):
            other = by_place.setdefault((place, value), one)
            if other is not one:
                raise UserError(f'{study.path} has the same {place} twice: {other.row}; {one.row}')
    return runs

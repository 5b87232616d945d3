"""Checkpoints: what a run saves, and how to load it or any other file with a network.

A run's `model.pt7` is a dict with
    params         flat dict of the network's tensors, running statistics included
    epoch          number of finished epochs
    optimizer      state dict of the optimizer
    scaler         state of the loss scaling; empty unless --dtype half
    options        every option of the run
    network        the arguments that define the network: model, depth, width, dataset,
                   num_classes, in_channels, and the options that only this model has
    classes        names of the classes
    preprocessing  how an image becomes an input (lab.data.preprocessing.Preprocessing)
    ema            the moving averages of params, with --ema
    progress       position in the unfinished epoch, and what was measured in it, if there is one
    log            the lines of log.txt so far

The one before it is kept as `previous.pt7`, and loaded if the newest is missing or broken.
checkpoint_form.py checks the whole of a file when it is read.
"""

import io
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from diracnet import Network
from diracparams import DATASETS, TRAINED, copy_tensors, trained_path
from lab.errors import OptionError, UserError
from lab.files import write_atomically
from lab.models import registry
from lab.models.matching import differences, network_flags
from lab.runs.archive import BrokenFile, read_archive
from lab.runs.checkpoint_form import read_form

FILE_NAME, PREVIOUS = 'model.pt7', 'previous.pt7'
# What the networks in weights/ are called: as their files, or as their data sets.
TRAINED_NAMES = {
    name: dataset
    for dataset, files in TRAINED.items()
    for name in (files[0].split('-')[0], dataset)
}


def describe_position(epoch, progress):
    """Where in its training a run is, in words."""
    return f'step {progress["step"]} of epoch {epoch + 1}' if progress else f'epoch {epoch}'


@dataclass
class Checkpoint:
    """The content of a file. `params` is a flat dict of parameters, or a folded state dict."""

    path: Path
    params: dict
    folded: bool = False
    network: dict = None  # the arguments that define it
    classes: list = None
    preprocessing: dict = None
    options: dict = field(default_factory=dict)
    epoch: int = 0
    optimizer: dict = None
    scaler: dict = field(default_factory=dict)
    ema: dict = None
    progress: dict = None
    log: list = None

    @property
    def position(self):
        """Where in its training it was saved, in words."""
        return describe_position(self.epoch, self.progress)

    @property
    def is_run(self):
        """Whether train.py wrote it, so that its run can be resumed exactly."""
        return bool(self.optimizer and self.options)

    def averaged(self):
        """The checkpoint with the moving averages of --ema as its params. Raises UserError."""
        if not self.ema:
            raise UserError(f'{self.path} has no moving averages: it was trained without --ema')
        return replace(self, params=self.ema)

    @property
    def weights(self):
        """Which of its params these are, in a word."""
        return 'averaged' if self.ema and self.params is self.ema else 'raw'

    def module(self):
        """The network as a module in evaluation mode; a folded one as DiracNet.

        Raises:
            UserError: a folded tensor is not finite.
        """
        if self.folded:
            return self.fold()
        module = Network(*registry.define(**self.network)).to(self.dtype)
        copy_tensors(self.params, module)
        return module.eval()

    @property
    def dtype(self):
        """The type of all its tensors."""
        return self.params['fc.weight'].dtype

    def fold(self):
        """The folded module in evaluation mode. Raises UserError if the network does not fold."""
        model = self.network['model']
        if model not in registry.FOLDABLE:
            raise UserError(
                f'{self.path} cannot be folded: it is from --model {model}, and only '
                f'{", ".join(registry.FOLDABLE)} fold'
            )
        folded = self.params if self.folded else registry.fold(model, self.params)
        for key, tensor in folded.items():
            if not tensor.isfinite().all():
                raise UserError(
                    f'{self.path} cannot be folded: {key} overflows the type {tensor.dtype}'
                )
        return registry.folded_module(model, folded)

    def network_options(self, given):
        """The options model, depth, width, dataset, ... of its network.

        A bare state dict fits every data set with its form, channels and classes; `given` may
        choose among them.

        Raises:
            OptionError: an option in `given` contradicts the network.
        """
        network = {**registry.own_options(self.network['model']), **self.network}
        dataset = given.get('dataset', network['dataset'])
        if not self.preprocessing and DATASETS[dataset] == DATASETS[network['dataset']]:
            network['dataset'] = dataset
        names = registry.network_option_names(network['model'])
        for name in names:
            if given.get(name, network[name]) != network[name]:
                wanted = {**network, **{key: given[key] for key in names if key in given}}
                raise OptionError(
                    f'--{name} is {given[name]}, but {self.path} has {network[name]}'
                    f'{self._describe_mismatch(wanted)}'
                )
        return {name: network[name] for name in names}

    def _describe_mismatch(self, wanted):
        """How the tensors differ from those of another network, and the flags that fit them."""
        fitting = f'; {network_flags(self.network)} fits'
        if wanted['dataset'] != self.network['dataset']:
            _, in_channels, num_classes = DATASETS[wanted['dataset']]
            num_classes = num_classes or wanted['num_classes']
            wanted = {**wanted, 'in_channels': in_channels, 'num_classes': num_classes}
        if wanted['model'] != self.network['model']:
            own = registry.own_options(self.network['model'])
            wanted = {name: value for name, value in wanted.items() if name not in own}
        if any(wanted[name] > 10 * self.network[name] for name in ('depth', 'width')):
            return fitting  # not worth the time
        try:
            expected = registry.shapes(**wanted)
            if self.folded:
                expected = registry.fold(wanted['model'], expected)
        except ValueError:  # the other network does not exist, or does not fold
            return fitting
        differing = differences(self.params, expected)
        return f': {"; ".join(differing[:3])}{fitting}' if differing else fitting


# --- loading ---------------------------------------------------------------------------------


def load(path):
    """Read a run folder, its model.pt7, or a file with a folded or unfolded state dict; or, if
    there is none of this name, the trained network called digits or fashion.

    If a run's newest checkpoint is missing or broken, the previous one is read, with a warning on
    stderr.

    Raises:
        UserError: the file is missing, broken, not a checkpoint, or could run code.
    """
    path = Path(os.path.expanduser(path))
    if str(path) in TRAINED_NAMES and not path.exists():
        path = _find_trained(TRAINED_NAMES[str(path)])
    if os.path.isdir(path):
        path = path / FILE_NAME
    previous = path.with_name(PREVIOUS)
    if path.name != FILE_NAME or not os.path.exists(previous):
        return load_file(path)
    try:
        return load_file(path)
    except BrokenFile as error:
        try:
            found = load_file(previous)
        except UserError as other:
            raise UserError(f'{error}; and {other}') from None
        print(f'{error}; using {previous}, saved after {found.position}', file=sys.stderr)
        return found


def _find_trained(dataset):
    try:
        return Path(trained_path(dataset))
    except RuntimeError as error:
        raise UserError(str(error)) from None


def load_file(path):
    """The Checkpoint in one file. Raises UserError."""
    path = Path(path)
    content = read_archive(path)
    try:
        return Checkpoint(path, **read_form(content))
    except ValueError as error:
        raise UserError(f'{path} is not a sound checkpoint: {error}') from None


# --- saving ----------------------------------------------------------------------------------


def save(path, content, keep_previous=True):
    """Write a checkpoint, and keep the existing one as previous.pt7.

    Raises:
        OSError: both files are unchanged.
    """
    # torch.save's own writer would turn the OSError of a full disk into other exceptions.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    previous = Path(path).with_name(PREVIOUS) if keep_previous else None
    write_atomically(path, buffer.getbuffer(), previous)

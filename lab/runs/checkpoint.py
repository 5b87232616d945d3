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
    progress       position in the unfinished epoch, and what was measured in it, if there is one
    log            the lines of log.txt so far

The one before it is kept as `previous.pt7`, and loaded if the newest is missing or broken.
"""

import io
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from diracnet import DATASETS, Network
from lab.data.preprocessing import Preprocessing
from lab.errors import OptionError, UserError
from lab.files import write_atomically
from lab.models import registry
from lab.models.matching import differences, load_params, network_flags
from lab.runs.archive import BrokenFile, read_archive

FILE_NAME, PREVIOUS = 'model.pt7', 'previous.pt7'


def describe_position(epoch, progress):
    """Where in its training a run is, in words."""
    return f'step {progress["step"]} of epoch {epoch + 1}' if progress else f'epoch {epoch}'


@dataclass
class Checkpoint:
    """The content of a file. `params` is a flat dict of parameters, or a folded state dict."""

    path: Path
    params: dict
    folded: bool = False
    network: dict = None  # the arguments that define it; None if they are unknown
    classes: list = None
    preprocessing: dict = None
    options: dict = field(default_factory=dict)
    epoch: int = 0
    optimizer: dict = None
    scaler: dict = field(default_factory=dict)
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

    def module(self):
        """The network as a module in evaluation mode; a folded one as DiracNet.

        Raises:
            UserError: the tensors do not fit a known network.
        """
        try:
            if self.folded:
                return self.fold()
            module = Network(*registry.define(**self.network))
            load_params(module, self.params, self.path)
            return module.eval()
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise UserError(f'{self.path} has no known network: {error}') from None

    def fold(self):
        """The folded module in evaluation mode. Raises UserError if the network does not fold."""
        model = self.network['model'] if self.network else 'diracnet'
        if model not in registry.FOLDABLE:
            raise UserError(
                f'{self.path} cannot be folded: it is from --model {model}, and only '
                f'{", ".join(registry.FOLDABLE)} fold'
            )
        try:
            state_dict = self.params if self.folded else registry.fold(model, self.params)
            return registry.folded_module(model, state_dict)
        except ValueError as error:
            raise UserError(f'{self.path} cannot be folded: {error}') from None

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
        try:
            expected = registry.define(**wanted)[1]
            if self.folded:
                expected = registry.fold(wanted['model'], expected)
        except ValueError:  # the other network does not exist, or does not fold
            return fitting
        differing = differences(self.params, expected)
        return f': {"; ".join(differing[:3])}{fitting}' if differing else fitting


# --- loading ---------------------------------------------------------------------------------


def load(path):
    """Read a run folder, its model.pt7, or a file with a folded or unfolded state dict.

    If a run's newest checkpoint is missing or broken, the previous one is read, with a warning on
    stderr.

    Raises:
        UserError: the file is missing, broken, not a checkpoint, or could run code.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        path = path / FILE_NAME
    previous = path.with_name(PREVIOUS)
    if path.name != FILE_NAME or not previous.exists():
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


def load_file(path):
    """The Checkpoint in one file. Raises UserError."""
    return parse(read_archive(path), Path(path))


def parse(content, path):
    """The Checkpoint that the content of a file describes. Raises UserError if it is not one."""
    if not isinstance(content, dict):
        raise UserError(f'{path} is not a checkpoint: it holds a {type(content).__name__}')
    facts = {name: content[name] for name in CHECKS if content.get(name) is not None}
    for name, value in facts.items():
        if not CHECKS[name](value):
            raise UserError(f'{path} is not a checkpoint: its {name} is invalid')
    if not all(isinstance(key, str) for key in content):
        raise UserError(f'{path} is not a checkpoint: its keys must be strings')
    params = _find_params(content)
    if not params or not _is_state_dict(params):
        raise UserError(f'{path} is not a checkpoint: it has no state dict of tensors')
    params = {key: tensor for key, tensor in params.items() if _is_used(key)}
    folded = any(key.startswith('features.') for key in params)
    folded = folded or 'group0.block0.conv.weight' in params
    if 'network' not in facts:
        facts['network'] = registry.infer(params)
    return Checkpoint(path, params, folded, **facts)


def _find_params(content):
    """The tensors: a dict in the file, or the file itself."""
    params = content
    for name in ('params', 'state_dict'):
        if isinstance(content.get(name), dict):
            params = content[name]
            if isinstance(content.get('stats'), dict):  # running statistics of published files
                params = {**params, **content['stats']}
    return params


def _is_state_dict(params):
    return all(
        isinstance(key, str) and isinstance(tensor, torch.Tensor) for key, tensor in params.items()
    )


def _is_used(key):
    """Whether a tensor is needed here. The original's files also store identities, under names such
    as eye64_64_3_3, and torchvision's files count batches."""
    return not key.startswith('eye') and not key.endswith('.num_batches_tracked')


def _is_network(value):
    numbers = ('depth', 'width', 'num_classes', 'in_channels')
    return (
        isinstance(value, dict)
        and value.get('model') in registry.MODELS
        and value.get('dataset') in DATASETS
        and all(isinstance(value.get(name), (int, float)) for name in numbers)
    )


def _is_preprocessing(value):
    try:
        return bool(Preprocessing.from_dict(value))
    except (TypeError, KeyError, ValueError):
        return False


def _is_progress(value):
    types = {'step': int, 'tally': dict, 'time': float, 'broken': dict}
    return isinstance(value, dict) and all(
        type(value.get(name)) is kind for name, kind in types.items()
    )


def _is_text_list(value):
    return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)


def _is_count(value):
    return isinstance(value, int) and value >= 0


def _is_dict(value):
    return isinstance(value, dict)


CHECKS = {
    'network': _is_network,
    'classes': _is_text_list,
    'preprocessing': _is_preprocessing,
    'options': _is_dict,
    'epoch': _is_count,
    'optimizer': _is_dict,
    'scaler': _is_dict,
    'progress': _is_progress,
    'log': _is_text_list,
}


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

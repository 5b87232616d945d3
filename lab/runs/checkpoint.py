"""Checkpoints: what a run saves, and what of the kind can be loaded. Loading never runs code from a file.

A run's `model.pt7` is a dict of
    params         flat dict of the network's tensors, running statistics included
    epoch          finished epochs
    optimizer      state dict of the optimizer
    scaler         state of the loss scaling (empty unless --dtype half)
    options        every option of the run
    network        model, depth, width, dataset, num_classes, in_channels: the arguments that define it
    classes        names of the classes
    preprocessing  what turns an image file into its input (data.Preprocessing)
    progress       how far the epoch after those is, and what was measured in it; None between epochs
    log            the lines of log.txt so far

The one before it is kept as `previous.pt7`, and used where the newest is broken.
"""

import io
import os
import pickle
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from zipfile import ZIP_STORED, BadZipFile, ZipFile, is_zipfile

import torch

from lab.models import registry
from lab.models import registry as resnet
from diracnet import DATASETS, DiracNet, Network, fold
from lab.models.diracnet_v1 import DiracNetV1, fold_v1
from lab.errors import OptionError, UserError
from lab.files import write_atomically
from lab.data.preprocessing import Preprocessing

FILE_NAME, PREVIOUS = 'model.pt7', 'previous.pt7'


class BrokenFile(UserError):
    """A file that is not what was written."""


def place(epoch, progress):
    """In words: behind so many epochs, and a part of the next."""
    return f'step {progress["step"]} of epoch {epoch + 1}' if progress else f'epoch {epoch}'


@dataclass
class Checkpoint:
    """What a file held. `params` are a network's flat tensors, or where `folded` a folded state dict."""

    path: Path
    params: dict
    folded: bool = False
    network: dict = None  # arguments of its definition; None where the file doesn't tell
    classes: list = None
    preprocessing: dict = None
    options: dict = field(default_factory=dict)
    epoch: int = 0
    optimizer: dict = None
    scaler: dict = field(default_factory=dict)
    progress: dict = None
    log: list = None

    @property
    def place(self):
        """Where in its training it was saved, in words."""
        return place(self.epoch, self.progress)

    @property
    def is_run(self):
        """Whether train.py wrote it, so that its run can go on as if it had not been stopped."""
        return bool(self.optimizer and self.options)

    def network_options(self, given):
        """model, depth, width and dataset of its network, which those of `given` must not contradict (OptionError).

        A bare state dict fits every data set of its form, channels and classes: there `given` may choose.
        """
        network = dict(self.network)
        if (
            not self.preprocessing
            and DATASETS[given.get('dataset', 'CIFAR10')] == DATASETS[network['dataset']]
        ):
            network['dataset'] = given.get('dataset', network['dataset'])
        names = ('model', 'depth', 'width', 'dataset', *resnet.OPTIONS.get(network['model'], ()))
        network = {**resnet.OPTIONS.get(network['model'], {}), **network}
        for name in names:
            if given.get(name, network[name]) != network[name]:
                raise OptionError(
                    f'--{name} is {given[name]}, but {self.path} is of {network[name]}'
                    + self._misfits(
                        {**network, **{name: given[name] for name in names if name in given}}
                    )
                )
        return {name: network[name] for name in names}

    def _misfits(self, network):
        """What tells this file's tensors from those of another network: the first keys, their shapes, the flags that fit."""
        form, in_channels, num_classes = DATASETS[network['dataset']]
        if network['dataset'] != self.network['dataset']:
            network.update(
                in_channels=in_channels, num_classes=num_classes or network['num_classes']
            )
        try:
            if network['model'] != self.network['model']:
                network = {
                    name: value
                    for name, value in network.items()
                    if name not in ('block', 'dropout')
                }
            expected = resnet.define(**network)[1]
            if self.folded:
                expected = (fold_v1 if network['model'] in resnet.VERSION_1 else fold)(expected)
        except ValueError:  # there is no such network at all
            return f'; {flags(self.network)} fits'
        differing = differences(self.params, expected)
        return (
            ': ' + '; '.join(differing[:3]) if differing else ''
        ) + f'; {flags(self.network)} fits'

    def module(self):
        """The network as a module in evaluation mode; folded ones as DiracNet. Raises UserError for tensors that don't fit."""
        try:
            if self.folded:
                return self.fold()
            module = Network(*resnet.define(**self.network))
            load_params(module, self.params, self.path)
            return module.eval()
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise UserError(f'{self.path} holds no network that is known here: {error}') from None

    def fold(self):
        """The folded module in evaluation mode. Raises UserError for a network that doesn't fold."""
        if self.network and self.network['model'] not in resnet.CHAINS + resnet.VERSION_1:
            raise UserError(
                f'{self.path} can not be folded: it is of --model {self.network["model"]}, and only {", ".join(resnet.CHAINS + resnet.VERSION_1)} fold'
            )
        try:
            if self.network and self.network['model'] in resnet.VERSION_1:
                return DiracNetV1.from_state_dict(
                    self.params if self.folded else fold_v1(self.params)
                ).eval()
            return DiracNet.from_state_dict(
                self.params if self.folded else fold(self.params)
            ).eval()
        except ValueError as error:
            raise UserError(f'{self.path} can not be folded: {error}') from None


def differences(theirs, ours):
    """Lines of key and both shapes, for each key at which two dicts of tensors don't fit."""
    shapes = [
        {key: tuple(tensor.shape) for key, tensor in params.items()} for params in (theirs, ours)
    ]
    return [
        f'{key} is {" there and ".join(str(part.get(key, "missing")) for part in shapes)} in the network'
        for key in dict.fromkeys([*ours, *theirs])
        if shapes[0].get(key) != shapes[1].get(key)
    ]


def flags(network):
    """The options that define a network."""
    return ' '.join(
        f'--{name} {network[name]:g}' if name == 'width' else f'--{name} {network[name]}'
        for name in (
            'model',
            'depth',
            'width',
            'dataset',
            *resnet.OPTIONS.get(network['model'], ()),
        )
        if name in network
    )


def load_params(module, params, path):
    """Load params into a module. Raises UserError that names the first keys that don't fit, both shapes, and what would fit."""
    differing = differences(params, module.state_dict())
    if differing:
        fitting = registry.infer(params)
        raise UserError(
            f'{path} is of another architecture: {"; ".join(differing[:3])}'
            + (f' (and {len(differing) - 3} more)' if differing[3:] else '')
            + (f'; its tensors fit {flags(fitting)}' if fitting else '')
        )
    module.load_state_dict(params)


def load(path):
    """Read a run's folder, its model.pt7, or the file of a folded or unfolded state dict (also PyTorch's old format).

    A run's newest checkpoint that is broken, or was never put in place, gives way to the one before it, with a line on stderr.

    Raises:
        UserError: a file that is missing, broken, no checkpoint, or holds code.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        path = path / FILE_NAME
    previous = path.with_name(PREVIOUS)
    if path.name != FILE_NAME or not previous.exists():
        return _load(path)
    try:
        return _load(path)
    except BrokenFile as error:
        try:
            found = _load(previous)
        except UserError as other:
            raise UserError(f'{error}; and {other}') from None
        print(f'{error}; {previous} is used, which was saved after {found.place}', file=sys.stderr)
        return found


def _load(path):
    try:
        with open(path, 'rb') as file:
            if is_zipfile(file):
                _check_sums(file, path)
            file.seek(0)
            content = torch.load(file, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise BrokenFile(
            f"{path} does not exist; give a run's folder, its {FILE_NAME} or a state dict"
        ) from None
    except UserError:
        raise
    except OSError as error:  # of a cut archive, too: an offset before its beginning
        raise BrokenFile(f'{path} can not be read ({error.strerror})') from None
    except pickle.UnpicklingError as error:
        if re.search('GLOBAL |Can only (create|build)|unrecognized function', str(error)):
            raise UserError(
                f'{path} is refused: it holds more than tensors and plain values, so loading it could run code'
            ) from None
        raise BrokenFile(f'{path} is no checkpoint of PyTorch, or a broken one') from None
    except Exception as error:  # torch raises many kinds for a file that is cut or of random bytes
        raise BrokenFile(
            f'{path} is truncated or broken, or no checkpoint of PyTorch ({type(error).__name__})'
        ) from None
    return _understand(path, content)


def _check_sums(file, path):
    """See that a zip archive is what torch.save wrote, by its checksums, which torch.load doesn't look at. Raises BrokenFile."""
    try:
        with ZipFile(file) as archive:
            entries = archive.infolist()
            # torch.save compresses nothing: what claims to unpack to more than the file has is not its work.
            if (
                any(entry.compress_type != ZIP_STORED for entry in entries)
                or sum(entry.file_size for entry in entries) > os.fstat(file.fileno()).st_size
            ):
                raise BrokenFile(
                    f'{path} is an archive, but no checkpoint of PyTorch: it is compressed'
                )
            wrong = archive.testzip()
    except (BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError) as error:
        raise BrokenFile(
            f'{path} is truncated or broken ({" ".join(str(error).split())})'
        ) from None
    if wrong:
        raise BrokenFile(f'{path} is broken: the checksum of its part {wrong} is wrong')


def _is_network(value):
    return (
        isinstance(value, dict)
        and value.get('model') in resnet.MODELS
        and value.get('dataset') in DATASETS
        and all(
            isinstance(value.get(name), (int, float))
            for name in ('depth', 'width', 'num_classes', 'in_channels')
        )
    )


def _is_preprocessing(value):
    try:
        return bool(Preprocessing.from_dict(value))
    except (TypeError, KeyError, ValueError):
        return False


def _is_progress(value):
    return isinstance(value, dict) and [
        type(value.get(name)) for name in ('step', 'tally', 'time', 'broken')
    ] == [int, dict, float, dict]


def _is_text_list(value):
    return isinstance(value, (list, tuple)) and all(isinstance(one, str) for one in value)


_PARTS = {
    'network': _is_network,
    'classes': _is_text_list,
    'preprocessing': _is_preprocessing,
    'options': lambda value: isinstance(value, dict),
    'epoch': lambda value: isinstance(value, int) and value >= 0,
    'optimizer': lambda value: isinstance(value, dict),
    'scaler': lambda value: isinstance(value, dict),
    'progress': _is_progress,
    'log': _is_text_list,
}


def _understand(path, content):
    if not isinstance(content, dict):
        raise UserError(f'{path} is no checkpoint: it holds a {type(content).__name__}')
    facts = {
        name: content[name]
        for name in (
            'network',
            'classes',
            'preprocessing',
            'options',
            'epoch',
            'optimizer',
            'scaler',
            'progress',
            'log',
        )
        if content.get(name) is not None
    }
    wrong = next((name for name, value in facts.items() if not _PARTS[name](value)), None)
    if wrong or not all(isinstance(key, str) for key in content):
        raise UserError(f'{path} is no checkpoint: its {wrong or "keys"} can not be used')
    tensors = content
    for name in ('params', 'state_dict'):
        if isinstance(content.get(name), dict):
            stats = content.get('stats')
            tensors = {
                **content[name],
                **(stats if isinstance(stats, dict) else {}),
            }  # published files keep the running statistics apart
    if not tensors or not all(
        isinstance(key, str) and isinstance(tensor, torch.Tensor) for key, tensor in tensors.items()
    ):
        raise UserError(f'{path} is no checkpoint: it has no state dict of tensors')
    # The original's files keep the identities, which ours imply, under names like eye64_64_3_3.
    # torchvision's count batches, which nothing here reads.
    params = {
        key: tensor
        for key, tensor in tensors.items()
        if not key.startswith('eye') and not key.endswith('.num_batches_tracked')
    }
    folded = (
        any(key.startswith('features.') for key in params) or 'group0.block0.conv.weight' in params
    )
    if 'network' not in facts:
        facts['network'] = registry.infer(params)
    return Checkpoint(path, params, folded, **facts)


def save(path, content, keep=True):
    """Write a checkpoint, and keep the one before it unless `keep` is False. Raises OSError, with both as they were."""
    buffer = io.BytesIO()  # torch.save's own writer turns a full disk's OSError into others
    torch.save(content, buffer)
    write_atomically(path, buffer.getbuffer(), Path(path).with_name(PREVIOUS) if keep else None)

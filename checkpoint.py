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
"""
import os
import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch

from diracnet import DATASETS, DiracNet, Network, fold, layout_of
from errors import OptionError, UserError
from resnet import MODELS

FILE_NAME = 'model.pt7'


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

    @property
    def is_run(self):
        """Whether train.py wrote it, so that its run can go on as if it had not been stopped."""
        return bool(self.optimizer and self.options)

    def network_options(self, given):
        """model, depth, width and dataset of its network, which those of `given` must not contradict (OptionError).

        A bare state dict fits every data set of its form, channels and classes: there `given` may choose.
        """
        network = dict(self.network)
        if not self.preprocessing and DATASETS[given.get('dataset', 'CIFAR10')] == DATASETS[network['dataset']]:
            network['dataset'] = given.get('dataset', network['dataset'])
        for name in ('model', 'depth', 'width', 'dataset'):
            if given.get(name, network[name]) != network[name]:
                raise OptionError(f'--{name} is {given[name]}, but {self.path} is of {network[name]}')
        return {name: network[name] for name in ('model', 'depth', 'width', 'dataset')}

    def module(self):
        """The network as a module in evaluation mode; folded ones as DiracNet. Raises UserError for tensors that don't fit."""
        try:
            if self.folded:
                return DiracNet.from_state_dict(self.params).eval()
            arguments = dict(self.network)
            module = Network(*MODELS[arguments.pop('model')](**arguments))
            load_params(module, self.params, self.path)
            return module.eval()
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f'{self.path} holds no network that is known here: {error}') from None

    def fold(self):
        """The folded module in evaluation mode."""
        try:
            return DiracNet.from_state_dict(self.params if self.folded else fold(self.params)).eval()
        except ValueError as error:
            raise UserError(f'{self.path} can not be folded: {error}') from None


def load_params(module, params, path):
    """Load params into a module. Raises UserError that names the first key that doesn't fit, and both shapes."""
    own = module.state_dict()
    for key in [*own, *params]:
        ours, theirs = own.get(key), params.get(key)
        if ours is None or theirs is None or ours.shape != theirs.shape:
            shapes = [tuple(tensor.shape) if tensor is not None else 'missing' for tensor in (theirs, ours)]
            raise UserError(f'{path} is of another architecture: {key} is {shapes[0]} there and {shapes[1]} in the network')
    module.load_state_dict(params)


def load(path):
    """Read a run's folder, its model.pt7, or the file of a folded or unfolded state dict (also PyTorch's old format).

    Raises:
        UserError: a file that is missing, broken, no checkpoint, or holds code.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        path = path / FILE_NAME
    try:
        content = torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give a run's folder, its {FILE_NAME} or a state dict") from None
    except OSError as error:
        raise UserError(f'{path} can not be read ({error.strerror})') from None
    except pickle.UnpicklingError as error:
        if re.search('GLOBAL |Can only (create|build)|unrecognized function', str(error)):
            raise UserError(f'{path} is refused: it holds more than tensors and plain values, so loading it could run code') from None
        raise UserError(f'{path} is no checkpoint of PyTorch, or a broken one') from None
    except Exception as error:  # torch raises many kinds for a file that is cut or of random bytes
        raise UserError(f'{path} is truncated or broken, or no checkpoint of PyTorch ({type(error).__name__})') from None
    return _understand(path, content)


def _understand(path, content):
    if not isinstance(content, dict):
        raise UserError(f'{path} is no checkpoint: it holds a {type(content).__name__}')
    facts = {name: content[name] for name in ('network', 'classes', 'preprocessing', 'options', 'epoch', 'optimizer', 'scaler')
             if content.get(name) is not None}
    tensors = content
    for name in ('params', 'state_dict'):
        if isinstance(content.get(name), dict):
            tensors = {**content[name], **content.get('stats', {})}  # published files keep the running statistics apart
    if not tensors or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise UserError(f'{path} is no checkpoint: it has no state dict of tensors')
    # The original's files keep the identities, which ours imply, under names like eye64_64_3_3.
    params = {key: tensor for key, tensor in tensors.items() if not key.startswith('eye')}
    folded = any(key.startswith('features.') for key in params)
    if 'network' not in facts:
        facts['network'] = _infer(params)
    return Checkpoint(path, params, folded, **facts)


def _infer(params):
    """The network's definition from tensors alone, as far as they tell: a CIFAR form fits several data sets."""
    try:
        layout = layout_of(params)
    except ValueError:
        return None
    fitting = [name for name, facts in DATASETS.items() if facts == (layout.form, layout.in_channels, layout.num_classes)]
    dataset = fitting[0] if fitting else 'ImageNet' if layout.form == 'imagenet' else 'CIFAR10'
    model = 'diracnet' if any(key.endswith('.alpha') for key in params) else 'plain'
    return {'model': model, 'depth': layout.depth, 'width': layout.width, 'dataset': dataset,
            'num_classes': layout.num_classes, 'in_channels': layout.in_channels}


def save(path, content):
    """Write a checkpoint whole or not at all: to a temporary file beside it, flushed to the disk, then renamed."""
    path = Path(path)
    temporary = path.with_name(path.name + '.tmp')
    with open(temporary, 'wb') as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)

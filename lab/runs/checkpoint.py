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

Two other kinds of files load, too:

    an export   state_dict, network, classes and preprocessing: a .pth of tools.export
    a bare one  tensors, alone or under a name in CONTAINERS, as torch.save or safetensors wrote
                them; published files have the running statistics under `stats`. The network is
                recognized by its tensors.

Reading a file checks its tensors. What else it holds is checked where it is used, see `refusing`.
"""

import contextlib
import io
import os
import re
import sys
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path

import torch

from diracnet import Network
from diracparams import DATASETS, TRAINED, copy_tensors, trained_path
from lab.data.preprocessing import Preprocessing
from lab.errors import OptionError, UserError, is_out_of_memory
from lab.files import write_atomically
from lab.models import registry
from lab.runs.archive import BrokenFile, read_archive

FILE_NAME, PREVIOUS = 'model.pt7', 'previous.pt7'
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
HALVES = {torch.float16, torch.bfloat16}
# Under which names people save the tensors of a network, or, if there are none of these, its moving
# averages.
CONTAINERS = ('params', 'state_dict', 'model_state_dict', 'model', 'net', 'module')
AVERAGES = ('ema', 'model_ema', 'state_dict_ema', 'ema_state_dict')
# What other code adds: identities of the original's files (eye64_64_3_3), torchvision's counts of
# batches, AveragedModel's count of averages.
ADDED = re.compile(r'eye.*|(.*\.)?(num_batches_tracked|n_averaged)')
# What the networks in weights/ are called: as their files, or as their data sets.
TRAINED_NAMES = {
    name: dataset for dataset, file in TRAINED.items() for name in (file.split('-')[0], dataset)
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
            raise UserError(f'{self.path} has no moving averages that train.py --ema wrote')
        return replace(self, params=self.ema)

    @property
    def weights(self):
        """Which of its params these are, in a word."""
        return 'averaged' if self.ema and self.params is self.ema else 'raw'

    def module(self):
        """The network as a module in evaluation mode; a folded one as `fold` returns it."""
        if self.folded:
            return self.fold()
        module = Network(*registry.define(**self.network)).to(self.dtype)
        copy_tensors(self.params, module)
        return module.eval()

    @property
    def dtype(self):
        """The type of all its tensors."""
        return next(iter(self.params.values())).dtype

    def fold(self):
        """The folded module in evaluation mode. Raises UserError if the network does not fold, or
        if a folded tensor is not finite."""
        model, reason = self.network['model'], registry.why_unfoldable(self.network)
        if reason:
            raise UserError(f'{self.path} cannot be folded: {reason}')
        # The products of a fold need the precision of floats.
        dtype = torch.promote_types(self.dtype, torch.float)
        params = {key: tensor.to(dtype) for key, tensor in self.params.items()}
        folded = params if self.folded else registry.fold(model, params)
        for key, tensor in folded.items():
            if not tensor.isfinite().all():
                raise UserError(
                    f'{self.path} cannot be folded: {key} overflows the type {tensor.dtype}'
                )
        return registry.folded_module(model, folded)

    def network_options(self, cli_options):
        """The options model, depth, width, dataset, ... of its network. Raises OptionError if one
        in `cli_options` contradicts them.

        A bare state dict fits every data set with its form, channels and classes, and a folder of
        images in both forms; `cli_options` may choose among them.
        """
        network = {**registry.own_options(self.network['model']), **self.network}
        fits = f'{network_flags(self.network)} fits'
        if not self.preprocessing:
            network['dataset'] = cli_options.get('dataset', network['dataset'])
            if wrong := registry.misfit(network, network['dataset']):
                raise OptionError(f'{self.path} {wrong}; {fits}')
        names = registry.network_option_names(network['model'])
        for name in names:
            if cli_options.get(name, network[name]) != network[name]:
                raise OptionError(
                    f'--{name} is {cli_options[name]}, but {self.path} has {network[name]}; {fits}'
                )
        return {name: network[name] for name in names}


def network_flags(network):
    """The options of train.py that define a network, as on a command line."""
    if DATASETS[network['dataset']][2] not in (None, network['num_classes']):
        network = {**network, 'dataset': 'folder'}  # the recognized one has other classes
    names = [name for name in registry.network_option_names(network['model']) if name in network]
    if network['dataset'] != 'folder':
        names.remove('form')  # the data set determines it
    return ' '.join(registry.flags({name: network[name] for name in names}))


# --- loading ---------------------------------------------------------------------------------


def load(path):
    """Read a run folder, its model.pt7, or a file with a folded or unfolded state dict; or, if
    there is none of this name, the trained network called digits or fashion.

    If a run's newest checkpoint is missing or broken, the previous one is read, with a warning on
    stderr. Raises UserError if the file is missing, broken, not a checkpoint, or could run code.
    """
    path = Path(os.path.expanduser(path))
    if str(path) in TRAINED_NAMES and not path.exists():
        path = Path(trained_path(TRAINED_NAMES[str(path)]))
    if os.path.isdir(path):
        path = path / FILE_NAME
    try:
        return load_file(path)
    except BrokenFile as error:
        previous = path.with_name(PREVIOUS)
        if path.name != FILE_NAME or not os.path.exists(previous):
            raise
        try:
            checkpoint = load_file(previous)
        except UserError as other:
            raise UserError(f'{error}; and {other}') from None
        print(f'{error}; using {previous}, saved after {checkpoint.position}', file=sys.stderr)
        return checkpoint


def load_file(path):
    """The Checkpoint in one file. Raises UserError."""
    content = read_archive(path)
    with refusing(path):
        return Checkpoint(path, **_read_fields(content))


@contextlib.contextmanager
def refusing(path):
    """Use what a file holds: where it does not fit, a UserError names the file."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as e:
        if is_out_of_memory(e):
            raise
        reason = str(e).partition('\n')[0]
        if not isinstance(e, ValueError):
            reason = f'{type(e).__name__}: {reason}'
        raise UserError(f'{path} is not a sound checkpoint: {reason}') from None


def _read_fields(content):
    """The fields of a Checkpoint in the content of a file. Raises what `refusing` catches."""
    if not isinstance(content, dict):
        raise ValueError(f'it holds a {type(content).__name__}')
    params = _read_params(content)
    names = ('classes', 'preprocessing', 'epoch')
    if 'network' in content:
        names += ('options', 'optimizer', 'scaler', 'ema', 'progress', 'log')
        network, folded = _read_network(content['network'], params)
    else:
        network, folded = registry.recognize(params), registry.is_folded(params)
    fields = {name: content[name] for name in names if content.get(name) is not None}
    fields['epoch'] = int(fields.get('epoch', 0))
    fields['options'] = dict(fields.get('options', {}))
    check_metadata(network, fields.get('classes'), fields.get('preprocessing'))
    if 'ema' in fields:
        fields['ema'] = _sound_tensors(fields['ema'])
        registry.check_shapes(fields['ema'], params)
    return {**fields, 'params': params, 'folded': folded, 'network': network}


def _read_params(content):
    """The tensors of the network, by their names in it, without what other code adds."""
    found = _state_dicts(content)
    if len(found) > 1:
        raise ValueError('it holds more than one network: save a file with one of them')
    statistics = content.get('stats', {}) if 'params' in content else {}
    tensors = {**(found[0] if found else {}), **statistics}
    tensors = {key: tensor for key, tensor in tensors.items() if not ADDED.fullmatch(key)}
    if not tensors:
        raise ValueError(f'it holds no tensors, alone or under {", ".join(CONTAINERS)}')
    # What wraps a network puts a name before all keys: module., _orig_mod., model. The keys of a
    # network alone share no beginning: it has a conv and an fc.
    shared = os.path.commonprefix(list(tensors))
    wrapper = shared[: shared.rfind('.') + 1]
    return _sound_tensors({key.removeprefix(wrapper): t for key, t in tensors.items()})


def _state_dicts(content, levels=2):
    """The dicts of tensors in a dict as people save it: those that it holds under the usual names,
    or else itself."""
    names = AVERAGES if content.keys().isdisjoint(CONTAINERS) else CONTAINERS
    inner = [content[name] for name in names if isinstance(content.get(name), dict)]
    found = [tensors for d in inner if levels for tensors in _state_dicts(d, levels - 1)]
    if not found and any(isinstance(value, torch.Tensor) for value in content.values()):
        found = [content]
    return found


def _sound_tensors(tensors):
    """These tensors, in the widest of their types: weights may be half beside float statistics.
    Raise an error unless they are dense tensors of finite real numbers, no variance is negative,
    and no other types are mixed."""
    for key, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f'{key} is not a tensor, but of the type {type(tensor).__name__}')
        if tensor.dtype not in FLOATS:
            raise ValueError(f'{key} has the type {tensor.dtype}, not one of floats')
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f'{key} repeats its numbers: save a contiguous copy of it')
        if not tensor.isfinite().all():
            raise ValueError(f'{key} is not finite')
        if key.endswith('running_var') and (tensor < 0).any():
            raise ValueError(f'{key} has negative values')
    types = {tensor.dtype for tensor in tensors.values()}
    if len(types - HALVES) > 1:
        raise ValueError(f'its tensors have different types: {", ".join(sorted(map(str, types)))}')
    widest = reduce(torch.promote_types, types)
    return {key: tensor.detach().to(widest) for key, tensor in tensors.items()}


def _read_network(stated, params):
    """The arguments of `registry.define` for the network that a file states, and whether its
    tensors, which must be these, are folded."""
    _check_names(stated)
    network = {**stated, 'form': registry.form_of(stated)}
    # The names alone of its tensors could fill the memory. Layers may share their tensors.
    if network['depth'] > max(1000, len(params)):
        raise ValueError(f'its network has depth {network["depth"]}, but {len(params)} tensors')
    expected = registry.shapes(**network)
    folded = params.keys() != expected.keys() and registry.is_folded(params)
    registry.check_shapes(params, registry.fold(network['model'], expected) if folded else expected)
    return network, folded


def _check_names(stated):
    """Raise ValueError unless what a file states of its network can be passed to its model here."""
    for name in ('model', 'depth', 'width', 'dataset', 'num_classes', 'in_channels'):
        if name not in stated:
            raise ValueError(f'its network has no {name}')
    model = stated['model']
    if model not in registry.MODELS:
        raise ValueError(f'its model is {model}, which this code does not know')
    known = {*registry.network_option_names(model), 'num_classes', 'in_channels'}
    if unknown := [name for name in stated if name not in known]:
        raise ValueError(f'its model has the option {unknown[0]}, which this code does not know')


def check_metadata(network, classes, preprocessing):
    """Raise an error unless the names of classes and the preprocessing, each None if unknown, fit
    the outputs and inputs of a network."""
    outputs, channels = network['num_classes'], network['in_channels']
    if classes is not None and (
        not isinstance(classes, (list, tuple)) or [*map(type, classes)] != [str] * outputs
    ):
        raise ValueError(f'its classes are not the names of {outputs} classes')
    if preprocessing is not None:
        read = Preprocessing.from_dict(preprocessing)
        if not read.channels == len(read.mean) == len(read.std) == channels:
            raise ValueError(f'its preprocessing is not that of {channels} channels')


# --- saving ----------------------------------------------------------------------------------


def run_metadata(options, network, data):
    """What every checkpoint of a run has."""
    return {
        'options': options,
        'network': network,
        'classes': list(data.classes),
        'preprocessing': data.preprocessing.as_dict(),
    }


def save(path, content, keep_previous):
    """Write a checkpoint, and keep the existing one as previous.pt7 if `keep_previous`. Raises
    OSError; then both files are unchanged."""
    # torch.save's own writer would turn the OSError of a full disk into other exceptions.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getbuffer(), path.with_name(PREVIOUS) if keep_previous else None)

"""The form of a file with a network: all that is checked before anything uses the file.

There are three kinds of files:

    a run       what train.py saves (see checkpoint.py); training_form.py checks the training in it
    an export   state_dict, network, classes and preprocessing: a .pth of tools.export
    a bare one  tensors, alone or under `params` or `state_dict`; published files have the running
                statistics under `stats`. Other things in it are ignored, but for `classes`,
                `preprocessing` and `epoch`.
"""

import torch

from diracparams import BASE_WIDTHS
from lab.data.preprocessing import Preprocessing
from lab.models import registry
from lab.runs.training_form import check_training
from lab.runs.valid_values import check_param, check_tensor, is_count, is_number, short

TENSORS = ('params', 'state_dict')  # a file has one of these, or is itself the dict of tensors
ALWAYS_READ = ('network', 'classes', 'preprocessing', 'epoch')
REQUIRED_IN_EXPORT = ('network', 'preprocessing')
REQUIRED_IN_RUN = (*ALWAYS_READ, 'options')  # without an optimizer, it can be tested
FIELDS = (*REQUIRED_IN_RUN, 'optimizer', 'scaler', 'ema', 'progress', 'log')
NETWORK = ('model', 'depth', 'width', 'dataset', 'num_classes', 'in_channels')
SMALLEST_IMAGE = {'cifar': 4, 'imagenet': 32}  # a smaller one vanishes in the pools of a chain
LARGEST_IMAGE = 2**12
SMALLEST_STD = 1e-3  # of pixels from 0 to 255


def read_form(content):
    """The fields of a Checkpoint in the content of a file.

    Raises:
        ValueError: it has another form; the message says what is wrong.
    """
    if not isinstance(content, dict):
        raise ValueError(f'it holds a {type(content).__name__}')
    if not all(isinstance(name, str) for name in content):
        raise ValueError('its keys must be strings')
    fields = {name: content[name] for name in FIELDS if content.get(name) is not None}
    is_run = 'options' in fields
    if is_run:
        _check_names(content, fields, REQUIRED_IN_RUN)
    elif 'network' in fields:
        _check_names(content, fields, REQUIRED_IN_EXPORT)
    if not is_run:
        fields = {name: fields[name] for name in ALWAYS_READ if name in fields}
    params = _find_params(content)
    folded = registry.is_folded(params)
    network = registry.recognize(params)
    if 'network' in fields:
        _check_network(fields['network'], network, folded)
        network = fields['network'] = {**fields['network'], 'form': network['form']}
    _check_facts(fields, network)
    if is_run:
        check_training(fields, params)
    return {**fields, 'params': params, 'folded': folded, 'network': network}


def _check_names(content, fields, required):
    for name in required:
        if name not in fields:
            raise ValueError(f'its {name} is missing')
    for name in content:
        if name not in (*TENSORS, *FIELDS):
            raise ValueError(f'its {name} is unknown')


# --- tensors ---------------------------------------------------------------------------------


def _find_params(content):
    """The tensors that the network needs, checked one by one."""
    places = [name for name in TENSORS if isinstance(content.get(name), dict)]
    if len(places) > 1:
        raise ValueError(f'it has both {" and ".join(places)}')
    params = content[places[0]] if places else content
    stats = content.get('stats')  # running statistics of published files
    if places == ['params'] and isinstance(stats, dict):
        twice = sorted(map(str, params.keys() & stats.keys()))
        if twice:
            raise ValueError(f'both params and stats have {twice[0]}')
        params = {**params, **stats}
    if not all(isinstance(key, str) for key in params):
        raise ValueError('the keys of its tensors must be strings')
    params = {key: tensor for key, tensor in params.items() if _is_used(key)}
    if not params:
        raise ValueError('it has no state dict of tensors')
    for key, tensor in params.items():
        check_param(key, tensor)
    types = sorted({str(tensor.dtype) for tensor in params.values()})
    if len(types) > 1:
        raise ValueError(f'its tensors have different types: {", ".join(types)}')
    return params


def _is_used(key):
    """Whether a tensor is needed here. The original's files also store identities, under names such
    as eye64_64_3_3, and torchvision's files count batches."""
    return not key.startswith('eye') and not key.endswith('.num_batches_tracked')


# --- the network -----------------------------------------------------------------------------


def _check_network(network, found, folded):
    """Whether what a file says of its network is true of its tensors, which fit the network
    `found`. Nothing of the size that the file says is made."""
    if not isinstance(network, dict) or network.get('model') not in tuple(registry.MODELS):
        raise ValueError('its network has no known model')
    if network.get('form', 'cifar') not in tuple(BASE_WIDTHS):
        raise ValueError(f'its network has form {short(network["form"])}')
    own = registry.own_options(network['model'])
    if network.keys() - {'form'} != {*NETWORK, *own}:
        raise ValueError(f'its network must have exactly {", ".join((*NETWORK, *own))}')
    theirs, ours = _shown_by_tensors(network, folded), _shown_by_tensors(found, folded)
    for name, value in ours.items():
        if type(theirs[name]) is not type(value) or theirs[name] != value:
            raise ValueError(
                f'its network has {name} {short(theirs[name])}, but its tensors have {value}'
            )
    if own:
        registry.shapes(**network)  # raises ValueError for a value that this model does not allow


def _shown_by_tensors(network, folded):
    """What the tensors show of a network."""
    model, form = network['model'], registry.form_of(network)
    if folded and model in registry.FOLDABLE:  # as `recognize` names them
        model = 'diracnet-v1' if model in registry.VERSION_1 else 'plain'
    return {
        'model': model,
        'depth': network['depth'],
        'images for': form,
        'last width': int(BASE_WIDTHS[form][-1] * network['width']),
        'num_classes': network['num_classes'],
        'in_channels': network['in_channels'],
    }


def _check_facts(fields, network):
    """Whether classes, preprocessing and epoch are valid and fit the network."""
    if 'classes' in fields:
        check_classes(fields['classes'], network['num_classes'])
    if 'preprocessing' in fields:
        smallest = SMALLEST_IMAGE[network['form']]
        check_preprocessing(fields['preprocessing'], network['in_channels'], smallest)
    if not is_count(fields.get('epoch', 0)):
        raise ValueError(f'its epoch is {short(fields["epoch"])}')


def check_classes(classes, n):
    """Raise ValueError unless these are the names of n classes."""
    if not isinstance(classes, (list, tuple)) or not all(type(c) is str for c in classes):
        raise ValueError('its classes are not a list of names')
    if len(classes) != n:
        raise ValueError(f'its classes are {len(classes)} names, but its network has {n}')


def check_preprocessing(facts, channels, smallest=1):
    """Raise ValueError unless this is a Preprocessing as a dict, for images with this number of
    channels and at least `smallest` pixels wide."""
    try:
        found = Preprocessing.from_dict(facts)
    except (TypeError, KeyError, ValueError):
        raise ValueError('its preprocessing has other names or values than ours') from None
    valid = {
        'channels': type(found.channels) is int and found.channels == channels,
        'image_size': is_count(found.image_size, smallest, LARGEST_IMAGE),
        'resize': is_count(found.resize, smallest, LARGEST_IMAGE),
        'mean': _are_numbers(facts['mean'], channels, 0),
        'std': _are_numbers(facts['std'], channels, SMALLEST_STD),
        'whitening': found.whitening is None or isinstance(found.whitening, dict),
    }
    for name, is_valid in valid.items():
        if not is_valid:
            raise ValueError(f'its preprocessing has {name} {short(facts[name])}')
    if found.resize < found.image_size:
        raise ValueError(f'its preprocessing cuts {found.image_size} pixels out of {found.resize}')
    if found.whitening:
        size = channels * found.image_size**2
        for name, shape in (('mean', (size,)), ('matrix', (size, size))):
            check_tensor(f'whitening {name}', found.whitening.get(name), torch.Size(shape))


def _are_numbers(values, n, least):
    """Whether these are n numbers on the scale of pixels."""
    if not isinstance(values, (list, tuple)):
        return False
    return len(values) == n and all(is_number(value, least, 255) for value in values)

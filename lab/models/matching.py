"""Whether parameters fit a network, and messages that say where they do not."""

from diracnet import copy_tensors
from lab.errors import UserError
from lab.models import registry


def network_flags(network):
    """The options of train.py that define a network, as on a command line."""
    flags = []
    shown = {name: value for name, value in network.items() if name != 'form'}
    if network['dataset'] == 'folder':
        shown['form'] = registry.form_of(network)
    for name in registry.network_option_names(network['model']):
        if name in shown:
            value = f'{shown[name]:g}' if name == 'width' else shown[name]
            flags.append(f'--{name} {value}')
    return ' '.join(flags)


def differences(theirs, ours):
    """A line for each key at which two dicts of tensors differ, with the key and both shapes."""
    their_shapes = {key: tuple(tensor.shape) for key, tensor in theirs.items()}
    our_shapes = {key: tuple(tensor.shape) for key, tensor in ours.items()}
    lines = []
    for key in dict.fromkeys([*ours, *theirs]):
        there, here = their_shapes.get(key, 'missing'), our_shapes.get(key, 'missing')
        if there != here:
            lines.append(f'{key} is {there} in the file and {here} in the network')
    return lines


def load_params(module, params, path):
    """Load params into a module.

    Raises:
        UserError: they do not fit; the message names the first keys with both shapes, and the
            flags that would fit.
    """
    differing = differences(params, module.state_dict())
    if differing:
        message = f'{path} has another architecture: {"; ".join(differing[:3])}'
        if len(differing) > 3:
            message += f' (and {len(differing) - 3} more)'
        fitting = registry.infer(params)
        if fitting:
            message += f'; its tensors fit {network_flags(fitting)}'
        raise UserError(message)
    copy_tensors(params, module)

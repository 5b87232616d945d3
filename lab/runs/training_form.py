"""The form of the training in a run's checkpoint: options, optimizer, position and log."""

import torch

from diracnet import Network
from lab.device import DTYPES
from lab.errors import OptionError, UserError
from lab.models import registry
from lab.models.freezing import freeze
from lab.runs.log import parse_line
from lab.runs.valid_values import check_param, check_tensor, is_count, is_number, short
from lab.training.optimizers import STATES, is_decayed
from lab.training.options import OPTIONS, check_combination, defaults_for

SIGNED = ('momentum_buffer', 'exp_avg')  # the others are sums of squares, and a count
SCALER = {'scale', 'growth_factor', 'backoff_factor', 'growth_interval', '_growth_tracker'}
LOSS = {'n', 'sum', 'var', 'val', 'mean', 'mean_old', 'm_s', 'std'}  # of torchnet's meter


def check_training(fields, params):
    """Whether the training that a checkpoint's fields describe can be resumed exactly.

    Raises:
        ValueError: a field has another form, or contradicts another one.
    """
    options, network, epoch = fields['options'], fields['network'], fields['epoch']
    check_options(options, network)
    dtype, short_dtype = DTYPES[options['dtype']]
    for key, tensor in params.items():
        if tensor.dtype != dtype:
            raise ValueError(f'{key} has the type {tensor.dtype}, but its option dtype is {dtype}')
    if (options['preprocess'] == 'zca') != bool(fields['preprocessing'].get('whitening')):
        raise ValueError('its preprocessing contradicts its option preprocess')
    if 'optimizer' in fields:
        check_optimizer(fields['optimizer'], options, network)
    check_averages(fields.get('ema'), params, needed=bool(options.get('ema')))
    check_scaler(fields.get('scaler', {}), needed=short_dtype is torch.float16)
    if epoch + ('progress' in fields) > options['epochs']:
        raise ValueError(f'its epoch is {epoch}, but its option epochs is {options["epochs"]}')
    if 'progress' in fields:
        check_progress(fields['progress'], options['batch_size'], network['num_classes'])
    check_log(fields.get('log', []), epoch)


# --- options ---------------------------------------------------------------------------------


def check_options(options, network):
    """Whether these are all options of a run with this network."""
    if not isinstance(options, dict):
        raise ValueError(f'its options are a {type(options).__name__}')
    model = network['model']
    for name in options:
        if name not in OPTIONS:
            raise ValueError(f'its option {short(name)} is unknown')
    for name in registry.network_option_names(model):
        if options.get(name, network['form']) != network[name]:  # only the form may be missing
            raise ValueError(
                f'its option {name} is {options[name]}, but its network has {network[name]}'
            )
    try:
        check_combination({**defaults_for(options), **options})
    except (OptionError, TypeError, ValueError, KeyError) as error:
        raise ValueError(f'its options are impossible: {error}') from None


# --- the optimizer ---------------------------------------------------------------------------


def check_optimizer(state_dict, options, network):
    """Whether there is a state for each parameter. The settings in it are not used."""
    states = state_dict.get('state') if isinstance(state_dict, dict) else None
    module = Network(None, freeze(registry.shapes(**network), options.get('freeze')))
    parameters = dict(enumerate(in_order(module, network['model'])))
    kept = set(STATES[options['optim']])
    if 'momentum_buffer' not in kept:
        kept.add('step')
    if not isinstance(states, dict) or states.keys() != parameters.keys():
        raise ValueError(
            f'its optimizer must have a state for each of {len(parameters)} parameters'
        )
    for number, parameter in parameters.items():
        state = states[number]
        if not isinstance(state, dict) or state.keys() != kept:
            raise ValueError(f'its optimizer has no state of {options["optim"]} for {number}')
        for name, tensor in state.items():
            what = f'{name} {number} of its optimizer'
            check_tensor(what, tensor, torch.Size() if name == 'step' else parameter.shape)
            if name not in SIGNED and (tensor < 0).any():
                raise ValueError(f'{what} has negative values')


def in_order(module, model):
    """The parameters of a module in the order of `lab.training.optimizers.make_optimizer`."""
    return sorted(module.parameters(), key=lambda parameter: not is_decayed(parameter, model))


def check_averages(averages, params, needed):
    """Whether the moving averages, None if there are none, are of exactly these params."""
    if needed != (averages is not None):
        raise ValueError('its moving averages contradict its option ema')
    if needed:
        if not isinstance(averages, dict) or averages.keys() != params.keys():
            raise ValueError('its ema must have the same tensors as its params')
        for key, tensor in params.items():
            check_param(f'ema {key}', averages[key], tensor.shape)
            if averages[key].dtype != tensor.dtype:
                raise ValueError(f'ema {key} has the type {averages[key].dtype}')


def check_scaler(scaler, needed):
    """Whether this is the state of a torch.amp.GradScaler, or empty if none is needed."""
    is_whole = isinstance(scaler, dict) and scaler.keys() == (SCALER if needed else set())
    if not is_whole or not all(is_number(value, 0) for value in scaler.values()):
        raise ValueError(f'its scaler is {short(scaler)}')


# --- the position ----------------------------------------------------------------------------


def check_progress(progress, batch_size, num_classes):
    """Whether this is what `lab.training.passes.Pass.progress` returns within an epoch."""
    if not isinstance(progress, dict) or progress.keys() != {'step', 'tally', 'time', 'broken'}:
        raise ValueError('its progress must have step, tally, time and broken')
    step, tally, broken = (progress[name] for name in ('step', 'tally', 'broken'))
    if not is_count(step, 1) or not is_number(progress['time'], 0):
        raise ValueError(f'its progress has step {short(step)}, time {short(progress["time"])}')
    if not isinstance(broken, dict) or not all(
        type(text) is str for item in broken.items() for text in item
    ):
        raise ValueError(f'its progress has broken {short(broken)}')
    if not isinstance(tally, dict) or tally.keys() != {'batches', 'loss', 'n', 'errors'}:
        raise ValueError(f'its progress has the tally {short(tally)}')
    n, loss, errors = tally['n'], tally['loss'], tally['errors']
    valid = (
        is_count(n, (step - 1) * batch_size + 1, step * batch_size)
        and is_count(tally['batches'], step, step)
        and isinstance(loss, dict)
        and loss.keys() == LOSS
        and all(is_number(loss[name]) for name in LOSS - {'std'})  # nan or inf of few samples
        and type(loss['std']) is float
        and loss['n'] == n
        and isinstance(errors, list)
        and len(errors) == len({1, min(5, num_classes)})
        and all(is_count(error, 0, n) for error in errors)
    )
    if not valid:
        raise ValueError(f'its progress has a tally that contradicts step {step}')


# --- the log ---------------------------------------------------------------------------------


def check_log(lines, epoch):
    """Whether these are lines of a log, one for each epoch up to this one."""
    if not isinstance(lines, (list, tuple)):
        raise ValueError(f'its log is a {type(lines).__name__}')
    first = epoch - len(lines) + 1
    for i, line in enumerate(lines):
        if type(line) is not str or not line.isprintable():
            raise ValueError(f'line {i + 1} of its log is {short(line)}')
        try:
            stats = parse_line(line, f'line {i + 1} of its log')
        except UserError as error:
            raise ValueError(str(error)) from None
        if first < 1 or not stats or stats['epoch'] != first + i:
            raise ValueError(f'its log does not have one line for each epoch up to {epoch}')

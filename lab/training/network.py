"""The network that the options describe, and what changes in it from step to step."""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from diracnet import BN_MOMENTUM, Network
from lab import distributed
from lab.device import DTYPES
from lab.errors import OptionError
from lab.models import registry
from lab.models.freezing import freeze, with_frozen
from lab.training.recompute import compiled_chain, recomputed_chain
from lab.training.sync_batch_norm import sync_batch_norm


class BatchNorm:
    """F.batch_norm with another momentum, which may change from step to step."""

    def __init__(self, norm, momentum):
        self.norm, self.momentum = norm, momentum

    def __call__(self, x, mean, var, weight, bias, training, momentum, eps):
        return self.norm(x, mean, var, weight, bias, training, self.momentum, eps)


def batch_norm(options):
    """The function of the batch norms, with the momentum as an argument."""
    norm = sync_batch_norm if options['sync_bn'] else F.batch_norm
    return with_frozen(norm) if options['freeze'] else norm


def network_arguments(options, source):
    """The arguments of registry.define for these options and this data set."""
    names = registry.network_option_names(options['model'])
    return {
        **{name: options[name] for name in names if name in options},
        'form': registry.form_of(options),
        'num_classes': len(source.classes),
        'in_channels': source.preprocessing.channels,
    }


def build_network(options, arguments, device):
    """The network with new parameters, drawn from the seed.

    Returns:
        module: diracnet.Network on the device, in channels_last.
        norm: the function of its batch norms.

    Raises:
        OptionError: there is no such network, or it has no part to freeze of that name.
    """
    torch.manual_seed(options['seed'])
    try:
        f, params = registry.define(**registry.initialization(options), **arguments)
        freeze(params, options['freeze'])
    except ValueError as error:
        raise OptionError(str(error)) from None
    if options['recompute']:
        f = partial(recomputed_chain, *f.args)
    if options['compile']:
        f = partial(compiled_chain(), *f.args)
    norm = batch_norm(options)
    if options['bn_momentum'] != BN_MOMENTUM:
        cumulative = options['bn_momentum'] == 'cumulative'  # then prepare_step sets it
        norm = BatchNorm(norm, 1 if cumulative else options['bn_momentum'])
    module = Network(partial(f, norm=norm), params)
    dtype, _ = DTYPES[options['dtype']]
    return module.to(device, dtype, memory_format=torch.channels_last), norm


def make_averages(module, options):
    """The moving averages of --ema as an AveragedModel, or None without the option."""
    if not options['ema']:
        return None
    average = get_ema_multi_avg_fn(options['ema'])
    return AveragedModel(module, multi_avg_fn=average, use_buffers=True).eval()


def prepare_step(options, norm, epoch, step):
    """Set what depends on the position in the training: the random state of dropout, and the
    momentum of --bn_momentum cumulative. `epoch` and `step` count from 0."""
    if options.get('dropout'):
        position = (options['seed'], epoch, step, distributed.rank())
        torch.manual_seed(int(np.random.SeedSequence(position).generate_state(1)[0]))
    if options['bn_momentum'] == 'cumulative':
        norm.momentum = 1 / (1 + step)

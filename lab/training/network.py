"""The network that the options describe, what changes in it from step to step, and its moving
averages."""

from functools import partial

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from diracnet import BN_MOMENTUM, Network
from lab import cuda, distributed
from lab.device import DTYPES
from lab.errors import OptionError, UserError
from lab.memory import total_memory
from lab.models import registry
from lab.models.freezing import freeze, with_frozen
from lab.training.recompute import recomputed
from lab.training.sync_batch_norm import sync_batch_norm

NOT_COMPILED = ('cpu',)  # where compiled steps took 0.86 to 1.1 times as long as others


def network_arguments(options, data):
    """The arguments of registry.define for these options and this data set."""
    names = registry.network_option_names(options['model'])
    return {
        **{name: options[name] for name in names if name in options},
        'form': registry.form_of(options),
        'num_classes': len(data.classes),
        'in_channels': data.preprocessing.channels,
    }


def count_parameters(network):
    """The parameters of `registry.define(**network)`, without making them.

    Raises OptionError if there is no such network.
    """
    return _count_over_depth(_parameters, network)


def count_multiplications(network, image_size):
    """The multiplications for an image of `image_size` x `image_size` pixels, in the convolutions
    and linear layers of `registry.define(**network)`; those of Dirac weights, batch norm and
    pooling are few. None if the network reads values: the tensors here have none."""
    try:
        return _count_over_depth(partial(_multiplications, image_size=image_size), network)
    except RuntimeError:
        return None


def _count_over_depth(count, network):
    """count(network), or, for a deep one, as much as follows from the counts of two others."""
    depth, longest = network['depth'], 60
    if depth <= longest or registry.form_of(network) == 'imagenet':
        return count(network)
    base = longest - 12 + depth % 6
    try:
        small, larger = (count({**network, 'depth': d}) for d in (base, base + 6))
    except OptionError:
        return count(network)  # raises the error for this depth
    return small + (depth - base) // 6 * (larger - small)  # 6 more layers add the same number


def _parameters(network):
    try:
        tensors = registry.shapes(**network).values()
    except ValueError as error:
        raise OptionError(str(error)) from None
    return sum(tensor.numel() for tensor in tensors if tensor.requires_grad)


def _multiplications(network, image_size):
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device('meta'), torch.no_grad(), FlopCounterMode(display=False) as counter:
        f, params = registry.define(**network)
        f(torch.empty(1, network['in_channels'], image_size, image_size), params, False)
    return counter.get_total_flops() // 2  # it counts multiplications and additions


def check_memory(n_parameters, options, device):
    """Raise OptionError if parameters, gradients and momentum need more memory than there is: the
    kernel would end the process without a word."""
    needed = 3 * n_parameters * DTYPES[options['dtype']][0].itemsize
    if device.type == 'cuda':
        available = cuda.memory(device)
    else:
        available = total_memory() / distributed.local_world()
    if needed > available:
        raise OptionError(
            f'--depth {options["depth"]} --width {options["width"]:g}: {n_parameters:,} parameters '
            f'need {needed / 1e9:,.1f} GB to train, but there are {available / 1e9:,.1f} GB for '
            f'{device}'
        )


def build_network(options, network, device, batch_size):
    """The network with new parameters, drawn from the seed.

    Args:
        network: what `network_arguments` returns.
        batch_size: images in a full training batch, of all processes together.

    Returns:
        diracnet.Network on the device, in channels_last, and the BatchNorm in it.

    Raises:
        OptionError: it does not fit the memory, has no part to freeze of that name, or cannot be
            computed as the options ask.
    """
    check_memory(count_parameters(network), options, device)
    if options['compile'] and device.type in NOT_COMPILED:
        raise OptionError(
            f'--compile does not make training faster on {device}: train without it, or on CUDA'
        )
    torch.manual_seed(options['seed'])
    try:
        f, params = registry.define(**registry.initialization(options), **network)
        if options['recompute']:
            f = recomputed(f, params, network['in_channels'])
        freeze(params, options['freeze'])
    except ValueError as error:
        raise OptionError(str(error)) from None
    norm = BatchNorm(options)
    # The usual batch norm is passed as it is: a compiler can look into it.
    is_usual = norm.momentum == BN_MOMENTUM and not norm.is_cumulative
    f = partial(f, norm=norm.function if is_usual else norm)
    if options['compile']:
        share = range(distributed.rank(), batch_size, distributed.world())
        f = compiled(f, -(-len(share) // options['accumulate']))
    dtype, _ = DTYPES[options['dtype']]
    return Network(f, params).to(device, dtype, memory_format=torch.channels_last), norm


def compiled(f, batch_size, **compiler):
    """f(inputs, params, mode), compiled for training on batches of this size; a smaller batch is
    computed by f itself, and so are tests.

    All of f is one graph, and its backward pass another, so batch norm, activations and Dirac
    weights are fused as the network's code has them.

    Args:
        compiler: keyword arguments of torch.compile.
    """
    whole = torch.compile(partial(f, mode=True), fullgraph=True, dynamic=False, **compiler)

    def compiled_f(inputs, params, mode, **keywords):
        if not mode or len(inputs) != batch_size:
            return f(inputs, params, mode, **keywords)
        try:
            return whole(inputs, params, **keywords)
        except torch._dynamo.exc.TorchDynamoException as error:  # such as: there is no compiler
            raise UserError(f'--compile failed: {str(error).splitlines()[0]}') from None

    return compiled_f


class BatchNorm:
    """F.batch_norm, synchronized or frozen if the options say so, with a momentum of its own."""

    def __init__(self, options):
        self.is_cumulative = options['bn_momentum'] == 'cumulative'
        self.momentum = 1 if self.is_cumulative else options['bn_momentum']
        function = sync_batch_norm if options['sync_bn'] else F.batch_norm
        self.function = with_frozen(function) if options['freeze'] else function

    def __call__(self, x, mean, var, weight, bias, training, momentum, eps):
        return self.function(x, mean, var, weight, bias, training, self.momentum, eps)

    def prepare_step(self, step):
        """With --bn_momentum cumulative, a step of an epoch, counted from 0, weighs 1 / n."""
        if self.is_cumulative:
            self.momentum = 1 / (1 + step)


class Averages:
    """Exponential moving averages of a module's tensors, for --ema; with decay None, nothing."""

    def __init__(self, module, decay):
        self.model = None
        if decay:
            average = get_ema_multi_avg_fn(decay)
            self.model = AveragedModel(module, multi_avg_fn=average, use_buffers=True).eval()

    @property
    def tested(self):
        """The name of its test and the averaged module, in a list, if there is one."""
        return [('ema_test', self.model.module)] if self.model else []

    def update(self, module):
        if self.model:
            self.model.update_parameters(module)

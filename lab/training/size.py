"""How large a network is and how much memory its training needs, by arithmetic: nothing of its
size is allocated."""

from dataclasses import astuple, dataclass

import torch

from lab import cuda
from lab.device import DTYPES
from lab.distributed import local_world, world
from lab.errors import OptionError
from lab.memory import total_memory
from lab.models import registry
from lab.training.optimizers import STATES, is_decayed

DEEPEST = 28  # of the networks that are measured; sizes of deeper ones grow linearly with depth
# Sizes of tensors would overflow beyond these. No machine has the memory for them.
WIDEST, LARGEST_IMAGE, LARGEST_BATCH = 10_000, 2**16, 2**12


@dataclass(frozen=True)
class Size:
    """Numbers of elements."""

    decayed: int  # of the parameters with weight decay
    others: int  # of the parameters without
    buffers: int
    activations: int  # what a batch keeps for its backward pass, with the effective weights

    @property
    def parameters(self):
        return self.decayed + self.others

    def describe(self, weight_decay):
        """The parameters in words, one line."""
        return (
            f'{self.parameters:,} parameters, {self.decayed:,} of them with weight decay '
            f'{weight_decay:g}'
        )


def check_memory(options, arguments, data, device):
    """The Size of the network to train.

    Args:
        options: all options of the run.
        arguments: those of `registry.define`.
        data: lab.data.datasets.Data.

    Raises:
        OptionError: there is no such network, or one step of its training needs more memory than
            the device has.
    """
    n = len(data.train[1])
    samples = -(-min(options['batch_size'], n) // world())
    pixels = data.preprocessing.image_size
    try:
        size = network_size(arguments, samples, pixels)
    except ValueError as error:
        raise OptionError(str(error)) from None
    images = samples * arguments['in_channels'] * pixels**2
    needed, activations = step_memory(options, size, images)
    if data.in_memory:
        needed += sum(part[0].nbytes for part in (data.train, data.test))
    if device.type == 'cuda':
        available = cuda.memory(device)
    else:
        needed, available = needed * local_world(), total_memory()
    if needed > available:
        raise OptionError(
            f'training needs at least {_gigabytes(needed)} of memory, but this machine has '
            f'{_gigabytes(available)} for {device}: {size.parameters:,} parameters (--depth '
            f'{options["depth"]} --width {options["width"]:g}), and {_gigabytes(activations)} for '
            f'{samples} images of {pixels} x {pixels} pixels; use a smaller --depth, --width, '
            '--image_size or --batch_size'
        )
    return size


def step_memory(options, size, images):
    """The bytes that a step of training needs at least, and those of its activations.

    images: the number of values in a batch of images.
    """
    dtype, short = DTYPES[options['dtype']]
    weights = size.parameters * dtype.itemsize
    others = size.buffers * dtype.itemsize + weights * len(STATES[options['optim']])
    activations = size.activations * (short or dtype).itemsize
    if options['recompute'] or options['compile']:  # far fewer: at least the images themselves
        activations = images * dtype.itemsize
    # Gradients replace activations during the backward pass.
    return weights + others + max(weights, activations), activations


def _gigabytes(number):
    return f'{number / 1e9:,.1f} GB'


def network_size(arguments, samples, image_size):
    """The Size of a network and of a batch of square images.

    Raises ValueError if there is no such network.
    """
    depth = arguments['depth']
    arguments = {**arguments, 'width': min(arguments['width'], WIDEST)}
    batch = (min(samples, LARGEST_BATCH), *2 * (min(image_size, LARGEST_IMAGE),))
    if depth <= DEEPEST or registry.form_of(arguments) == 'imagenet':
        return _measure(arguments, batch)
    # One more block of each kind adds 6 layers, and always the same numbers.
    base = 12 + depth % 6
    try:
        small, larger = (_measure({**arguments, 'depth': d}, batch) for d in (base, base + 6))
    except ValueError:
        return _measure(arguments, batch)  # raises the same error, for this depth
    steps = (depth - base) // 6
    return Size(*(a + steps * (b - a) for a, b in zip(astuple(small), astuple(larger))))


def _measure(arguments, batch):
    samples, *image_size = batch
    with torch.device('meta'):
        f, params = registry.define(**arguments)
        inputs = torch.empty(samples, arguments['in_channels'], *image_size)
        activations = inputs.numel() + _kept_for_backward(f, params, inputs)
    numbers = {'decayed': 0, 'others': 0, 'buffers': 0}
    for tensor in params.values():
        kind = 'decayed' if is_decayed(tensor, arguments['model']) else 'others'
        numbers[kind if tensor.requires_grad else 'buffers'] += tensor.numel()
    return Size(**numbers, activations=activations)


def _kept_for_backward(f, params, inputs):
    """The number of elements, of float32, that autograd keeps apart from parameters and inputs."""
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = f(inputs, params, True)
    given = {tensor.untyped_storage()._cdata for tensor in (inputs, logits, *params.values())}
    return sum(size for key, size in kept.items() if key not in given)

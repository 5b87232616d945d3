"""What the benchmarks compare, and how: `race` runs contestants in turn, each in its own process.

So each contestant has its own peak memory, and the settings of the memory allocator that it would
have in real use.
"""

import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
import torch._dynamo  # an optimizer imports it at its first step: not part of a step's memory
import torch.nn.functional as F

from diracnet import Network
from lab.data import datasets
from lab.device import DTYPES, autocast, set_up
from lab.models import registry
from lab.training.network import build_network
from lab.training.optimizers import make_optimizer
from lab.training.options import complete
from tools.benchmark import images, references
from tools.benchmark.images import random_batch

# --- training: a network is (depth, width, dataset) ------------------------------------------


def training_step(network, device='cpu', layout=torch.channels_last, **options):
    """A training step as train.py takes it with these options: a function of (inputs, targets)."""
    depth, width, dataset = network
    options = complete({'depth': depth, 'width': width, 'dataset': dataset, 'lr': 1e-3, **options})
    device = torch.device(device)
    set_up(options, device)
    names = registry.network_option_names(options['model'])
    arguments = {name: options[name] for name in names if name in options}
    module = build_network(options, arguments, device)[0].to(memory_format=layout)
    optimizer = make_optimizer(module, options)
    autocast_dtype = DTYPES[options['dtype']][1]

    def step(inputs, targets):
        optimizer.zero_grad()
        with autocast(device, autocast_dtype):
            logits = module(inputs)
        F.cross_entropy(logits.float(), targets).backward()
        optimizer.step()

    return step


def step_on_a_batch(network, batch, device='cpu', layout=torch.channels_last, **options):
    step = training_step(network, device, layout, **options)
    return partial(step, *random_batch(network[2], batch, device, layout))


def resnet_step(network, batch):
    """The step of the ResNet with two layers fewer."""
    depth, width, dataset = network
    return step_on_a_batch((depth - 2, width, dataset), batch, model='resnet')


def textbook_step(network, device='cpu'):
    """The same for the textbook network: a function of (inputs, targets)."""
    params = {
        key: tensor.detach().to(device).requires_grad_(tensor.requires_grad)
        for key, tensor in references.with_deltas(define_params(network)).items()
    }
    optimizer = references.textbook_optimizer(params)

    def step(inputs, targets):
        optimizer.zero_grad()
        F.cross_entropy(references.textbook(inputs, params, True), targets).backward()
        optimizer.step()

    return step


def textbook_on_a_batch(network, batch, device='cpu'):
    return partial(textbook_step(network, device), *random_batch(network[2], batch, device))


def floor_step(network, batch):
    return references.bare_convolutions(define_params(network), random_batch(network[2], batch)[0])


def define_params(network):
    return registry.define('diracnet', *network)[1]


def epoch(make_step, make_batches, network, n):
    """A function that trains on n images of 32 x 32."""
    step, batches = make_step(network), make_batches(n)

    def train():
        for inputs, targets in batches:
            step(inputs, targets)

    return train


# --- input -----------------------------------------------------------------------------------


def one_pass(make_batches, *arguments):
    """A function that reads all batches; only the workers of the batches use a second core."""
    torch.set_num_threads(1)
    return partial(images.read, make_batches(*arguments))


def load_small_files(folder):
    return datasets.load('folder', folder, form='cifar')


def small_file_batches(folder):
    return load_small_files(folder).batches(True, batch_size=128, pad=4)


# --- inference -------------------------------------------------------------------------------


def folded(network):
    return registry.folded_module('diracnet', registry.fold('diracnet', define_params(network)))


def unfolded(network):
    return Network(*registry.define('diracnet', *network)).eval()


def resnet(network):
    """torchvision's ResNet of the same depth, with its batch norms folded."""
    import torchvision
    from torch.fx.experimental.optimization import fuse

    return fuse(getattr(torchvision.models, f'resnet{network[0]}')().eval())


def in_pytorch(make_model, network, batch, device='cpu', dtype=torch.float32):
    model = make_model(network).to(device, dtype, memory_format=torch.channels_last)
    inputs, _ = random_batch(network[2], batch, device, torch.channels_last)
    return partial(infer, model, inputs.to(dtype))


def in_onnx_runtime(make_model, network, batch):
    from lab.onnx_models import OnnxNetwork, to_onnx

    inputs, _ = random_batch(network[2], batch)
    content = to_onnx(make_model(network), inputs.shape[1:], {}).SerializeToString()
    return partial(infer, OnnxNetwork(content), inputs)


def in_int8(network, batch):
    from lab.onnx_models import OnnxNetwork
    from tools.int8 import int8_onnx

    inputs, _ = random_batch(network[2], batch)
    return partial(infer, OnnxNetwork(int8_onnx(folded(network), inputs, {})), inputs)


def infer(model, inputs):
    with torch.inference_mode():
        model(inputs)


# Each makes a step, a function without arguments, of the arguments network and batch, if it
# trains or infers.
BUILDERS = {
    'DiracNet': step_on_a_batch,
    'plain': partial(step_on_a_batch, model='plain'),
    '--recompute': partial(step_on_a_batch, recompute=True),
    '--compile': partial(step_on_a_batch, compile=True),
    '--dtype bfloat16': partial(step_on_a_batch, dtype='bfloat16'),
    'ResNet step': resnet_step,
    'textbook': textbook_on_a_batch,
    'floor': floor_step,
    'DiracNet epoch': partial(epoch, training_step, images.our_batches),
    'textbook epoch': partial(epoch, textbook_step, images.torchvision_batches),
    'small images': partial(one_pass, images.our_batches),
    'small images, torchvision': partial(one_pass, images.torchvision_batches),
    'JPEGs': partial(one_pass, images.our_folder_batches),
    'JPEGs, torchvision': partial(one_pass, images.torchvision_folder_batches),
    'small files': partial(one_pass, small_file_batches),
    'reading of small files': lambda folder: partial(load_small_files, folder),
    'folded': partial(in_pytorch, folded),
    'unfolded': partial(in_pytorch, unfolded),
    'ResNet': partial(in_pytorch, resnet),
    'folded bfloat16': partial(in_pytorch, folded, dtype=torch.bfloat16),
    'folded ONNX': partial(in_onnx_runtime, folded),
    'ResNet ONNX': partial(in_onnx_runtime, resnet),
    'folded int8': in_int8,
}


# --- running ---------------------------------------------------------------------------------


class Contestant:
    """A process that has built a contestant. Calling it runs a step and returns its seconds.

    Args:
        kind, arguments: a name in BUILDERS, and the arguments of its function.
    """

    def __init__(self, kind, *arguments):
        context = get_context('spawn')
        self.pool = ProcessPoolExecutor(1, context, _set_up, (kind, *arguments))

    def __call__(self):
        return self.pool.submit(_run).result()

    def close(self):
        """End the process. Returns its peak memory in MB, above that without the contestant."""
        peak = self.pool.submit(_peak).result()
        self.pool.shutdown()
        return peak


_contestant = {}  # in its process


def _set_up(kind, *arguments):
    torch.manual_seed(0)
    F.conv2d(torch.randn(8, 8, 8, 8), torch.randn(8, 8, 3, 3))  # loads the convolution library
    Path('/proc/self/clear_refs').write_text('5')  # the peak starts from here
    _contestant['before'] = peak_memory()
    _contestant['step'] = BUILDERS[kind](*arguments)


def _run():
    return seconds(_contestant['step'])


def _peak():
    return peak_memory() - _contestant['before']


def peak_memory():
    """The largest memory of this process in RAM so far, MB (Linux)."""
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith('VmHWM:'))


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def race(specifications, rounds):
    """Run contestants in turn.

    Args:
        specifications: {name: (kind, *arguments)}.

    Returns:
        samples, peaks: {name: its seconds in each round}, {name: its peak memory in MB}.
    """
    contestants = {name: Contestant(*given) for name, given in specifications.items()}
    samples = alternate(contestants, rounds)
    return samples, {name: contestant.close() for name, contestant in contestants.items()}


def alternate(functions, rounds):
    """{name: `rounds` results} of functions that return their seconds.

    They run in turn, in an order that rotates from round to round. An extra round at the beginning
    is not counted: it fills caches and starts processes.
    """
    samples, names = {name: [] for name in functions}, list(functions)
    for number in range(rounds + 1):
        names.append(names.pop(0))
        for name in names:
            time.sleep(0.05)  # the threads of the previous function spin for a while
            result = functions[name]()
            if number > 0:
                samples[name].append(result)
    return samples

"""What the benchmarks compare, and how: `race` runs contestants in turn, each in its own process.

So each has its own peak memory, and the settings of the memory allocator of its real use.
"""

import multiprocessing
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch._dynamo  # an optimizer imports it at its first step: not part of a step's memory
import torch.nn.functional as F

from diracnet import Network
from lab.device import set_up
from lab.errors import UserError
from lab.models import registry
from lab.training.network import Averages, build_network
from lab.training.optimizers import clip_gradients, make_optimizer, set_rates
from lab.training.options import complete
from lab.training.step import make_step
from tools.benchmark import images, references
from tools.benchmark.images import random_batch

# --- training: a network is (depth, width, dataset) ------------------------------------------


def on_a_batch(network, batch, device='cpu', build=build_network, **options):
    """The training step of train.py with these options, on a random batch.

    Args:
        build: what makes the module and its BatchNorm, as build_network does.
    """
    depth, width, dataset = network
    options = complete({'depth': depth, 'width': width, 'dataset': dataset, 'lr': 1e-3, **options})
    device = torch.device(device)
    set_up(options, device)
    inputs, targets = random_batch(dataset, batch, device, torch.channels_last)
    names = registry.network_option_names(options['model'])
    arguments = {name: options[name] for name in names if name in options}
    module, norm = build(options, {**arguments, 'in_channels': inputs.shape[1]}, device, batch)
    module.train()
    optimizer = make_optimizer(module, options)
    scaler = torch.amp.GradScaler(device.type, enabled=options['dtype'] == 'half')
    averages = Averages(module, options['ema'])
    compute = make_step(module, options, scaler, batch, fail)
    position = SimpleNamespace(epoch=1, step=0, batches=range(100))  # what is read of a Pass

    def step():
        set_rates(options, optimizer, norm, position)
        compute(inputs, targets)
        clip_gradients(module, optimizer, scaler, options['clip'])
        scaler.step(optimizer)
        scaler.update()
        averages.update(module)

    return step


def fail(reason):
    """Instead of saying why a step is not the one that was asked for."""
    raise UserError(reason)


def build_reference(make, options, network, device, batch):
    """What build_network returns, for a module that train.py does not have or cannot compile.
    --compile compiles it as a whole.

    Args:
        make: makes the module; None for a network of ours.
    """
    compiles, options['compile'] = options['compile'], False
    module, norm = build_network(options, network, device, batch)
    if make:
        module = make().to(device, memory_format=torch.channels_last)
    if compiles:
        module.compile(dynamic=False)
    return module, norm


def resnet_on_a_batch(network, batch):
    """The step of the ResNet with two layers fewer."""
    depth, width, dataset = network
    return on_a_batch((depth - 2, width, dataset), batch, model='resnet')


def textbook_on_a_batch(network, batch):
    """The same step of the textbook network."""
    return partial(
        references.textbook_step(define_params(network)), *random_batch(network[2], batch)
    )


def define_params(network):
    return registry.define('diracnet', *network)[1]


# --- input -----------------------------------------------------------------------------------


def one_pass(make_batches, *arguments):
    """A function that reads all batches."""
    return partial(deque, make_batches(*arguments), maxlen=0)


def on_one_core(make_batches, *arguments):
    """The same; only the workers of the batches use a second core."""
    torch.set_num_threads(1)
    return one_pass(make_batches, *arguments)


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


def in_onnx_runtime(make_model, network, batch, int8=False):
    from lab.onnx_models import OnnxNetwork, to_onnx
    from tools.int8 import int8_onnx

    inputs, _ = random_batch(network[2], batch)
    model = make_model(network)
    if int8:
        content = int8_onnx(model, inputs, {})
    else:
        content = to_onnx(model, inputs.shape[1:], {}).SerializeToString()
    return partial(infer, OnnxNetwork(content), inputs)


@torch.inference_mode()
def infer(model, inputs):
    model(inputs)


# Each makes a step, a function without arguments. Those that train on a batch or infer take the
# arguments network and batch.
BUILDERS = {
    'DiracNet': on_a_batch,
    'plain': partial(on_a_batch, model='plain'),
    '--recompute': partial(on_a_batch, recompute=True),
    '--dtype bfloat16': partial(on_a_batch, dtype='bfloat16'),
    'ResNet step': resnet_on_a_batch,
    'textbook': textbook_on_a_batch,
    'small images': partial(on_one_core, images.small_batches),
    'JPEGs': partial(on_one_core, images.jpeg_batches),
    'folded': partial(in_pytorch, folded),
    'unfolded': partial(in_pytorch, unfolded),
    'ResNet': partial(in_pytorch, resnet),
    'folded ONNX': partial(in_onnx_runtime, folded),
    'ResNet ONNX': partial(in_onnx_runtime, resnet),
    'folded int8': partial(in_onnx_runtime, folded, int8=True),
}


# --- running ---------------------------------------------------------------------------------


def race(contestants, rounds):
    """Run contestants in turn, each in a process that builds it first. Their order rotates.

    Args:
        contestants: {name: (kind, *arguments)}, with a kind in BUILDERS and its arguments.

    Returns:
        samples: {name: its ms in rounds 0, 1, ..., `rounds`}. Round 0 fills caches.
        peaks: {name: its peak memory in MB during them, above that of the process without it}.
    """
    spawn = multiprocessing.get_context('spawn')
    pools = {
        name: ProcessPoolExecutor(1, spawn, _build, given) for name, given in contestants.items()
    }
    samples, peaks, order = {name: [] for name in pools}, {}, list(pools)
    for _ in range(rounds + 1):
        order.append(order.pop(0))
        for name in order:
            time.sleep(0.05)  # the threads of the previous step spin for a while
            duration, peaks[name] = pools[name].submit(_run).result()
            samples[name].append(duration)
    for pool in pools.values():
        pool.shutdown()
    return samples, peaks


def peak_memory():
    """The largest memory of this process in RAM since `restart_peak`, MB (Linux)."""
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith('VmHWM:'))


def restart_peak():
    Path('/proc/self/clear_refs').write_text('5')


_own = {}  # in the process of a contestant


def _build(kind, *arguments):
    multiprocessing.set_start_method(None, force=True)  # workers of data loaders start as usual
    torch.manual_seed(0)
    F.conv2d(torch.randn(8, 8, 8, 8), torch.randn(8, 8, 3, 3))  # loads the convolution library
    restart_peak()
    _own['memory'] = peak_memory()
    _own['step'] = BUILDERS[kind](*arguments)
    restart_peak()


def _run():
    """The ms of a step, and the peak memory so far."""
    start = time.perf_counter()
    _own['step']()
    return 1000 * (time.perf_counter() - start), peak_memory() - _own['memory']

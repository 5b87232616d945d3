"""What the speed benchmarks compare. Each contestant runs in its own process:

    python -m tools.benchmark.contestants '["DiracNet", [34, 1, "CIFAR10"], 128]'

builds a contestant of that kind, for that network (depth, width, dataset) and batch size, and
answers requests on stdin. So each has its own peak memory, and the memory allocator settings that
it would have in real use.
"""

import json
import sys
from functools import partial

import torch
import torch._dynamo  # an optimizer imports it at its first step: not part of a step's memory
import torch.nn.functional as F

import diracnet
from diracnet import define_diracnet
from diracparams import make_architecture
from lab.device import autocast
from lab.memory import keep_freed_memory
from lab.models.plain import define_plain
from lab.models.resnet import define_resnet
from lab.training.optimizers import make_optimizer
from lab.training.recompute import compiled_chain, recomputed_chain
from tools.benchmark import references
from tools.benchmark.made_data import random_batch
from tools.benchmark.memory import peak_memory, reset_peak, resident_memory
from tools.benchmark.pipelines import our_batches, per_sample_batches
from tools.benchmark.references import channels_last

EPOCH_IMAGES = 10_000


def serve(kind, network, batch):
    """Answer each line of stdin with a line of JSON.

    'step' runs a step; 'peak' returns the peak memory, in MB above that without the network.
    """
    torch.manual_seed(0)
    inputs, targets = random_batch(network[2], batch)
    F.conv2d(torch.randn(8, 8, 8, 8), torch.randn(8, 8, 3, 3))  # loads the convolution library
    before = resident_memory()
    reset_peak()
    answers = {
        'ready': lambda: True,
        'step': build(kind, network, inputs, targets),
        'peak': lambda: peak_memory() - before,
    }
    for line in sys.stdin:
        print(json.dumps(answers[line.strip()]()), flush=True)


def build(kind, network, inputs, targets):
    """The step of this kind of contestant, a function without arguments or result."""
    return BUILDERS[kind](network, inputs, targets)


# --- training --------------------------------------------------------------------------------


def diracnet_step(network, inputs, targets):
    keep_freed_memory()
    return on_batch(training_step(*define_diracnet(*network)), inputs, targets)


def plain_step(network, inputs, targets):
    keep_freed_memory()
    return on_batch(training_step(*define_plain(*network)), inputs, targets)


def resnet_step(network, inputs, targets):
    keep_freed_memory()
    depth, width, dataset = network
    return on_batch(training_step(*define_resnet(depth - 2, width, dataset)), inputs, targets)


def bfloat16_step(network, inputs, targets):
    keep_freed_memory()
    step = training_step(*define_diracnet(*network), short=torch.bfloat16)
    return on_batch(step, inputs, targets)


def compiled_step(network, inputs, targets):
    keep_freed_memory()
    _, params = define_diracnet(*network)
    f = partial(compiled_chain(), make_architecture(*network))
    return on_batch(training_step(f, params), inputs, targets)


def recomputed_step(network, inputs, targets):
    _, params = define_diracnet(*network)
    f = partial(recomputed_chain, make_architecture(*network))
    return on_batch(training_step(f, params), inputs, targets)


def textbook_step(network, inputs, targets):
    return partial(textbook_training_step(textbook_params(network)), inputs, targets)


def floor_step(network, inputs, targets):
    return references.bare_convolutions(make_architecture(*network), inputs)


def diracnet_epoch(network, inputs, targets):
    keep_freed_memory()
    step = training_step(*define_diracnet(*network))
    return partial(run_epoch, step, our_batches(EPOCH_IMAGES))


def textbook_epoch(network, inputs, targets):
    step = textbook_training_step(textbook_params(network))
    return partial(run_epoch, step, per_sample_batches(EPOCH_IMAGES))


def run_epoch(step, batches):
    for inputs, targets in batches:
        step(inputs, targets)


def on_batch(step, inputs, targets):
    return partial(step, channels_last(inputs), targets)


def training_step(f, params, short=None):
    """A function of (inputs, targets) that takes a training step as train.py does."""
    module = diracnet.Network(f, params).to(memory_format=torch.channels_last)
    optimizer = make_optimizer(module, {'lr': 1e-3, 'weight_decay': 5e-4})

    def step(inputs, targets):
        optimizer.zero_grad()
        with autocast(inputs.device, short):
            logits = module(inputs)
        F.cross_entropy(logits.float(), targets).backward()
        optimizer.step()

    return step


def textbook_training_step(params):
    """The same for the textbook network."""
    optimizer = references.textbook_optimizer(params)

    def step(inputs, targets):
        optimizer.zero_grad()
        F.cross_entropy(references.textbook(inputs, params, True), targets).backward()
        optimizer.step()

    return step


def textbook_params(network):
    _, params = define_diracnet(*network)
    return references.with_deltas(params)


# --- inference -------------------------------------------------------------------------------


def folded(network):
    _, params = define_diracnet(*network)
    model = diracnet.DiracNet(*network)
    model.load_state_dict(diracnet.fold(params))
    return model.eval()


def unfolded(network):
    return diracnet.Network(*define_diracnet(*network)).eval()


def resnet(network):
    """torchvision's ResNet of the same depth, with its batch norms folded."""
    import torchvision
    from torch.fx.experimental.optimization import fuse

    return fuse(getattr(torchvision.models, f'resnet{network[0]}')().eval())


def in_pytorch(make_model, network, inputs, targets, dtype=torch.float32):
    model = make_model(network).to(dtype, memory_format=torch.channels_last)
    return partial(infer, model, channels_last(inputs.to(dtype)))


def in_onnx_runtime(make_model, network, inputs, targets):
    from lab.onnx_models import OnnxNetwork, to_onnx

    content = to_onnx(make_model(network), inputs.shape[1:], {}).SerializeToString()
    return partial(infer, OnnxNetwork(content), inputs)


def in_int8(network, inputs, targets):
    from lab.onnx_models import OnnxNetwork
    from tools.int8 import int8_onnx

    return partial(infer, OnnxNetwork(int8_onnx(folded(network), inputs, {})), inputs)


def textbook_inference(network, inputs, targets):
    params = textbook_params(network)
    return partial(infer, lambda x: references.textbook(x, params, False), inputs)


def infer(model, inputs):
    with torch.inference_mode():
        model(inputs)


BUILDERS = {
    'DiracNet': diracnet_step,
    'plain': plain_step,
    'ResNet step': resnet_step,
    '--dtype bfloat16': bfloat16_step,
    '--compile': compiled_step,
    '--recompute': recomputed_step,
    'textbook': textbook_step,
    'floor': floor_step,
    'DiracNet epoch': diracnet_epoch,
    'textbook epoch': textbook_epoch,
    'folded': partial(in_pytorch, folded),
    'unfolded': partial(in_pytorch, unfolded),
    'ResNet': partial(in_pytorch, resnet),
    'folded bfloat16': partial(in_pytorch, folded, dtype=torch.bfloat16),
    'ResNet bfloat16': partial(in_pytorch, resnet, dtype=torch.bfloat16),
    'folded ONNX': partial(in_onnx_runtime, folded),
    'ResNet ONNX': partial(in_onnx_runtime, resnet),
    'folded int8': in_int8,
    'textbook inference': textbook_inference,
}


if __name__ == '__main__':
    serve(*json.loads(sys.argv[1]))

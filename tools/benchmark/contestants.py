"""What tools.benchmark compares, each in a process of its own: `serve` builds one and does a step whenever it is asked to."""

import json
import sys
from functools import partial

import torch
import torch._dynamo  # noqa: F401  as every optimizer does at its first step: not part of what a step needs
import torch.nn.functional as F

import diracnet
import train
from lab.memory import keep_freed_memory
from lab.models.plain import define_plain
from tools import references


def serve(specification):
    """Read lines, answer each with a line of JSON: 'step' does one, 'peak' tells the peak memory, MB above that without a network."""
    kind, network, batch = json.loads(specification)
    torch.manual_seed(0)
    inputs, targets = random_batch(network, batch)
    F.conv2d(torch.randn(8, 8, 8, 8), torch.randn(8, 8, 3, 3))  # what the library needs for itself
    before = memory('VmRSS')
    with open('/proc/self/clear_refs', 'w') as file:
        file.write('5')  # the peak starts anew
    step = build(kind, network, inputs, targets)
    for line in sys.stdin:
        answer = {'ready': lambda: True, 'step': step, 'peak': lambda: memory('VmHWM') - before}[
            line.strip()
        ]()
        print(json.dumps(answer), flush=True)


def memory(name):
    with open('/proc/self/status') as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) / 1024


def random_batch(network, batch):
    channels, size = {'digits': (1, 8), 'CIFAR10': (3, 32), 'ImageNet': (3, 224)}[network[2]]
    return torch.randn(batch, channels, size, size), torch.arange(batch) % 10


def build(kind, network, inputs, targets):
    """The function that a step of this kind is."""
    word = kind.split()[0]
    if network[2] == 'ImageNet':
        return inference(kind, network, inputs)
    if word == 'floor':
        return references.floor(diracnet.architecture(*network), inputs)
    if word == 'textbook':
        step = textbook_step(references.with_deltas(diracnet.define_diracnet(*network)[1]))
    else:
        if kind != '--recompute':
            keep_freed_memory()
        f, params = (define_plain if word == 'plain' else diracnet.define_diracnet)(*network)
        block = train.choose_block(
            {'recompute': kind == '--recompute', 'compile': kind == '--compile'}
        )
        step = training_step(
            partial(f, block=block), params, torch.bfloat16 if kind == '--dtype bfloat16' else None
        )
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    if kind.endswith('epoch'):
        return partial(
            epoch, step, (per_sample_batches if word == 'textbook' else our_batches)(10_000)
        )
    return partial(step, inputs, targets)


def training_step(f, params, short=None):
    """A step as train.py does it, for a model as f, params."""
    module = diracnet.Network(f, params).to(memory_format=torch.channels_last)
    optimizer = train.make_optimizer(module, {'lr': 1e-3, 'weight_decay': 5e-4})

    def step(inputs, targets):
        optimizer.zero_grad()
        with train.autocast(inputs.device, short):
            logits = module(inputs)
        F.cross_entropy(logits.float(), targets).backward()
        optimizer.step()

    return step


def textbook_step(params):
    optimizer = references.textbook_optimizer(params)

    def step(inputs, targets):
        optimizer.zero_grad()
        F.cross_entropy(references.textbook(inputs, params, True), targets).backward()
        optimizer.step()

    return step


def epoch(step, batches):
    for inputs, targets in batches:
        step(inputs, targets)


def images_of_cifar(n):
    return torch.randint(0, 256, (n, 32, 32, 3), dtype=torch.uint8), torch.arange(n) % 10


def our_batches(n):
    from lab.data import datasets as data

    return data.Data(
        'CIFAR10', images_of_cifar(n), None, (), data.PREPROCESSING['CIFAR10']
    ).batches(True, batch_size=128, pad=4)


def per_sample_batches(n):
    """As one would otherwise write it: torchvision's transforms of single PIL images, in two worker processes."""
    from PIL import Image
    from torchvision import transforms

    pixels, targets = images_of_cifar(n)
    transform = transforms.Compose(
        [
            transforms.Pad(4, padding_mode='reflect'),
            transforms.RandomHorizontalFlip(),
            transforms.RandomCrop(32),
            transforms.ToTensor(),
            transforms.Normalize((0.491, 0.482, 0.447), (0.247, 0.243, 0.262)),
        ]
    )

    class PerSample(torch.utils.data.Dataset):
        def __len__(self):
            return n

        def __getitem__(self, index):
            return transform(Image.fromarray(pixels[index].numpy())), int(targets[index])

    return torch.utils.data.DataLoader(
        PerSample(), batch_size=128, shuffle=True, num_workers=2, persistent_workers=True
    )


def inference(kind, network, inputs):
    """folded, unfolded (ours, before folding), textbook eval, or resnet (torchvision's, batch norms folded); with onnx in ONNX Runtime."""
    word = kind.split()[0]
    if word == 'textbook':
        params = references.with_deltas(diracnet.define_diracnet(*network)[1])
        return partial(without_gradients, lambda x: references.textbook(x, params, False), inputs)
    if word == 'resnet':
        import torchvision
        from torch.fx.experimental.optimization import fuse

        model = fuse(getattr(torchvision.models, f'resnet{network[0]}')().eval())
    else:
        f, params = diracnet.define_diracnet(*network)
        if word == 'unfolded':
            model = diracnet.Network(f, params).eval()
        else:
            model = diracnet.DiracNet(*network)
            model.load_state_dict(diracnet.fold(params))
            model.eval()
    if kind.endswith('onnx'):
        return in_onnx_runtime(model, inputs)
    model.to(memory_format=torch.channels_last)
    return partial(without_gradients, model, inputs.contiguous(memory_format=torch.channels_last))


def without_gradients(model, inputs):
    with torch.inference_mode():
        model(inputs)


def in_onnx_runtime(model, inputs):
    import onnxruntime

    from tools import quantize

    content = quantize.onnx_model(model, inputs.shape[1:], {}).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=['CPUExecutionProvider'])
    feed = {'images': inputs.numpy()}

    def run():
        session.run(['logits'], feed)

    return run

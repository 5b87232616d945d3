"""Every device computes what the CPU does in double precision, and no tensor is made on another
one. `python -m pytest -m device --device cuda` runs this file, and what else is marked, on a GPU.

The tests with meta tensors and with fake CUDA tensors need no GPU.
"""

import contextlib
import json
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import diracnet
import train
from conftest import same, train_digits
from diracconv import DiracConv2d
from diracnet import Network, fold
from lab import cuda, distributed
from lab.data import datasets
from lab.device import DTYPES, UNTESTED, choose_device, set_up
from lab.errors import OptionError
from lab.models import registry
from lab.models.registry import FOLDS, MODELS, define
from lab.runs import checkpoint
from lab.training.optimizers import make_optimizer
from lab.training.options import complete
from test import randomized, relative_error

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
TARGETS = torch.arange(4)
GRAPHED = ('--graph', '--graph --compile', '--graph --dtype half', '--graph --accumulate 3')


def network(model, dataset='CIFAR10'):
    """f, params of the smallest network of a model, with random scales and statistics."""
    depth = 8 if model in ('resnet', 'resnet-dirac') else 10
    if dataset == 'ImageNet':
        depth = 50 if model == 'wrn' else 18
    torch.manual_seed(0)
    f, params = define(model, depth, 0.5, dataset)
    randomized(params)
    return f, params


def results_of(model, device, dtype):
    """Loss, gradients and running statistics of a training step, on the CPU in double."""
    module = Network(*network(model)).to(device, dtype, memory_format=torch.channels_last)
    loss = F.cross_entropy(module(IMAGES.to(device, dtype)), TARGETS.to(device))
    loss.backward()
    tensors = {name: parameter.grad for name, parameter in module.named_parameters()}
    tensors.update(module.named_buffers(), loss=loss.detach())
    assert all(tensor.device.type == device for tensor in tensors.values())
    return {name: tensor.cpu().double() for name, tensor in tensors.items()}


@pytest.mark.parametrize('model', MODELS)
def test_a_step_of_every_model(model, device):
    expected = results_of(model, 'cpu', torch.double)
    for dtype, limit in ((torch.double, 1e-9), (torch.float, 2e-3)):
        for name, tensor in results_of(model, device, dtype).items():
            scale = expected[name].abs().max().clamp(min=1e-6)
            assert (tensor - expected[name]).abs().max() <= limit * scale, (name, dtype)


@pytest.mark.parametrize('model', FOLDS)
def test_folds(model, device):
    f, params = network(model)
    expected = f(IMAGES, {key: tensor.double() for key, tensor in params.items()}, False)
    moved = {key: tensor.detach().to(device) for key, tensor in params.items()}
    folded = registry.folded_module(model, registry.fold(model, moved)).to(device)
    with torch.no_grad():
        logits = folded(IMAGES.float().to(device))
    assert relative_error(logits.cpu().double(), expected) < 1e-4


@pytest.mark.parametrize(
    'options', ['', '--dtype bfloat16', '--dtype half', '--recompute', '--compile', *GRAPHED]
)
def test_digits_are_learned(options, device, tmp_path, capsys):
    """On a GPU, float is TF32, and half scales its loss."""
    if device == 'cpu' and options in ('--dtype half', '--compile', *GRAPHED):
        pytest.skip('only on CUDA; test_compile.py and test_step.py have stand-ins for the CPU')
    lines = train_digits(tmp_path / 'run', f'--device {device} {options} --epochs 6')
    assert lines[-1]['test_acc'] > 90
    out = capsys.readouterr().out
    assert 'no CUDA graph' not in out
    assert out.count('GB of memory on cuda') == (device == 'cuda')


@pytest.mark.parametrize('options', ['', '--dtype half', '--accumulate 3'])
def test_a_graph_trains_to_the_bit(options, device, monkeypatch, tmp_path, stop_at):
    """As ordinary steps do, with a smaller batch at the end of each epoch, and if it resumes."""
    if device == 'cpu':
        pytest.skip('only on CUDA; test_step.py has a stand-in for the CPU')
    monkeypatch.setattr(cuda, 'set_up', cuda.set_up_for_equal_numbers)
    options = f'--device {device} --depth 10 --epochs 2 {options}'
    train_digits(tmp_path / 'plain', options)
    train_digits(tmp_path / 'graphed', f'{options} --graph')
    assert same(tmp_path / 'plain', tmp_path / 'graphed')
    stop_at(40)
    with pytest.raises(SystemExit):
        train_digits(tmp_path / 'cut', f'{options} --graph')
    train.main(['--resume', str(tmp_path / 'cut')])
    assert same(tmp_path / 'plain', tmp_path / 'cut')


def test_resumes_to_the_bit(device, monkeypatch, tmp_path, stop_at, call):
    """And what it saved is tested and trained on another device."""
    monkeypatch.setattr(cuda, 'set_up', cuda.set_up_for_equal_numbers)
    options = f'--device {device} --depth 10 --epochs 2 --randomcrop_pad 1 --resume auto'
    log = train_digits(tmp_path / 'whole', options)
    # A GPU's memory: more than the parameters and their momentum, less than a gigabyte.
    peaks = [line['train_peak_memory'] for line in log if device == 'cuda']
    assert all(2 * 4 * log[0]['n_parameters'] < peak < 1e9 for peak in peaks)
    assert all('train_peak_memory' not in line for line in log if device == 'cpu')
    stop_at(44)  # an epoch has 23 batches to train on and 6 to test on
    with pytest.raises(SystemExit):
        train_digits(tmp_path / 'cut', options)
    assert checkpoint.load(tmp_path / 'cut').epoch == 1
    train_digits(tmp_path / 'cut', options)
    assert same(tmp_path / 'whole', tmp_path / 'cut')

    accuracies = []
    for name in (device, 'cpu'):
        tested = call(train.main, '--evaluate', tmp_path / 'cut', '--device', name).out
        accuracies.append(json.loads(tested.removeprefix('json_stats: '))['test_acc'])
    assert accuracies[0] == accuracies[1] > 50
    for epochs, name in ((3, 'cpu'), (4, device)):
        train_digits(tmp_path / 'cut', f'--resume auto --device {name} --epochs {epochs}')


def test_one_process_communicates(device, monkeypatch, tmp_path):
    """NCCL on a GPU, gloo on the CPU: DistributedDataParallel's gradients, running statistics, and
    sums of CPU tensors."""
    backend = cuda.BACKEND if device == 'cuda' else 'gloo'
    dist.init_process_group(backend, init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    monkeypatch.setattr(distributed, 'world', lambda: 2)  # 1 would leave all of this out
    try:
        module = Network(*network('diracnet')).to(device)
        shared = distributed.share_gradients(module, torch.device(device))
        assert isinstance(shared, torch.nn.parallel.DistributedDataParallel)
        images, targets = IMAGES.float().to(device), TARGETS.to(device)
        F.cross_entropy(shared(images), targets).backward()
        distributed.share_statistics(module)
        assert distributed.total(torch.ones(1)) == 1
    finally:
        dist.destroy_process_group()
    alone = Network(*network('diracnet')).to(device)
    F.cross_entropy(alone(images), targets).backward()
    for ours, theirs in zip(module.parameters(), alone.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad)


# --- without a GPU ---------------------------------------------------------------------------


@pytest.mark.parametrize('dataset', ['CIFAR10', 'ImageNet'])
@pytest.mark.parametrize('model', MODELS)
def test_a_step_without_data(model, dataset):
    """A training step in which every tensor is on the meta device, which has no values: one that is
    made on the CPU does not fit."""
    module = Network(*network(model, dataset)).to('meta')
    logits = module(IMAGES.to('meta', torch.float))
    assert logits.shape == (4, 10 if dataset == 'CIFAR10' else 1000) and logits.is_meta
    F.cross_entropy(logits, TARGETS.to('meta'), label_smoothing=0.1).backward()
    assert all(parameter.grad.is_meta for parameter in module.parameters())
    # SGD's fused kernel does not exist for meta tensors.
    options = {'lr': 0.1, 'weight_decay': 5e-4, 'model': model, 'optim': 'adamw'}
    optimizer = make_optimizer(module, options)
    optimizer.step()
    assert all(t.is_meta for state in optimizer.state.values() for t in [state['exp_avg']])


def test_batches_without_data(tmp_path):
    """Order, crops, flips and cutout are made where the images are."""
    data = datasets.load('digits', str(tmp_path))
    images, targets = data.train
    data = replace(data, train=(images.to('meta'), targets.to('meta')))
    batches = data.batches(True, batch_size=64, device='meta', pad=1, cutout=2)
    batches.epoch = 1
    inputs, labels = next(iter(batches))
    assert inputs.is_meta and labels.is_meta and inputs.shape == (64, 1, 8, 8)


@pytest.mark.parametrize('kind', UNTESTED)
def test_untested_devices(kind, capsys):
    """Fake tensors of devices that this machine does not have."""
    with FakeTensorMode():
        device = choose_device({'device': kind})
        assert device == torch.device(kind, 0)
        set_up(complete({}), device)
    assert kind in capsys.readouterr().out


class NoDoubles(TorchDispatchMode):
    """Fails where a tensor of double precision is on a device other than the CPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            is_double = isinstance(tensor, torch.Tensor) and tensor.dtype == torch.double
            assert not is_double or tensor.device.type == 'cpu', function
        return result


def test_folding_needs_no_doubles(monkeypatch):
    """On MPS, which has none: they are on the CPU."""
    monkeypatch.setattr(diracnet, 'check', lambda *_: None)  # fake tensors have no values
    with torch.no_grad(), FakeTensorMode(), NoDoubles():
        params, conv = network('diracnet')[1], DiracConv2d(4, 4, 3)
        params = {key: tensor.detach().to('mps:0') for key, tensor in params.items()}
        for name, parameter in list(conv.named_parameters()):
            setattr(conv, name, torch.nn.Parameter(parameter.to('mps:0')))
        for folded in (fold(params).values(), conv.fold().parameters()):
            assert {(tensor.device.type, tensor.dtype) for tensor in folded} == {
                ('mps', torch.float)
            }


@pytest.mark.parametrize('dtype', ['double', 'half'])
def test_types_that_mps_lacks(dtype):
    with pytest.raises(OptionError, match=f'--dtype {dtype}.*mps'):
        set_up(complete({'dtype': dtype}), torch.device('mps'))


@contextlib.contextmanager
def cuda_autocast(short):
    """torch.autocast('cuda', short), which does nothing where there is no GPU."""
    torch.set_autocast_enabled('cuda', short is not None)
    torch.set_autocast_dtype('cuda', short or torch.half)
    try:
        yield
    finally:
        torch.set_autocast_enabled('cuda', False)


@pytest.mark.skipif(
    not (torch.cuda.is_available() or hasattr(torch._C, '_ensureCUDADeviceGuardSet')),
    reason='in this old torch, indexing a fake CUDA tensor needs a driver',
)
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('model', MODELS)
def test_a_forward_pass_of_fake_cuda_tensors(model, dtype, training):
    wide, short = DTYPES[dtype]
    f, params = network(model)
    real = {'images': IMAGES, **{key: tensor.detach() for key, tensor in params.items()}}
    with FakeTensorMode() as mode, cuda_autocast(short):
        fake = {key: mode.from_tensor(tensor).to('cuda:0', wide) for key, tensor in real.items()}
        logits = f(fake.pop('images'), fake, training)
    assert logits.device.type == 'cuda' and logits.shape == (4, 10)
    assert logits.dtype == (short or wide)

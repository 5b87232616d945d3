"""diracnet.py beyond test.py: training against the textbook, the module, published weights.

The published files are made here, and torch.hub downloads them from file:// addresses.
"""

import copy
import hashlib
import pickle
from collections import OrderedDict
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import diracparams
from conftest import ROOT, Malicious
from diracnet import DiracNet, Network, define_diracnet, diracnet18
from lab.models.diracnet_v1 import define_diracnet_v1
from lab.models.plain import define_plain, define_plain_ncrelu
from lab.models.resnet import define_resnet_dirac
from test import constants, randomized, relative_error
from tools.benchmark.references import textbook, with_deltas

# --- training --------------------------------------------------------------------------------


def leaves(params, *args):
    """Copies of params that learn, on a device and in a type."""
    copies = constants(params, *args)
    return {key: copies[key].requires_grad_(params[key].requires_grad) for key in params}


def textbook_errors(depth, width, dataset, size, memory_format, dtype, device):
    """Relative errors of logits and gradients, in training, against the formula written out."""
    f, params = define_diracnet(depth, width, dataset)
    params = leaves(randomized(params), device, dtype)
    reference = with_deltas(leaves(params))
    net = Network(f, params).to(memory_format=memory_format)
    x = torch.randn(8, params['conv'].shape[1], size, size, device=device, dtype=dtype)
    targets = torch.arange(8, device=device)
    logits = net(x.contiguous(memory_format=memory_format))
    expected = textbook(x, reference, True)
    F.cross_entropy(logits, targets).backward()
    F.cross_entropy(expected, targets).backward()
    learned = [key for key, tensor in net.params().items() if tensor.requires_grad]
    gradients, theirs = (
        torch.cat([tensors[key].grad.flatten() for key in learned])
        for tensors in (net.params(), reference)
    )
    return relative_error(logits, expected), relative_error(gradients, theirs)


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    'network', [(16, 1, 'digits', 8), (22, 0.5, 'CIFAR10', 16), (18, 0.125, 'ImageNet', 64)]
)
def test_training_agrees_with_the_textbook(network, memory_format, device):
    case = (*network, memory_format)
    assert max(textbook_errors(*case, torch.double, device)) < 1e-10
    # In float32 a unit within rounding of zero may be on in one network and off in the other,
    # which no tolerance for rounding covers: so take the median of a few networks.
    errors = []
    for seed in range(5):
        torch.manual_seed(seed)
        errors.append(textbook_errors(*case, torch.float, device))
    for of_logits_or_gradients in zip(*errors):
        assert sorted(of_logits_or_gradients)[2] < 1e-5


@pytest.mark.parametrize('widen_early, channels', [(False, [16, 32]), (True, [32, 64])])
def test_what_the_pools_see(widen_early, channels):
    """The same convolutions in the same order, with the pools at another place."""
    net, seen = DiracNet(16, 1, 'CIFAR10', widen_early=widen_early), []
    pools = [module for module in net.modules() if isinstance(module, torch.nn.MaxPool2d)]
    for pool in pools:
        pool.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0].shape[1:]))
    net(torch.randn(2, 3, 32, 32))
    assert seen == [(channels[0], 32, 32), (channels[1], 16, 16)]
    usual = DiracNet(16, 1, 'CIFAR10').state_dict().values()
    for tensor, other in zip(net.state_dict().values(), usual, strict=True):
        assert tensor.shape == other.shape


# --- initial scales --------------------------------------------------------------------------

resnet_dirac = partial(define_resnet_dirac, block='bn-add')


@pytest.mark.parametrize(
    'define, scales, expected',
    [
        (define_diracnet, {'beta': 'depth', 'alpha': 2}, {'beta': 1 / 8, 'alpha': 2}),
        (define_diracnet, {'bn_init': 'shifted'}, {'weight': 1, 'bias': 0.5, 'beta': 1 / 8}),
        (define_diracnet, {'bn_init': [1.5, -1]}, {'weight': 1.5, 'bias': -1}),
        (define_diracnet, {'bn_init': 'shifted', 'beta': 3}, {'weight': 1, 'bias': 0.5, 'beta': 3}),
        (define_plain, {'bn_init': 'shifted'}, {'weight': 1, 'bias': 0.5}),
        (define_plain_ncrelu, {'bn_init': (2, 0.25)}, {'weight': 2, 'bias': 0.25}),
        (define_diracnet_v1, {'bn_init': 'shifted'}, {'weight': 1, 'bias': 0.5}),
        (define_diracnet_v1, {'alpha': 'depth', 'beta': 0.1}, {'alpha': 1 / 8, 'beta': 0.1}),
        (resnet_dirac, {'beta': 0.5}, {'beta': 0.5}),
    ],
)
def test_initial_scales(define, scales, expected):
    """Those of batch norms and of Dirac weights; nothing else differs from the paper's."""
    depth = 62 if define is resnet_dirac else 64
    torch.manual_seed(0)
    params = define(depth, 1, 'digits', **scales)[1]
    torch.manual_seed(0)
    paper = define(depth, 1, 'digits')[1]
    for key, tensor in params.items():
        name = key.split('.')[-1]
        if name in expected and not key.startswith('fc.'):
            assert tensor.tolist() == pytest.approx([expected[name]] * len(tensor)), key
        else:
            assert torch.equal(tensor, paper[key]), key


@pytest.mark.parametrize(
    'scales',
    [
        {'bn_init': 'Paper'},
        {'bn_init': (0, 1)},
        {'bn_init': (1, float('nan'))},
        {'bn_init': None},
        {'beta': -0.1},
        {'beta': 'deep'},
        {'alpha': 0.0},
    ],
)
def test_impossible_initial_scales(scales):
    with pytest.raises(ValueError, match='is impossible'):
        define_diracnet(16, 1, 'digits', **scales)


# --- modules ---------------------------------------------------------------------------------


def test_network_module():
    f, params = define_diracnet(10, 1, 'digits')
    net = Network(f, randomized(params))
    assert set(net.state_dict()) == set(params)
    x = torch.randn(4, 1, 8, 8)
    net.eval()
    expected = f(x, params, False)
    other = Network(*define_diracnet(10, 1, 'digits')).eval()
    other.load_state_dict(net.state_dict())
    for same in (
        net,
        other,
        copy.deepcopy(net),
        pickle.loads(pickle.dumps(net)),
        torch.compile(net, backend='eager', fullgraph=True),
    ):
        assert torch.equal(same(x), expected)
    zeros = {key: torch.zeros_like(tensor) for key, tensor in net.state_dict().items()}
    assert not torch.func.functional_call(net, zeros, (x,)).any()
    net.double().train()(x.double())  # it has other tensors now, and updates those
    assert not torch.equal(net.params()['bn.running_mean'].float(), params['bn.running_mean'])


# --- published weights -----------------------------------------------------------------------


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """publish(name, weights): make the published file of that model, where torch.hub finds it;
    returns its path, and the path in torch.hub's cache."""
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path / 'hub'))

    def publish(name, weights):
        made = tmp_path / 'made.pth'
        torch.save(weights, made, _use_new_zipfile_serialization=False)  # as in early 2018
        digest = hashlib.sha256(made.read_bytes()).hexdigest()
        path = made.rename(tmp_path / f'{name}v2folded-{digest[:8]}.pth')
        monkeypatch.setitem(diracparams.model_urls, name, path.as_uri())
        return path, tmp_path / 'hub' / 'checkpoints' / path.name

    return publish


def test_addresses():
    assert diracparams.model_urls == {
        'diracnet18': 'https://s3.amazonaws.com/modelzoo-networks/diracnet18v2folded-a2174e15.pth',
        'diracnet34': 'https://s3.amazonaws.com/modelzoo-networks/diracnet34v2folded-dfb15d34.pth',
    }


@pytest.mark.parametrize('depth', [18, 34])
def test_pretrained(depth, publish):
    """As a user of torch.hub has it; the second time it comes from the cache."""
    weights = OrderedDict((k, torch.randn_like(v)) for k, v in DiracNet(depth).state_dict().items())
    path, cached = publish(f'diracnet{depth}', weights)
    for _ in range(2):
        model = torch.hub.load(str(ROOT), f'diracnet{depth}', source='local', pretrained=True)
        state = model.state_dict()
        assert list(state) == list(weights)
        assert all(torch.equal(state[key], tensor) for key, tensor in weights.items())
        path.unlink(missing_ok=True)
    assert cached.exists()


@pytest.mark.parametrize('damage', ['missing', 'truncated', 'another file'])
def test_a_download_that_fails_leaves_nothing(damage, publish):
    path, cached = publish('diracnet18', DiracNet(18, 0.125).state_dict())
    content = path.read_bytes()
    path.unlink()
    if damage != 'missing':
        path.write_bytes(content[: len(content) // 2] if damage == 'truncated' else b'else')
    with pytest.raises(RuntimeError) as error:
        diracnet18(pretrained=True, width=0.125)
    assert path.as_uri() in str(error.value) and str(cached.parent) in str(error.value)
    assert not list(cached.parent.iterdir())
    cached.write_bytes(content)  # the remedy that the message names
    assert diracnet18(pretrained=True, width=0.125).fc.out_features == 1000


def test_a_published_file_runs_no_code(publish, tmp_path):
    publish('diracnet18', {'features.conv.weight': Malicious(tmp_path / 'trap')})
    with pytest.raises(pickle.UnpicklingError):
        diracnet18(pretrained=True)
    assert not (tmp_path / 'trap').exists()


def test_pretrained_weights_fit_no_other_network(publish):
    publish('diracnet18', DiracNet(18, 0.125).state_dict())
    with pytest.raises(RuntimeError, match='size mismatch'):
        diracnet18(pretrained=True, width=0.125, num_classes=10)

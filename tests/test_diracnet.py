"""diracnet.py beyond test.py: training against the textbook, the module, published weights.

The published files are made here and served on loopback.
"""

import copy
import hashlib
import pickle
import re
import threading
from collections import OrderedDict
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import torch.nn.functional as F

import diracnet
import diracparams
from conftest import Malicious
from diracnet import DiracNet, Network, define_diracnet, diracnet18, diracnet34
from lab.models.diracnet_v1 import define_diracnet_v1
from lab.models.plain import define_plain, define_plain_ncrelu
from lab.models.resnet import define_resnet_dirac
from test import randomized, relative_error
from tools.benchmark.references import textbook, with_deltas

# --- training --------------------------------------------------------------------------------


def leaves(params):
    return {
        key: tensor.detach().clone().requires_grad_(tensor.requires_grad)
        for key, tensor in params.items()
    }


def textbook_errors(depth, width, dataset, size, memory_format, dtype, device):
    """Relative errors of logits and gradients, in training, against the formula written out."""
    f, params = define_diracnet(depth, width, dataset)
    params = {
        key: tensor.detach().to(device, dtype).requires_grad_(tensor.requires_grad)
        for key, tensor in randomized(params).items()
    }
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


def test_plain_is_the_same_chain():
    """Without alpha and beta, the shapes and keys are equal."""
    dirac = define_diracnet(16, 1, 'CIFAR10')[1]
    plain = define_plain(16, 1, 'CIFAR10')[1]
    assert {key for key in dirac if key.split('.')[-1] not in ('alpha', 'beta')} == set(plain)
    assert all(dirac[key].shape == tensor.shape for key, tensor in plain.items())


# --- initial scales --------------------------------------------------------------------------


def values(params, end):
    """The values that all tensors with this end of the key have, as a set."""
    return {
        value for key, tensor in params.items() if key.endswith(end) for value in tensor.tolist()
    }


def same_draws(define, **scales):
    """The params with these scales, and with the paper's, from the same seed."""
    found = []
    for options in (scales, {}):
        torch.manual_seed(0)
        found.append(define(64, 1, 'digits', **options)[1])
    return found


@pytest.mark.parametrize(
    'define', [define_diracnet, define_diracnet_v1, define_plain, define_plain_ncrelu]
)
@pytest.mark.parametrize(
    'bn_init, weight, bias', [('shifted', 1, 0.5), ((2, 0.25), 2, 0.25), ([1.5, -1], 1.5, -1)]
)
def test_initial_scales_of_batch_norms(define, bn_init, weight, bias):
    params, paper = same_draws(define, bn_init=bn_init)
    assert values(params, 'bn.weight') == {weight} and values(params, 'bn.bias') == {bias}
    assert 0 <= min(values(paper, 'bn.weight')) < max(values(paper, 'bn.weight')) <= 1
    assert values(paper, 'bn.bias') == {0}
    for key, tensor in params.items():  # nothing else differs
        differs = key.endswith(('bn.weight', 'bn.bias')) or (
            define is define_diracnet and bn_init == 'shifted' and key.endswith('.beta')
        )
        assert torch.equal(tensor, paper[key]) != differs
        assert tensor.requires_grad == paper[key].requires_grad


@pytest.mark.parametrize(
    'define, scales, alpha, beta',
    [
        (define_diracnet, {}, 1, 0.1),
        (define_diracnet, {'beta': 0.02}, 1, 0.02),
        (define_diracnet, {'beta': 'depth'}, 1, 1 / 8),
        (define_diracnet, {'bn_init': 'shifted'}, 1, 1 / 8),
        (define_diracnet, {'bn_init': 'shifted', 'beta': 0.3}, 1, 0.3),
        (define_diracnet, {'bn_init': (1, 0.5)}, 1, 0.1),
        (define_diracnet, {'alpha': 'depth', 'beta': 2}, 1 / 8, 2),
        (define_diracnet_v1, {'bn_init': 'shifted'}, 5, 1e-3),
        (define_diracnet_v1, {'alpha': 3, 'beta': 'depth'}, 3, 1 / 8),
        (partial(define_resnet_dirac, block='bn-add'), {'beta': 0.5}, 1, 0.5),
    ],
)
def test_initial_scales_of_dirac_weights(define, scales, alpha, beta):
    depth = 62 if isinstance(define, partial) else 64
    _, params = define(depth, 1, 'digits', **scales)
    assert list(values(params, '.alpha')) == pytest.approx([alpha])
    assert list(values(params, '.beta')) == pytest.approx([beta])


@pytest.mark.parametrize(
    'scales, word',
    [
        ({'bn_init': 'Paper'}, 'Paper'),
        ({'bn_init': (0, 1)}, '0'),
        ({'bn_init': (1, float('nan'))}, 'nan'),
        ({'bn_init': (1, 0, 0)}, '(1, 0, 0)'),
        ({'bn_init': ('1', 0)}, '1'),
        ({'bn_init': None}, 'None'),
        ({'beta': 0}, 'beta'),
        ({'beta': -0.1}, '-0.1'),
        ({'beta': float('inf')}, 'inf'),
        ({'beta': 'deep'}, 'deep'),
        ({'alpha': 0.0}, 'alpha'),
    ],
)
def test_impossible_initial_scales(scales, word):
    with pytest.raises(ValueError, match=re.escape(word)):
        define_diracnet(16, 1, 'digits', **scales)


# --- modules ---------------------------------------------------------------------------------


@pytest.mark.parametrize('key', ['features.conv.bias', 'features.group1.block0.conv.bias', 'new'])
def test_a_folded_state_dict_is_complete(key):
    state_dict = diracnet.fold(define_diracnet(10, 1, 'digits')[1])
    if key in state_dict:
        del state_dict[key]
    else:
        state_dict[key] = torch.zeros(1)
    with pytest.raises(ValueError, match=re.escape(key)):
        DiracNet.from_state_dict(state_dict)


def test_network_module():
    f, params = define_diracnet(10, 1, 'digits')
    net = Network(f, randomized(params))
    assert set(net.state_dict()) == set(params)
    learned = {key for key, tensor in params.items() if tensor.requires_grad}
    assert {name for name, _ in net.named_parameters()} == learned
    x = torch.randn(4, 1, 8, 8)
    net.eval()
    expected = f(x, params, False)
    for other in (
        net,
        copy.deepcopy(net),
        pickle.loads(pickle.dumps(net)),
        torch.compile(net, backend='eager', fullgraph=True),
    ):
        assert torch.equal(other(x), expected)
    other = Network(*define_diracnet(10, 1, 'digits')).eval()
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), expected)
    zeros = {key: torch.zeros_like(tensor) for key, tensor in net.state_dict().items()}
    assert not torch.func.functional_call(net, zeros, (x,)).any()
    assert net.double()(x.double()).dtype is torch.double
    net.train()(x.double())
    assert not torch.equal(net.params()['bn.running_mean'].float(), params['bn.running_mean'])


# --- published weights -----------------------------------------------------------------------


@pytest.fixture
def server():
    """An HTTP server on loopback. server.files: name to (status, bytes, announced length);
    server.requests: the names that were asked for."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.rsplit('/', 1)[1]
            httpd.requests.append(name)
            status, content, length = httpd.files[name]
            self.send_response(status)
            self.send_header('Content-Length', str(length))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    httpd = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    httpd.files, httpd.requests = {}, []
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield httpd
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture
def publish(server, tmp_path, monkeypatch):
    """publish(name, weights): serve a state dict as the file of that model; returns the file's
    name and its path in torch.hub's cache."""
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path / 'hub'))

    def publish(name, weights, digest=None):
        path = tmp_path / 'made.pth'
        torch.save(weights, path, _use_new_zipfile_serialization=False)  # as in early 2018
        content = path.read_bytes()
        prefix = (digest or hashlib.sha256(content).hexdigest())[:8]
        file_name = f'{name}v2folded-{prefix}.pth'
        server.files[file_name] = (200, content, len(content))
        url = f'http://127.0.0.1:{server.server_port}/modelzoo/{file_name}'
        monkeypatch.setitem(diracparams.model_urls, name, url)
        return file_name, tmp_path / 'hub' / 'checkpoints' / file_name

    return publish


@pytest.fixture
def small_weights():
    return DiracNet(18, 0.125).state_dict()


def equal(model, weights):
    state = model.state_dict()
    return set(state) == set(weights) and all(
        torch.equal(state[key], tensor) for key, tensor in weights.items()
    )


def test_addresses():
    assert diracparams.model_urls == {
        'diracnet18': 'https://s3.amazonaws.com/modelzoo-networks/diracnet18v2folded-a2174e15.pth',
        'diracnet34': 'https://s3.amazonaws.com/modelzoo-networks/diracnet34v2folded-dfb15d34.pth',
    }


def test_pretrained(publish, server, capfd):
    for define in (diracnet18, diracnet34):
        weights = OrderedDict(
            (key, torch.randn_like(tensor)) for key, tensor in define().state_dict().items()
        )
        _, cached = publish(define.__name__, weights)
        for _ in range(2):
            assert equal(define(pretrained=True), weights)
        assert cached.exists()
        assert '100%' in capfd.readouterr().err  # the progress bar
    assert len(server.requests) == 2  # one each: the second time from the cache


def test_wrong_hash(publish, small_weights):
    _, cached = publish('diracnet18', small_weights, digest='0123abcd')
    with pytest.raises(RuntimeError) as error:
        diracnet18(pretrained=True)
    for words in (diracparams.model_urls['diracnet18'], str(cached), '0123abcd', 'invalid hash'):
        assert words in str(error.value)
    assert not cached.exists() and not list(cached.parent.iterdir())


def test_truncated_transfer_and_server_error(publish, server, small_weights):
    file_name, cached = publish('diracnet18', small_weights)
    _, content, length = server.files[file_name]
    for answer in ((200, content[: len(content) // 2], length), (500, b'', 0), (404, b'', 0)):
        server.files[file_name] = answer
        with pytest.raises(RuntimeError) as error:
            diracnet18(pretrained=True)
        assert str(cached) in str(error.value) and file_name in str(error.value)
        assert not cached.exists() and not list(cached.parent.iterdir())
    server.files[file_name] = (200, content, length)
    assert equal(diracnet18(pretrained=True, width=0.125), small_weights)


def test_without_a_network(publish, server, small_weights):
    file_name, cached = publish('diracnet18', small_weights)
    server.shutdown()
    server.server_close()
    with pytest.raises(RuntimeError) as error:
        diracnet18(pretrained=True)
    prefix = file_name[-12:-4]
    for words in (diracparams.model_urls['diracnet18'], str(cached), prefix, 'refused'):
        assert words in str(error.value)
    assert '\n' not in str(error.value)
    # The remedy that it names.
    cached.write_bytes(server.files[file_name][1])
    assert equal(diracnet18(pretrained=True, width=0.125), small_weights)


def test_cached_file_that_is_broken_or_has_code(publish, server, small_weights, tmp_path):
    _, cached = publish('diracnet18', small_weights)
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b'something else')
    with pytest.raises(RuntimeError) as error:
        diracnet18(pretrained=True)
    for words in (str(cached), diracparams.model_urls['diracnet18'], 'remove'):
        assert words in str(error.value)
    assert server.requests == []
    cached.unlink()
    publish('diracnet18', {'features.conv.weight': Malicious(tmp_path / 'trap')})
    with pytest.raises(pickle.UnpicklingError):
        diracnet18(pretrained=True)
    assert not (tmp_path / 'trap').exists()


def test_pretrained_weights_fit_no_other_network(publish, small_weights):
    publish('diracnet18', small_weights)
    assert diracnet18(pretrained=True, width=0.125).fc.out_features == 1000
    with pytest.raises(ValueError, match='1000 classes'):
        diracnet18(pretrained=True, width=0.125, num_classes=10)

"""Dirac layers and networks among torch's tracers, compilers, transforms and other tools."""

import copy
import io

import pytest
import torch
import torchvision
from torch import nn
from torch.ao.quantization import get_default_qat_qconfig_mapping, get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx
from torch.autograd import functional
from torch.func import functional_call, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap
from torch.nn.utils.parametrize import register_parametrization
from torchvision.models.feature_extraction import create_feature_extractor

from diracconv import DiracConv1d, DiracConv2d, DiracConv3d, DiracParametrization
from diracify import diracify
from diracnet import Network, define_diracnet
from test import randomized, relative_error


def parametrized():
    conv = nn.Conv2d(4, 6, 3, groups=2, dtype=torch.double)
    register_parametrization(conv, 'weight', DiracParametrization(conv))
    return conv


def diracnet():
    """The weights of its two blocks of equal shape are computed as groups of one weight."""
    f, params = define_diracnet(10, 0.25, 'digits')
    return Network(f, randomized(params)).double().eval()


NETWORKS = {  # with the size of their inputs
    '1d': (lambda: DiracConv1d(3, 260, 3, dtype=torch.double), (3, 8)),
    '2d': (lambda: DiracConv2d(6, 3, (4, 5), padding=1, dtype=torch.double), (6, 7, 7)),
    '3d': (lambda: DiracConv3d(3, 3, 3, 2, 1, padding_mode='reflect').double(), (3, 5, 5, 5)),
    'parametrization': (parametrized, (4, 6, 6)),
    'diracnet': (diracnet, (1, 8, 8)),
}


@pytest.fixture(params=NETWORKS)
def case(request):
    """A network in double precision, with random scales, and inputs."""
    torch.manual_seed(0)
    make, size = NETWORKS[request.param]
    network = make()
    randomized(dict(network.named_parameters()))
    return network, torch.randn(2, *size, dtype=torch.double)


# --- graphs ----------------------------------------------------------------------------------


def jit_trace(network, x):
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(network, x), file)
    file.seek(0)
    return torch.jit.load(file)


def decomposed(network, x):
    return torch.export.export(network, (x,)).run_decompositions().module()


def compiled(network, x):
    # All of the tracing without the C++ compiler, which is slow; test_recompute.py uses it.
    return torch.compile(network, fullgraph=True, backend='aot_eager')


def fx_graph(network, x):
    return copy.deepcopy(torch.fx.symbolic_trace(network))


def onnx_session(network, x, **options):
    onnxruntime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    file = io.BytesIO()
    torch.onnx.export(network, (x,), file, verbose=False, **options)
    session = onnxruntime.InferenceSession(file.getvalue())
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def onnx(network, x):
    return onnx_session(network, x, dynamo=True)


def onnx_by_torchscript(network, x):
    return onnx_session(network, x, dynamo=False)


@pytest.mark.parametrize('convert', [jit_trace, decomposed, compiled, fx_graph])
@pytest.mark.filterwarnings('ignore')  # torch.jit is deprecated
def test_graphs(case, convert):
    network, x = case
    graph = convert(network, x)
    torch.testing.assert_close(graph(x), network(x))
    if convert is compiled:
        expected = torch.autograd.grad(network(x).pow(2).sum(), list(network.parameters()))
        actual = torch.autograd.grad(graph(x).pow(2).sum(), list(network.parameters()))
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize('convert', [onnx, onnx_by_torchscript])
@pytest.mark.filterwarnings('ignore')
def test_onnx(case, convert):
    network, x = case[0].float(), case[1].float()  # ONNX Runtime has no convolutions in double
    assert relative_error(convert(network, x)(x), network(x)) < 1e-5


@pytest.mark.filterwarnings('ignore')
def test_script_is_refused(case):
    for network in (case[0], nn.Sequential(case[0])):
        with pytest.raises(NotImplementedError, match='torch.jit.script cannot compile'):
            torch.jit.script(network)


# --- torch.func ------------------------------------------------------------------------------


def test_vmap(case):
    """Over each parameter alone, along each side, and over all of them and the inputs."""
    network, x = case
    for name, parameter in network.named_parameters():

        def function(value, name=name):
            return functional_call(network, {name: value}, x)

        values = torch.stack([parameter.detach(), 2 * parameter.detach() + 1])
        expected = torch.stack([function(value) for value in values])
        torch.testing.assert_close(vmap(function)(values), expected)
        last = values.movedim(0, -1).contiguous()
        torch.testing.assert_close(vmap(function, in_dims=-1)(last), expected)
    networks = [network, copy.deepcopy(network)]
    with torch.no_grad():
        for parameter in networks[1].parameters():
            parameter.mul_(2)
    inputs = torch.stack([x, 2 * x, -x])
    states = stack_module_state(networks)

    def ensemble(x):
        return vmap(lambda *state: functional_call(network, state, x))(*states)

    expected = torch.stack([torch.stack([net(x) for net in networks]) for x in inputs])
    torch.testing.assert_close(vmap(ensemble)(inputs), expected)


def test_derivatives(case):
    """Forward-mode and nested ones, against those that only differentiate backwards."""
    network, x = case
    for name, parameter in list(network.named_parameters())[:4]:
        value = parameter.detach()

        def function(value, name=name):
            return functional_call(network, {name: value}, x).flatten()[:3].pow(3)

        _, expected = functional.jvp(function, value, torch.ones_like(value))
        _, actual = jvp(function, (value,), (torch.ones_like(value),))
        torch.testing.assert_close(actual, expected)
        expected = functional.jacobian(function, value)
        for jacobian in (jacrev, jacfwd):
            torch.testing.assert_close(jacobian(function)(value), expected)
        if value.numel() < 100:
            expected = functional.hessian(lambda value: function(value).sum(), value)
            actual = hessian(lambda value: function(value).sum())(value)
            torch.testing.assert_close(actual, expected)


# --- tools that read a graph of torch.fx -----------------------------------------------------


@pytest.fixture(scope='module')
def resnet():
    return diracify(torchvision.models.resnet18(num_classes=5)).eval()


def test_feature_extractor(resnet):
    x = torch.randn(2, 3, 32, 32)
    features = create_feature_extractor(resnet, ['layer1', 'fc'])(x)
    assert features['layer1'].shape == (2, 64, 8, 8)
    assert torch.equal(features['fc'], resnet(x))


@pytest.mark.filterwarnings('ignore')  # torch.ao.quantization is deprecated
@pytest.mark.parametrize(
    'prepare, mapping',
    [(prepare_fx, get_default_qconfig_mapping), (prepare_qat_fx, get_default_qat_qconfig_mapping)],
)
def test_quantization(prepare, mapping):
    """As for the plain network with the same weights, which prepare_qat_fx also trains."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
    dirac, x, logits = diracify(copy.deepcopy(plain)), torch.randn(4, 3, 8, 8), []
    for network in (plain, dirac):
        prepared = prepare(network.train(prepare is prepare_qat_fx), mapping('x86'), (x,))
        prepared(x)
        logits.append(convert_fx(prepared.eval())(x))
    assert relative_error(logits[1], logits[0]) < 0.05

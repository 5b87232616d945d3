"""Networks of hundreds and thousands of layers: folded and exported."""

import cProfile
import gc
import pstats
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F

from diracnet import DiracNet, Network, define_diracnet, fold
from lab.data import datasets
from lab.data.preprocessing import normalize
from lab.folded import compute_logits
from lab.models import registry
from lab.onnx_models import OnnxNetwork, to_onnx
from lab.runs import checkpoint


@cache
def digits():
    """All training digits, normalized: (1437, 1, 8, 8)."""
    data = datasets.load('digits', '.')
    return normalize(data.train[0], data.preprocessing).contiguous()


def of_this_batch(x, mean, var, weight, bias, training, momentum, eps):
    """Batch norm that sets the running statistics to those of the batch."""
    return F.batch_norm(x, mean, var, weight, bias, training, 1, eps)


@cache
@torch.no_grad()
def deep(depth):
    """f, params of a network with random scales, as training might leave them.

    Its running statistics are those of 256 digits, since random ones would make the signal explode
    or vanish.
    """
    torch.manual_seed(0)
    f, params = define_diracnet(depth, 1, 'digits', bn_init='shifted')
    for key, tensor in params.items():
        if key.endswith(('alpha', 'beta', 'bn.weight')):
            tensor.mul_(torch.empty_like(tensor).uniform_(0.8, 1.2))
        elif key.endswith('bn.bias'):
            tensor.add_(torch.empty_like(tensor).uniform_(-0.2, 0.2))
    f(digits()[:256], params, True, norm=of_this_batch)
    return f, params


def folded(params):
    return DiracNet.from_state_dict(fold(params)).eval()


def relative_error(actual, expected):
    """The largest difference of two logits over the largest logit."""
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def assert_same_network(actual, expected):
    """The logits of a converted network are within 1e-4 and the classes are the same. The logits
    of two images differ by far more than that."""
    assert relative_error(actual, expected) < 1e-4
    assert (actual.argmax(1) == expected.argmax(1)).all()
    assert expected.std(0).max() > 0.1 * np.abs(expected).max()


def test_folds():
    f, params = deep(1000)
    images = digits()[-64:]
    expected = compute_logits(Network(f, params).eval(), images)
    assert_same_network(compute_logits(folded(params), images), expected)


def test_exports_to_onnx():
    f, params = deep(502)
    images = digits()[-64:]
    model = to_onnx(folded(params), images.shape[1:], {})
    assert sum(node.op_type == 'Conv' for node in model.graph.node) == 498 + 1  # blocks and stem
    logits = compute_logits(OnnxNetwork(model.SerializeToString()), images)
    assert_same_network(logits, compute_logits(Network(f, params).eval(), images))


def test_linear_in_depth(tmp_path):
    """Ten times the layers take about ten times the function calls."""
    function_calls(10, tmp_path)  # imports what is imported late
    few, many = function_calls(40, tmp_path), function_calls(400, tmp_path)
    for step in few:
        assert many[step] < 12 * few[step], step


def function_calls(depth, folder):
    """The number of calls in each step of a network's way from its definition to its use."""
    calls, path = {}, folder / f'{depth}.pt7'

    def counted(name, function):
        gc.disable()  # what it would finalize of other tests is not this step's work
        try:
            with cProfile.Profile() as profile:
                result = function()
        finally:
            gc.enable()
        calls[name] = pstats.Stats(profile).total_calls
        return result

    f, params = counted('define', lambda: define_diracnet(depth, 1 / 16, 'digits'))
    net = counted('module', lambda: Network(f, params).eval())
    counted('logits', lambda: compute_logits(net, digits()[:1]))
    counted('recognize', lambda: registry.recognize(params))
    counted(
        'save', lambda: checkpoint.save(path, {'params': net.state_dict()}, keep_previous=False)
    )
    loaded = counted('load', lambda: checkpoint.load(path))
    counted('load into a module', loaded.module)
    counted('fold', loaded.fold)
    return calls

"""diracconv.py beyond test.py: arguments, state dicts, other types and devices."""

import copy
import inspect

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from diracconv import DiracConv2d, dirac_weight
from test import LAYERS, random_layer, relative_error


def test_takes_the_arguments_of_torch():
    for kind, conv in ((1, nn.Conv1d), (2, nn.Conv2d), (3, nn.Conv3d)):
        assert issubclass(LAYERS[kind], conv)
        assert inspect.signature(LAYERS[kind]) == inspect.signature(conv)

    class Square(DiracConv2d):
        def __init__(self, channels):
            super().__init__(channels, channels, 3, padding=1)

    class Same(Square):
        pass

    assert str(inspect.signature(Square)) == str(inspect.signature(Same)) == '(channels)'
    assert Same(4)(torch.zeros(1, 4, 5, 5)).shape == (1, 4, 5, 5)


def test_memory_format_does_not_matter():
    weight, alpha, beta = torch.randn(6, 5, 3, 3), torch.randn(6), torch.randn(6)
    expected = dirac_weight(weight, alpha, beta)
    strided = torch.randn(5, 6, 3, 3).transpose(0, 1).copy_(weight)
    for other in (weight.to(memory_format=torch.channels_last), strided):
        torch.testing.assert_close(dirac_weight(other, alpha, beta), expected)


@pytest.mark.parametrize('kind', LAYERS)
def test_loads_the_originals_state_dicts(kind):
    """They also have `delta`, the identity."""
    layer = random_layer(kind, 4, 6, 3)
    state = {**layer.state_dict(), 'delta': nn.init.dirac_(torch.empty_like(layer.weight))}
    other = nn.Sequential(LAYERS[kind](4, 6, 3))
    other.load_state_dict({f'0.{key}': tensor for key, tensor in state.items()})
    x = torch.randn(2, 4, *[5] * kind)
    assert torch.equal(other(x), layer(x))
    assert 'delta' not in layer.state_dict()
    state['delta'] = state['delta'].flip(0)
    with pytest.raises(RuntimeError, match='delta is not the identity'):
        LAYERS[kind](4, 6, 3).load_state_dict(state)


def test_repr_reads_no_values():
    """They may be fake or sharded."""
    conv = nn.Conv2d(4, 6, 3, padding=1, bias=False)
    with FakeTensorMode():
        layer = DiracConv2d(4, 6, 3, padding=1, bias=False)
    assert repr(layer) == repr(conv).replace('Conv2d', 'DiracConv2d')


# The tolerances are about two units in the last place.
@pytest.mark.parametrize('dtype, tolerance', [(torch.half, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize('kind', LAYERS)
def test_low_precision(device, kind, dtype, tolerance):
    layer = random_layer(kind, 4, 4, 3).to(device)
    low = copy.deepcopy(layer).to(dtype)
    x = torch.randn(2, 4, *[5] * kind, device=device).to(dtype)
    y = low(x)
    assert y.dtype is dtype
    assert relative_error(y.float(), layer(x.float())) < 2 * tolerance
    assert relative_error(low.fold()(x), y) < 2 * tolerance
    y.float().sum().backward()
    assert low.weight.grad.isfinite().all()


def test_autocast():
    layer = random_layer(2, 4, 4, 3)
    with torch.autocast('cpu', torch.bfloat16):
        assert layer(torch.randn(2, 4, 5, 5)).dtype is torch.bfloat16


def test_meta_device():
    layer = DiracConv2d(4, 6, 3, padding=1, device='meta', dtype=torch.half)
    x = torch.empty(2, 4, 8, 8, device='meta', dtype=torch.half)
    assert layer(x).shape == (2, 6, 8, 8)
    assert layer.fold().weight.is_meta
    layer.to_empty(device='cpu').reset_parameters()
    assert (layer.alpha == 1).all() and layer.weight.isfinite().all()

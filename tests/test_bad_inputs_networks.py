"""Networks that diracify.py cannot convert in full: still right, and a warning names what stays."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from test_diracify import BatchNormAct, OwnConv, randomize
from torch import nn
from torch.nn.utils import parametrizations, prune

from diracconv import DiracConv2d
from diracify import diracify, fold
from test import relative_error

# --- convolutions that cannot get a Dirac weight -----------------------------------------------


class SubclassConv(nn.Conv2d):
    """Has the forward of its base class."""


class OwnInnerConv(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, 2 * weight, bias)


def conv(kind=nn.Conv2d):
    return kind(4, 4, 3, padding=1)


def with_own_forward():
    module = conv()
    module.forward = lambda x: 2 * x
    return module


def with_shared_weight():
    pair = nn.Sequential(conv(), conv())
    pair[1].weight = pair[0].weight
    return pair


def quantized():
    with warnings.catch_warnings():  # torch deprecates it
        warnings.simplefilter('ignore')
        return torch.ao.nn.quantized.Conv2d(4, 4, 3, padding=1)


UNCHANGEABLE = {
    'weight_norm': lambda: nn.utils.weight_norm(conv()),
    'weight_norm, new': lambda: parametrizations.weight_norm(conv()),
    'spectral_norm': lambda: nn.utils.spectral_norm(conv()),
    'spectral_norm, new': lambda: parametrizations.spectral_norm(conv()),
    'pruned': lambda: prune.l1_unstructured(conv(), 'weight', 0.5),
    'pruned bias': lambda: prune.random_unstructured(conv(), 'bias', 0.5),
    'lazy': lambda: nn.LazyConv2d(4, 3, padding=1),
    'transposed': lambda: conv(nn.ConvTranspose2d),
    'own forward': lambda: conv(OwnConv),
    'own _conv_forward': lambda: conv(OwnInnerConv),
    'own forward of one module': with_own_forward,
    'shared weight': with_shared_weight,
    'complex': lambda: nn.Conv2d(4, 4, 3, padding=1, dtype=torch.cfloat),
    'quantized': quantized,
}


@pytest.mark.parametrize('name', UNCHANGEABLE)
def test_what_cannot_be_replaced_is_named(name, capfd):
    odd = UNCHANGEABLE[name]()
    model = nn.ModuleDict({'odd': odd, 'plain': conv(), 'subclass': conv(SubclassConv)})
    with pytest.warns(UserWarning, match=r'\bodd[. ]') as caught:
        diracify(model)
    assert len(caught) == 1
    assert 'plain' not in str(caught[0].message)
    assert ' 2 of ' in capfd.readouterr().err
    assert model.odd is odd
    assert type(model.plain) is type(model.subclass) is DiracConv2d


# --- batch norms that cannot be folded, among those that can ------------------------------------


class ShiftedNorm(BatchNormAct):
    """Computes its scale, so that folding its weight would be wrong."""

    def scale(self):
        return self.weight + 1


class BatchStatistics(BatchNormAct):
    """Normalizes with the statistics of the batch in evaluation mode, too."""

    always_batch = True


class WrittenNorm(nn.BatchNorm2d):
    """Computes its formula itself."""

    def forward(self, x):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


class SubclassNorm(nn.BatchNorm2d):
    """Has the forward of its base class."""


class TwoReaders(nn.Module):
    """The activation and the output read the convolution."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = conv(), BatchNormAct(4)

    def forward(self, x):
        x = self.conv(x)
        return self.bn(x) + x


class ReadsWeight(TwoReaders):
    """Uses the weight of its convolution once more."""

    def forward(self, x):
        return F.conv2d(self.bn(self.conv(x)), self.conv.weight)


def frozen_norm():
    from torchvision.ops import FrozenBatchNorm2d

    return FrozenBatchNorm2d(4)


def hooked(module, register='register_forward_hook'):
    getattr(module, register)(lambda module, inputs, *outputs: 2 * (outputs or inputs)[0])
    return module


def swapped_linear():
    """The batch norm normalizes the second of three dimensions, not the features."""
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(4))


# Networks with one batch norm, and the name of the batch norm if it cannot be folded.
ONE_NORM = {
    'activation': (lambda: nn.Sequential(conv(), BatchNormAct(4)), None),
    'not affine': (lambda: nn.Sequential(conv(), nn.BatchNorm2d(4, affine=False)), None),
    'subclasses': (lambda: nn.Sequential(conv(SubclassConv), SubclassNorm(4)), None),
    'synchronized': (lambda: nn.Sequential(conv(), nn.SyncBatchNorm(4)), None),
    'linear': (lambda: nn.Sequential(nn.Flatten(), nn.Linear(100, 3), nn.BatchNorm1d(3)), None),
    'linear, 3-d': (
        lambda: nn.Sequential(nn.Flatten(2), nn.Linear(25, 5), swapped_linear()),
        '2.1',
    ),
    'no layer': (lambda: nn.Sequential(BatchNormAct(4), conv()), '0'),
    'network of its own': (lambda: BatchNormAct(4), 'BatchNormAct'),
    'ReLU between': (lambda: nn.Sequential(conv(), nn.ReLU(), BatchNormAct(4)), '2'),
    'no statistics, written out': (lambda: nn.Sequential(conv(), WrittenNorm(4)), '1'),
    'computed scale': (lambda: nn.Sequential(conv(), ShiftedNorm(4)), '1'),
    'linear, 4-d': (lambda: nn.Sequential(nn.Linear(5, 4), BatchNormAct(4)), '1'),
    'batch statistics': (lambda: nn.Sequential(conv(), BatchStatistics(4)), '1'),
    'no statistics': (
        lambda: nn.Sequential(conv(), BatchNormAct(4, False, track_running_stats=False)),
        '1',
    ),
    'no statistics, module': (
        lambda: nn.Sequential(conv(), nn.BatchNorm2d(4, track_running_stats=False)),
        '1',
    ),
    'frozen': (lambda: nn.Sequential(conv(), frozen_norm()), '1'),
    'two readers': (TwoReaders, 'bn'),
    'weight read twice': (ReadsWeight, 'bn'),
    'own convolution': (lambda: nn.Sequential(conv(OwnConv), nn.BatchNorm2d(4)), '1'),
    'transposed': (lambda: nn.Sequential(conv(nn.ConvTranspose2d), nn.BatchNorm2d(4)), '1'),
    'weight norm': (
        lambda: nn.Sequential(parametrizations.weight_norm(conv()), nn.BatchNorm2d(4)),
        '1',
    ),
    'weight norm, old': (
        lambda: nn.Sequential(nn.utils.weight_norm(conv()), nn.BatchNorm2d(4)),
        '1',
    ),
    'pruned': (lambda: nn.Sequential(UNCHANGEABLE['pruned'](), nn.BatchNorm2d(4)), '1'),
    'pruned bias': (lambda: nn.Sequential(UNCHANGEABLE['pruned bias'](), nn.BatchNorm2d(4)), '1'),
    'hook after convolution': (lambda: nn.Sequential(hooked(conv()), BatchNormAct(4)), '1'),
    'hook before norm': (
        lambda: nn.Sequential(conv(), hooked(nn.BatchNorm2d(4), 'register_forward_pre_hook')),
        '1',
    ),
    'hook after norm': (lambda: nn.Sequential(conv(), hooked(nn.BatchNorm2d(4))), '1'),
    'hook after activation': (lambda: nn.Sequential(conv(), hooked(BatchNormAct(4))), None),
    'hook after network': (lambda: hooked(nn.Sequential(conv(), BatchNormAct(4))), None),
}


@pytest.mark.parametrize('name', ONE_NORM)
def test_a_batch_norm_is_folded_or_named(name):
    torch.manual_seed(0)
    make, left = ONE_NORM[name]
    model = randomize(make()).double().eval()
    x = torch.randn(2, 4, 5, 5, dtype=torch.double)
    expected = model(x)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        folded = fold(model)
    assert relative_error(folded(x), expected) < 1e-10
    assert [str(warning.message).rpartition(': ')[2] for warning in caught] == [left] * bool(left)
    has_statistics = any('running_var' in key for key in folded.state_dict())
    assert has_statistics == (bool(left) and not name.startswith('no statistics'))


def test_a_folded_linear_layer_refuses_sequences():
    model = randomize(nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5))).eval()
    folded = fold(model)
    x = torch.randn(5, 5)
    assert relative_error(folded(x), model(x)) < 1e-5
    with pytest.raises(AssertionError, match='linear'):
        folded(x[None])  # the batch norm would normalize the wrong dimension

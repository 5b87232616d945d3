"""Networks that diracify.py cannot convert in full: still right, and a warning names what stays."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from test_diracify import BatchNormAct, OwnConv, randomize
from torch import nn
from torch.nn.utils import parametrizations, prune
from torchvision.ops import FrozenBatchNorm2d

from diracconv import DiracConv2d
from diracify import diracify, fold
from test import relative_error

# --- convolutions that cannot get a Dirac weight -----------------------------------------------


class SubclassConv(nn.Conv2d):
    """Has the forward of its base class."""


class OwnInnerConv(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, 2 * weight, bias)


def conv(kind=nn.Conv2d, **kwargs):
    return kind(4, 4, 3, padding=1, **kwargs)


UNCHANGEABLE = {
    'weight_norm': lambda: parametrizations.weight_norm(conv()),
    'spectral_norm': lambda: nn.utils.spectral_norm(conv()),  # in the old way of torch
    'pruned': lambda: prune.l1_unstructured(conv(), 'weight', 0.5),
    'pruned bias': lambda: prune.random_unstructured(conv(), 'bias', 0.5),
    'lazy': lambda: nn.LazyConv2d(4, 3, padding=1),
    'transposed': lambda: conv(nn.ConvTranspose2d),
    'own forward': lambda: conv(OwnConv),
    'own _conv_forward': lambda: conv(OwnInnerConv),
    'complex': lambda: conv(dtype=torch.cfloat),
    'quantized': lambda: conv(torch.ao.nn.quantized.Conv2d),
}


@pytest.mark.parametrize('name', UNCHANGEABLE)
def test_what_cannot_be_replaced_is_named(name):
    odd = UNCHANGEABLE[name]()
    model = nn.ModuleDict({'odd': odd, 'plain': conv(), 'subclass': conv(SubclassConv)})
    with pytest.warns(UserWarning, match=r'\bodd[. ]') as caught:
        diracify(model)
    assert len(caught) == 1 and 'plain' not in str(caught[0].message)
    assert model.odd is odd
    assert type(model.plain) is type(model.subclass) is DiracConv2d


def test_a_shared_weight_stays_shared():
    model = nn.Sequential(conv(), conv())
    model[1].weight = model[0].weight
    with pytest.warns(UserWarning, match=r'\b0\b.*\b1\b'):
        diracify(model)
    assert model[1].weight is model[0].weight


# --- batch norms that cannot be folded, among those that can ------------------------------------


class ShiftedNorm(BatchNormAct):
    """Computes its scale, so that folding its weight would be wrong."""

    def scale(self):
        return self.weight + 1


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


class CalledTwice(TwoReaders):
    """Computes the same function of two images."""

    def forward(self, x):
        return self.bn(self.conv(x)) - self.bn(self.conv(x.flip(-1)))


def hooked(module, register='register_forward_hook'):
    getattr(module, register)(lambda module, inputs, *outputs: 2 * (outputs or inputs)[0])
    return module


def after(layer):
    """The layer and a batch norm that reads it."""
    return nn.Sequential(layer, nn.BatchNorm2d(4))


def before(norm):
    """A batch norm, after the convolution that it reads."""
    return nn.Sequential(conv(), norm)


# Networks with one batch norm that can be folded.
FOLDED = {
    'activation': lambda: before(BatchNormAct(4)),
    'not affine': lambda: before(nn.BatchNorm2d(4, affine=False)),
    'subclass': lambda: after(conv(SubclassConv)),
    'synchronized': lambda: before(nn.SyncBatchNorm(4)),
    'linear': lambda: nn.Sequential(nn.Flatten(), nn.Linear(100, 3), nn.BatchNorm1d(3)),
    'pruned': lambda: after(UNCHANGEABLE['pruned']()),
    'pruned bias': lambda: after(UNCHANGEABLE['pruned bias']()),
    'called twice': lambda: CalledTwice(),
    'hook after activation': lambda: before(hooked(BatchNormAct(4))),
    'hook after network': lambda: hooked(before(BatchNormAct(4))),
}
# Networks with one batch norm that cannot, and its name.
LEFT = {
    # It normalizes the second of three dimensions, not the features.
    'linear, 3-d': (
        lambda: nn.Sequential(nn.Flatten(2), nn.Linear(25, 6), nn.BatchNorm1d(4)),
        '2',
    ),
    'linear, 4-d': (lambda: nn.Sequential(nn.Linear(5, 4), BatchNormAct(4)), '1'),
    'no layer': (lambda: nn.Sequential(BatchNormAct(4), conv()), '0'),
    'network of its own': (lambda: BatchNormAct(4), 'BatchNormAct'),
    'ReLU between': (lambda: nn.Sequential(conv(), nn.ReLU(), BatchNormAct(4)), '2'),
    'computed scale': (lambda: before(ShiftedNorm(4)), '1'),
    'no statistics': (lambda: before(nn.BatchNorm2d(4, track_running_stats=False)), '1'),
    'frozen': (lambda: before(FrozenBatchNorm2d(4)), '1'),
    'two readers': (TwoReaders, 'bn'),
    'weight read twice': (ReadsWeight, 'bn'),
    'own convolution': (lambda: after(conv(OwnConv)), '1'),
    'weight norm': (lambda: after(UNCHANGEABLE['weight_norm']()), '1'),
    'hook after convolution': (lambda: after(hooked(conv())), '1'),
    'hook before norm': (
        lambda: before(hooked(nn.BatchNorm2d(4), 'register_forward_pre_hook')),
        '1',
    ),
    'hook after norm': (lambda: before(hooked(nn.BatchNorm2d(4))), '1'),
}


def fold_and_compare(model):
    """Fold a network that computes the same afterwards; returns it and the ends of all warnings."""
    model, x = randomize(model).double().eval(), torch.randn(2, 4, 5, 5, dtype=torch.double)
    expected = model(x)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        folded = fold(model)
    assert relative_error(folded(x), expected) < 1e-10
    return folded, [str(warning.message).rpartition(': ')[2] for warning in caught]


@pytest.mark.parametrize('name', FOLDED)
def test_a_batch_norm_is_folded(name):
    folded, left = fold_and_compare(FOLDED[name]())
    assert left == []
    assert not any('running_var' in key for key in folded.state_dict())


@pytest.mark.parametrize('name', LEFT)
def test_a_batch_norm_that_stays_is_named(name):
    make, norm = LEFT[name]
    _, left = fold_and_compare(make())
    assert left == [norm]


def test_a_folded_linear_layer_refuses_sequences():
    model = randomize(nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5))).eval()
    folded = fold(model)
    x = torch.randn(5, 5)
    assert relative_error(folded(x), model(x)) < 1e-5
    with pytest.raises(AssertionError, match='linear'):
        folded(x[None])  # the batch norm would normalize the wrong dimension

"""Networks that diracify.py cannot convert in full: still right, and a warning names what stays."""

import threading
import warnings
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from test_diracify import BatchNormAct, OwnConv, randomize
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint
from torchvision.ops import FrozenBatchNorm2d

from diracconv import DiracConv2d
from diracify import diracify, fold
from diracnet import Network, define_diracnet, diracnet
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


# --- folding changes nothing else ----------------------------------------------------------------


class Block(nn.Module):
    """Networks below differ in their forward. `features` is for other callers."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = conv(DiracConv2d), nn.BatchNorm2d(4)
        self.features = before(nn.BatchNorm2d(4))

    def forward(self, x, mask=None):
        x = self.bn(self.conv(x))
        return x if mask is None else x * mask


class Branches(Block):
    def forward(self, x):
        x = self.bn(self.conv(x))
        if hasattr(x, 'tensors'):
            raise ValueError('not for nested tensors')
        assert x.shape[1] == 4
        return 2 * x if isinstance(x, torch.Tensor) and x.sum() != 0 else x


class BranchBetween(Block):
    def forward(self, x, early=False):
        x = self.conv(x)
        if early:
            return x
        return self.bn(x)


class DefaultBetween(Block):
    def forward(self, x, mask=None):
        x = self.conv(x)
        if mask is None:
            x = x + 1
        return self.bn(x)


class TensorBetween(Block):
    def forward(self, x):
        x = self.conv(x)
        if isinstance(x, torch.Tensor) and not hasattr(x, 'tensors'):
            x = x + 1
        return self.bn(x)


class ReadsNorm(Block):
    def forward(self, x):
        return self.bn(self.conv(x)) * self.bn.weight[:, None, None]


class Noise(Block):
    def forward(self, x):
        self.last = x
        with torch.no_grad():
            return self.bn(self.conv(x)) + torch.randn(x.shape)


class Endless(Block):
    def forward(self, x):
        while not (x.amax() > 9):
            x = self.features(x).abs() + x.abs() + 1
        return x


class Checkpointed(Block):
    def forward(self, x):
        return checkpoint(self.features, x, use_reentrant=False)


class HoldsList(Block):
    def __init__(self):
        super().__init__()
        self.steps = [self.conv, (self.bn, torch.relu)]

    def forward(self, x):
        first, rest = self.steps
        return rest[1](rest[0](first(x)))


class ReadsParts(Block):
    def forward(self, x):
        for _ in range(int(x.shape[0])):
            x = self.features[0](x) + 1
        return self.features(x)


class Sizes(Block):
    def forward(self, x, sizes=None):
        x = self.conv(x)
        if sizes:
            return torch.cat([F.adaptive_avg_pool2d(x, size).flatten(1) for size in sizes], 1)
        return self.bn(x)


class TwoOptions(Block):
    def forward(self, x, early=None, late=None):
        x = self.conv(x)
        return x if early is not None and late is None else self.bn(x)


class Mode(Block):
    def forward(self, x, mode='all'):
        x = self.conv(x)
        return x if mode in {'early'} else self.bn(x)


class Stores(Block):
    def forward(self, x):
        self.seen = [self.conv(x)]
        return self.bn(self.seen[0])


class Flag(Block):
    def forward(self, x, normalize=True):
        x = self.conv(x)
        return x if normalize is False else self.bn(x)


class Alias(Block):
    def __init__(self):
        super().__init__()
        del self.conv
        self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))
        self.conv = conv()
        self.conv.weight = self.weight

    def forward(self, x):
        return self.bn(self.conv(x)) + F.conv2d(x, self.conv.weight, padding=1)


class TrainsItself(Block):
    def train(self, mode=True):
        super().train(mode)


@pytest.mark.parametrize(
    'kind, kwargs, left',
    [
        (Block, {}, []),
        (Block, {'mask': torch.rand(2, 4, 5, 5)}, []),
        (Branches, {}, []),
        (BranchBetween, {}, ['bn']),
        (BranchBetween, {'early': True}, ['bn']),
        (DefaultBetween, {}, ['bn']),
        (DefaultBetween, {'mask': 1}, ['bn']),
        (TensorBetween, {}, ['bn']),
        (ReadsNorm, {}, ['bn']),
        (Noise, {}, []),
        (Endless, {}, ['bn']),
        (Checkpointed, {}, ['bn', 'features.1']),
        (HoldsList, {}, []),
        (ReadsParts, {}, ['bn', 'features.1']),
        (Sizes, {}, ['bn']),
        (Sizes, {'sizes': [2, 3]}, ['bn']),
        (TwoOptions, {}, ['bn']),
        (TwoOptions, {'early': 1}, ['bn']),
        (Mode, {}, ['bn']),
        (Mode, {'mode': 'early'}, ['bn']),
        (Stores, {}, ['bn']),
        (Flag, {'normalize': False}, ['bn']),
        (Alias, {}, ['bn']),
        (TrainsItself, {}, []),
    ],
)
def test_a_folded_network_takes_the_branches_of_the_original(kind, kwargs, left):
    model, x = randomize(kind()), torch.randn(2, 4, 5, 5)
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        folded = fold(model)
    for seed in range(2):  # a random number is drawn anew
        outputs = []
        for network in (model, folded):
            torch.manual_seed(seed)
            outputs.append(network(x, **kwargs))
        assert relative_error(outputs[1], outputs[0]) < 1e-5
    assert outputs[0].requires_grad == outputs[1].requires_grad
    assert type(folded) is kind and type(folded.conv) is nn.Conv2d
    assert relative_error(folded.features(x), model.features(x)) < 1e-5
    assert [name for name, m in folded.named_modules() if isinstance(m, nn.BatchNorm2d)] == left


def test_a_forward_of_the_instance_stays():
    model, x = randomize(Block()), torch.randn(2, 4, 5, 5)
    model.forward = MethodType(lambda self, x: self.bn(self.conv(x) + 1), model.eval())
    with pytest.warns(UserWarning, match='bn$'):
        folded = fold(model)
    assert relative_error(folded(x), model(x)) < 1e-5


class ScaledConv(DiracConv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class SquaredConv(DiracConv2d):
    def dirac_weight(self):
        return super().dirac_weight() ** 2


class Sum(Network):
    def forward(self, x):
        return super().forward(x).sum(1)


class Half(nn.DataParallel):
    def forward(self, x):
        return super().forward(x) / 2


def test_subclasses_compute_as_before():
    network = Sum(*define_diracnet(10, 1, 'digits')).eval()
    cases = [(conv(ScaledConv), 4), (conv(SquaredConv), 4), (network, 1), (Half(conv()), 4)]
    for module, channels in cases:
        x = torch.randn(2, channels, 8, 8)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            assert relative_error(fold(module)(x), module(x)) < 1e-5


def test_a_partly_frozen_network():
    network = diracnet(10, dataset='digits')
    frozen = ['conv', 'group1.block0.bn.bias', 'fc.weight']
    for key in frozen:
        network.get_parameter(key).requires_grad_(False)
    kept = {name for name, p in fold(network).named_parameters() if not p.requires_grad}
    assert kept == {'features.conv.weight', 'features.group1.block0.conv.bias', 'fc.weight'}


def test_hooks_and_frozen_parameters_stay():
    model = randomize(nn.Sequential(Block(), conv(), nn.BatchNorm2d(4))).eval()
    model[0].requires_grad_(False)
    seen = []
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    folded = fold(model)
    assert seen == []
    folded(torch.randn(2, 4, 5, 5))
    assert len(seen) == 1 and type(seen[0]) is torch.Tensor
    trainable = {name for name, p in folded.named_parameters() if p.requires_grad}
    assert trainable == {'1.weight', '1.bias'}


def test_a_hook_between_layer_and_norm_sees_the_layer():
    _, left = fold_and_compare(nn.Sequential(hooked(nn.Sequential(conv())), nn.BatchNorm2d(4)))
    assert left == ['1']


def compiled(model):
    return torch.compile(model, backend='eager')


@pytest.mark.parametrize('wrapper', [AveragedModel, nn.DataParallel, compiled])
def test_wrapped_networks(wrapper):
    x = torch.rand(2, 1, 8, 8)
    network = diracnet(dataset='digits', pretrained=True).eval()
    for model in (wrapper(network), nn.Sequential(wrapper(network), nn.Softmax(1))):
        folded = fold(model.eval())
        assert relative_error(folded(x), model(x)) < 1e-5
        assert not [name for name in folded.state_dict() if 'bn' in name or 'alpha' in name]
    assert fold(network).classes == network.classes
    folded, left = fold_and_compare(wrapper(before(nn.BatchNorm2d(4))))
    assert type(folded) is nn.Sequential and left == []


def test_a_network_with_another_function_is_refused():
    f, params = define_diracnet(10, 1, 'digits')
    network = Network(lambda *args: 2 * f(*args), params)
    with pytest.raises(ValueError, match='function'):
        fold(nn.Sequential(network))


def test_a_network_that_cannot_be_copied_is_refused():
    model = before(nn.BatchNorm2d(4))
    model[0].guard = threading.Lock()
    with pytest.raises(TypeError, match=r'\b0\.guard\b'):
        fold(model)


@pytest.mark.filterwarnings('ignore:.*weight_norm')
@pytest.mark.parametrize(
    'compute',
    [
        lambda layer: prune.l1_unstructured(layer, 'weight', 0.5),
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
    ],
)
def test_a_computed_weight_is_the_current_one(compute):
    layer = compute(conv(DiracConv2d)).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(2)  # as an optimizer, after the last forward pass
    folded, left = fold_and_compare(nn.Sequential(layer, nn.BatchNorm2d(4)))
    trainable = [name for name, p in folded.named_parameters() if p.requires_grad]
    assert left == [] and trainable == ['0.weight', '0.bias']


def test_the_traceable_parts_are_folded():
    from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn as faster_rcnn

    model = randomize(faster_rcnn(weights=None, weights_backbone=None, num_classes=3)).eval()
    folded, x = fold(model), torch.rand(1, 3, 64, 64)
    expected, features = model.backbone(x), folded.backbone(x)
    assert all(relative_error(features[key], expected[key]) < 1e-5 for key in expected)
    assert not [module for module in folded.modules() if isinstance(module, nn.BatchNorm2d)]
    assert type(folded) is type(model) and len(folded([x[0]])) == 1

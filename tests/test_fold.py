"""diracify.fold changes nothing but layers: branches, hooks, methods and frozen parameters stay.
What cannot be folded is named or refused."""

import threading
import warnings
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from test_bad_inputs_networks import before, conv, fold_and_compare, hooked
from test_diracify import randomize
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from diracconv import DiracConv2d
from diracify import fold
from diracnet import Network, define_diracnet, diracnet
from test import relative_error


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
    with torch.no_grad():
        folded = fold(network)
    kept = {name for name, p in folded.named_parameters() if not p.requires_grad}
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

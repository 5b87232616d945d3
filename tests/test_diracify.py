"""diracify.py: bring Dirac weights into any network, and fold them with the batch norms."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from diracconv import (
    DiracConv,
    DiracConv2d,
    DiracConv3d,
    DiracParametrization,
    dirac_weight,
    split_weight,
)
from diracfold import BATCH_NORMS
from diracify import diracify, fold
from diracnet import DiracNet, Network, define_diracnet
from test import relative_error


def randomize(model):
    """Draw statistics and scales that differ from the initial ones, as after training."""
    for module in model.modules():
        if isinstance(module, BATCH_NORMS):
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.2)
            if module.track_running_stats:
                nn.init.normal_(module.running_mean, 0, 0.2)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
        if isinstance(module, (DiracConv, DiracParametrization)):
            nn.init.uniform_(module.alpha, 0.5, 1.5)
            nn.init.uniform_(module.beta, 0.05, 0.3)
    return model


def parametrized(conv, **kwargs):
    parametrize.register_parametrization(conv, 'weight', DiracParametrization(conv, **kwargs))
    return conv


def names_of(model, kinds):
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def small_network(conv, bn):
    return nn.Sequential(
        conv(2, 6, 3, padding=1),
        bn(6),
        nn.ReLU(),
        conv(6, 6, 3, padding='same', bias=False),
        bn(6),
        nn.ReLU(),
        conv(6, 4, 3, stride=2, groups=2),
        bn(4),
        conv(4, 8, 3, padding=2, dilation=2),
    )


def network_and_input(name):
    if name == '1-d':
        return small_network(nn.Conv1d, nn.BatchNorm1d), torch.randn(2, 2, 9)
    if name == '3-d':
        return small_network(nn.Conv3d, nn.BatchNorm3d), torch.randn(2, 2, 9, 9, 9)
    from torchvision import models

    if name == 'r3d_18':
        return models.video.r3d_18(num_classes=20), torch.randn(1, 3, 4, 32, 32)
    return getattr(models, name)(num_classes=20), torch.randn(2, 3, 96, 96)


# Dirac convolutions after diracify, and batch norms that cannot be folded.
NETWORKS = {
    'vgg16_bn': (13, 0),
    'resnet18': (13, 0),
    'densenet121': (58, 62),
    'mobilenet_v3_small': (7, 0),
    'r3d_18': (13, 0),  # its convolutions are subclasses
    '1-d': (3, 0),
    '3-d': (3, 0),
}


@pytest.mark.parametrize('name', NETWORKS)
@torch.no_grad()
def test_diracify_and_fold_keep_the_function(name):
    torch.manual_seed(0)
    model, x = network_and_input(name)
    model = randomize(model).eval()
    n_dirac, n_left = NETWORKS[name]

    dirac = diracify(copy.deepcopy(model))
    assert len(names_of(dirac, DiracConv)) == n_dirac
    assert relative_error(dirac(x), model(x)) < 1e-5

    randomize(dirac)
    expected, keys = dirac(x), list(dirac.state_dict())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        folded = fold(dirac)
    assert relative_error(folded(x), expected) < 1e-4
    assert not names_of(folded, DiracConv)
    # The original is unchanged.
    assert list(dirac.state_dict()) == keys
    assert torch.equal(dirac(x), expected)

    left = names_of(folded, BATCH_NORMS)
    assert len(left) == n_left and len(caught) == bool(n_left)
    for warning in caught:  # in DenseNet a batch norm follows a concatenation
        assert all(name in str(warning.message) for name in left)


def test_fresh_weights_are_near_the_identity():
    torch.manual_seed(0)
    x, conv = torch.randn(2, 8, 6, 6), nn.Conv2d(8, 8, 3, padding=1, bias=False)
    for fresh in (diracify(nn.Sequential(conv), fresh=True), parametrized(conv, fresh=True)):
        assert (fresh(x) - x).norm() < 0.3 * x.norm()
    conv.weight = weight = torch.randn(8, 8, 3, 3)
    torch.testing.assert_close(conv.weight, weight)


def test_which_convolutions_get_dirac_weights(capfd):
    """Those that keep the size of their input, and have more than one tap; or those that `where`
    selects. A warning names what is selected and impossible, stderr has the numbers."""
    qualifying = [
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Conv2d(4, 8, 5, padding='same'),
        nn.Conv2d(4, 8, (1, 3), padding=(0, 1)),
        nn.Conv1d(4, 4, 3, padding=2, dilation=2),
        nn.Conv3d(2, 2, 3, padding=1, groups=2),
    ]
    others = [
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, 1),
        nn.Conv2d(4, 4, 3, 2, 1),
        nn.ConvTranspose2d(4, 4, 3, padding=1),
        nn.Linear(4, 4),
        nn.Conv2d(4, 4, 3, padding='valid'),
        nn.Conv2d(4, 4, 2, padding='same'),
        nn.Conv2d(4, 4, (3, 2), padding=(1, 1), dilation=(1, 2)),
        DiracConv2d(4, 4, 3, padding=1),
    ]
    with pytest.warns(UserWarning, match=r'8 \(ConvTranspose2d\)$'):
        model = diracify(nn.ModuleList([*qualifying, *others]))
    assert all(isinstance(module, DiracConv) for module in model[:5])
    assert list(model[5:]) == others
    assert ' 5 of 13 ' in capfd.readouterr().err
    everything = diracify(nn.Sequential(*others[:3]), where=lambda conv: True)
    assert all(isinstance(module, DiracConv2d) for module in everything)


def test_a_single_convolution():
    half = diracify(nn.Conv3d(3, 3, 3, padding=1, dtype=torch.half, device='meta').eval())
    assert isinstance(half, DiracConv3d)
    assert half.weight.is_meta and half.weight.dtype is torch.half
    assert not half.training


@pytest.mark.parametrize('fresh', [False, True])
@pytest.mark.parametrize(
    'frozen, trained', [('weight', {'0.bias'}), ('bias', {'0.weight', '0.alpha', '0.beta'})]
)
def test_requires_grad_stays(frozen, trained, fresh):
    conv = nn.Conv2d(4, 4, 3, padding=1)
    getattr(conv, frozen).requires_grad_(False)
    model = diracify(nn.Sequential(conv), fresh=fresh)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained


def test_hooks_stay():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    calls = []
    conv.register_forward_pre_hook(lambda *_: calls.append('before'))
    handle = conv.register_forward_hook(lambda *_: calls.append('after'))
    conv.register_full_backward_hook(lambda *_: calls.append('backward'))
    model = diracify(nn.Sequential(conv))
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    model(x).sum().backward()
    assert calls == ['before', 'after', 'backward']
    calls.clear()
    fold(model)(x)
    assert calls == ['before', 'after']
    handle.remove()  # acts on the Dirac convolution, too
    model(x)
    assert calls == ['before', 'after', 'before']


@pytest.mark.parametrize(
    'shape, groups',
    [((6, 6, 3, 3), 1), ((4, 6, 3, 3), 1), ((6, 4, 3), 1), ((8, 2, 3, 3, 3), 4), ((6, 1, 5, 5), 6)],
)
def test_split_weight_is_the_inverse_of_dirac_weight(shape, groups):
    weight = torch.randn(shape, dtype=torch.double)
    weight[1] = 0
    torch.testing.assert_close(dirac_weight(*split_weight(weight, groups), groups), weight)


class Shared(nn.Module):
    """Calls a convolution under two names, and another one twice."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.other = self.conv
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(4) for _ in range(3))
        self.last = nn.Conv2d(4, 4, 3, padding=1)
        self.bn4 = nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.bn1(self.conv(x))
        x = self.bn2(self.other(x))
        x = self.last(x)
        return self.bn3(x) + x + self.bn4(self.last(x.relu()))


def test_shared_modules():
    model = randomize(diracify(Shared())).eval()
    assert model.conv is model.other
    assert isinstance(model.conv, DiracConv2d)
    x = torch.randn(2, 4, 8, 8)
    with pytest.warns(UserWarning, match='bn1, bn2, bn3, bn4'):
        folded = fold(model)
    assert relative_error(folded(x), model(x)) < 1e-5
    assert not names_of(folded, DiracConv)


class BatchNormAct(nn.BatchNorm2d):
    """Batch norm and activation in one, as timm's BatchNormAct2d."""

    always_batch = False

    def __init__(self, channels, affine=True, **kwargs):
        super().__init__(channels, affine=affine, **kwargs)
        self.act = nn.ReLU(inplace=True)

    def scale(self):
        return self.weight

    def forward(self, x):
        torch._assert(x.ndim == 4, f'expected 4 dimensions, got {x.ndim}')
        use_batch = self.training or self.running_mean is None or self.always_batch
        statistics = (self.running_mean, self.running_var)
        return self.act(F.batch_norm(x, *statistics, self.scale(), self.bias, use_batch, eps=0.01))


class Untraceable(nn.Module):
    """Counts by the values of its input."""

    def __init__(self):
        super().__init__()
        self.conv = DiracConv2d(3, 3, 3, padding=1)
        self.bn, self.act = nn.BatchNorm2d(3), BatchNormAct(3)

    def forward(self, x):
        for _ in range(int(x.amax()) + 1):
            x = self.act(self.bn(self.conv(x)))
        return x


def test_untraceable_network_folds_its_dirac_weights():
    model = randomize(Untraceable()).eval()
    with pytest.warns(UserWarning, match='Untraceable.* bn, act$'):
        folded = fold(model)
    x = torch.rand(1, 3, 5, 5)
    assert relative_error(folded(x), model(x)) < 1e-5
    assert type(folded.conv) is nn.Conv2d


class OwnConv(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


@pytest.mark.parametrize(
    'make, shape',
    [
        (lambda: nn.Conv2d(6, 4, 3, padding=1), (2, 6, 5, 5)),
        (lambda: nn.Conv1d(6, 6, 3, groups=2), (2, 6, 5)),
        (lambda: nn.Conv3d(2, 4, 3, bias=False), (2, 2, 5, 5, 5)),
        (lambda: OwnConv(6, 4, 3), (2, 6, 5, 5)),
    ],
)
def test_parametrization(make, shape):
    conv, x = make(), torch.randn(shape)
    kind, expected = type(conv), conv(x)
    parametrized(conv)
    torch.testing.assert_close(conv(x), expected)

    randomize(conv)
    expected = conv(x)
    expected.sum().backward()
    part = conv.parametrizations.weight
    for tensor in (part.original, part[0].alpha, part[0].beta):
        assert tensor.grad is not None

    folded = fold(nn.Sequential(conv))
    assert type(folded[0]) is kind
    assert torch.allclose(folded(x), expected, atol=1e-6)
    parametrize.remove_parametrizations(conv, 'weight')
    assert type(conv) is kind
    assert torch.equal(conv(x), expected)


def test_fold_of_a_diracnet():
    f, params = define_diracnet(16, 1, 'digits')
    module = Network(f, params).eval()
    x = torch.randn(2, 1, 8, 8)
    folded = fold(module)
    assert isinstance(folded, DiracNet)
    assert relative_error(folded(x), module(x)) < 1e-5
    assert list(fold(params)) == list(folded.state_dict())

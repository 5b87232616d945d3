"""Any network: Dirac weights brought into its convolutions, and folded out again with its batch norms."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from diracify import BATCH_NORMS, diracify, fold, qualifies
from diracconv import (
    DiracConv1d,
    DiracConv2d,
    DiracConv3d,
    DiracParametrization,
    _DiracConv,
    dirac_weight,
    split_weight,
)
from diracnet import DiracNet, Network, define_diracnet


def randomize(model):
    """Other statistics and scales than fresh ones, as after training."""
    for module in model.modules():
        if isinstance(module, BATCH_NORMS):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        if isinstance(module, (_DiracConv, DiracParametrization)):
            nn.init.uniform_(module.alpha, 0.5, 1.5)
            nn.init.uniform_(module.beta, 0.05, 0.3)
    return model


def relative_error(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def small(dimensions):
    conv = {1: nn.Conv1d, 3: nn.Conv3d}[dimensions]
    bn = {1: nn.BatchNorm1d, 3: nn.BatchNorm3d}[dimensions]
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


NETWORKS = {  # Dirac convolutions after diracify, batch norms that can't be folded
    'vgg16_bn': (13, 0),
    'resnet18': (13, 0),
    'densenet121': (58, 62),
    'mobilenet_v3_small': (7, 0),
    '1-d': (3, 0),
    '3-d': (3, 0),
}


@pytest.mark.parametrize('name', NETWORKS)
@torch.no_grad()
def test_diracify_and_fold(name):
    torch.manual_seed(0)
    if name[0] in '13':
        model, x = small(int(name[0])), torch.randn(2, 2, *[9] * int(name[0]))
    else:
        from torchvision import models

        model, x = getattr(models, name)(num_classes=20), torch.randn(2, 3, 96, 96)
    model = randomize(model).eval()
    expected = model(x)
    dirac = diracify(copy.deepcopy(model))
    n_dirac, n_left = NETWORKS[name]
    assert sum(isinstance(module, _DiracConv) for module in dirac.modules()) == n_dirac
    assert relative_error(dirac(x), expected) < 1e-5  # from given weights it computes the same
    randomize(dirac)
    expected = dirac(x)
    keys = list(dirac.state_dict())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        folded = fold(dirac)
    assert relative_error(folded(x), expected) < 1e-4
    assert list(dirac.state_dict()) == keys and torch.equal(dirac(x), expected)  # on a copy
    assert not any(isinstance(module, _DiracConv) for module in folded.modules())
    left = [name for name, module in folded.named_modules() if isinstance(module, BATCH_NORMS)]
    assert len(left) == n_left and len(caught) == bool(n_left)
    if n_left:  # DenseNet's pre-activations: nothing before them but a concatenation
        assert all(name in str(caught[0].message) for name in left) and all(
            'norm' in name for name in left
        )


def test_fresh_weights_are_near_the_identity():
    torch.manual_seed(0)
    model = diracify(
        nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        ),
        fresh=True,
    )
    x = torch.randn(2, 8, 6, 6)
    assert all((layer.alpha == 1).all() for layer in model)
    assert (model(x) - x).norm() < 0.3 * x.norm()


def test_which_convolutions_qualify():
    yes = [
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Conv2d(4, 8, 5, padding='same'),
        nn.Conv2d(4, 8, (1, 3), padding=(0, 1)),
        nn.Conv1d(4, 4, 3, padding=2, dilation=2),
        nn.Conv3d(2, 2, 3, padding=1, groups=2),
    ]
    no = [
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, 1),
        nn.Conv2d(4, 4, 3, 2, 1),
        nn.ConvTranspose2d(4, 4, 3, padding=1),
        nn.Linear(4, 4),
        nn.Conv2d(4, 4, 3, padding='valid'),
        DiracConv2d(4, 4, 3, padding=1),
    ]
    model = diracify(nn.ModuleList([*yes, *no]))
    assert [isinstance(module, _DiracConv) for module in model] == [True] * len(yes) + [False] * (
        len(no) - 1
    ) + [True]
    assert list(model[len(yes) :]) == no
    everything = diracify(
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1)), where=lambda conv: True
    )
    assert all(isinstance(module, DiracConv2d) for module in everything)
    assert isinstance(diracify(nn.Conv1d(3, 3, 3, padding=1)), DiracConv1d)
    half = diracify(nn.Conv3d(3, 3, 3, padding=1, dtype=torch.half, device='meta').eval())
    assert (
        isinstance(half, DiracConv3d)
        and half.weight.is_meta
        and half.weight.dtype is torch.half
        and not half.training
    )


def test_split_weight_is_the_inverse():
    for shape, groups in (
        ((6, 6, 3, 3), 1),
        ((4, 6, 3, 3), 1),
        ((6, 4, 3), 1),
        ((8, 2, 3, 3, 3), 4),
        ((6, 1, 5, 5), 6),
    ):
        weight = torch.randn(shape, dtype=torch.double)
        weight[1] = 0
        torch.testing.assert_close(dirac_weight(*split_weight(weight, groups), groups), weight)


def test_shared_modules():
    class Shared(nn.Module):
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

    model = randomize(diracify(Shared())).eval()
    assert model.conv is model.other and isinstance(model.conv, DiracConv2d)
    randomize(model)
    x = torch.randn(2, 4, 8, 8)
    with pytest.warns(UserWarning, match='bn1, bn2, bn3, bn4'):
        folded = fold(model)
    assert relative_error(folded(x), model(x)) < 1e-5
    assert not any(isinstance(module, _DiracConv) for module in folded.modules())


def test_branch_behind_a_convolution():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x):
            x = self.conv1(x)
            return self.bn2(self.conv2(self.bn1(x))) + x

    model = randomize(diracify(Branch())).eval()
    x = torch.randn(2, 3, 8, 8)
    with pytest.warns(UserWarning, match='stay: bn1$'):
        folded = fold(model)
    assert relative_error(folded(x), model(x)) < 1e-5
    assert [isinstance(module, BATCH_NORMS) for module in (folded.bn1,)] == [True] and not hasattr(
        folded, 'bn2'
    )


def test_what_can_not_be_traced_folds_its_dirac_weights():
    class Dynamic(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = DiracConv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.bn(self.conv(x)) if x.sum() > 0 else x

    model = randomize(Dynamic()).eval()
    with pytest.warns(UserWarning, match='can not trace Dynamic'):
        folded = fold(model)
    x = torch.rand(1, 3, 5, 5)
    assert relative_error(folded(x), model(x)) < 1e-5 and type(folded.conv) is nn.Conv2d


def test_batch_norm_without_statistics_stays():
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3, track_running_stats=False)).eval()
    x = torch.randn(2, 3, 5, 5)
    with pytest.warns(UserWarning, match='stay: 1'):
        torch.testing.assert_close(fold(model)(x), model(x))


def test_parametrization():
    for conv, x in (
        (nn.Conv2d(6, 4, 3, padding=1), torch.randn(2, 6, 5, 5)),
        (nn.Conv1d(6, 6, 3, groups=2), torch.randn(2, 6, 5)),
        (nn.Conv3d(2, 4, 3, bias=False), torch.randn(2, 2, 5, 5, 5)),
    ):
        expected = conv(x)
        kind = type(conv)
        parametrize.register_parametrization(conv, 'weight', DiracParametrization(conv))
        torch.testing.assert_close(conv(x), expected)
        randomize(conv)
        expected = conv(x)
        conv(x).sum().backward()
        part = conv.parametrizations.weight
        assert all(
            tensor.grad is not None for tensor in (part.original, part[0].alpha, part[0].beta)
        )
        folded = fold(nn.Sequential(conv))
        assert type(folded[0]) is kind and torch.allclose(folded(x), expected, atol=1e-6)
        parametrize.remove_parametrizations(conv, 'weight')
        assert type(conv) is kind and torch.equal(conv(x), expected)


def test_fresh_parametrization_and_assignment():
    conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    parametrize.register_parametrization(conv, 'weight', DiracParametrization(conv, fresh=True))
    x = torch.randn(2, 4, 6, 6)
    assert (conv(x) - x).norm() < 0.3 * x.norm()
    weight = torch.randn(4, 4, 3, 3)
    conv.weight = weight
    torch.testing.assert_close(conv.weight, weight)


def test_fold_of_diracnets():
    f, params = define_diracnet(16, 1, 'digits')
    module = Network(f, params).eval()
    x = torch.randn(2, 1, 8, 8)
    folded = fold(module)
    assert isinstance(folded, DiracNet) and relative_error(folded(x), module(x)) < 1e-5
    assert list(fold(params)) == list(folded.state_dict())


def test_trains_after_diracify():
    torch.manual_seed(0)
    model = diracify(small(1), fresh=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x, y = torch.randn(16, 2, 9), torch.randn(16, 8, 4)
    losses = []
    for _ in range(30):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert qualifies(nn.Conv2d(3, 3, 3, padding=1))

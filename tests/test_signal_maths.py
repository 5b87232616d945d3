"""docs/signal.md: its formulas, by sampling and in real chains before training."""

import math
from statistics import fmean

import pytest
import torch
import torch.nn.functional as F

from diracnet import define_diracnet
from lab.data import datasets
from tools.propagation import kept

SAMPLES = 100_000


def layers_of_identities(values, shift, n):
    """n layers of ReLU, identity and batch norm (weight 1, bias `shift`), from batch-normalized
    samples. Returns (share of active values, mean / std) after the ReLU of each layer."""
    found = []
    x = values + shift
    for _ in range(n):
        r = x.clamp(min=0)
        mean, std = r.mean(), r.std()
        # What is cut last is at 0 but for rounding.
        found.append(((r > 1e-9).double().mean().item(), (mean / std).item()))
        x = (r - mean) / std + shift
    return found


def thresholds(shift, n):
    """The same shares for an infinite normal sample, by the recursion for the threshold t."""
    normal, t, shares = torch.distributions.Normal(0.0, 1.0), -shift, []
    for _ in range(n):
        above = 1 - normal.cdf(torch.tensor(t)).item()
        shares.append(above)
        density = math.exp(-t * t / 2) / math.sqrt(2 * math.pi)
        mean = density - t * above
        variance = (1 + t * t) * above - t * density - mean**2
        t += max(mean - shift * math.sqrt(variance), 0)
    return shares


@pytest.fixture(scope='module')
def normal():
    return torch.randn(SAMPLES, generator=torch.Generator().manual_seed(0), dtype=torch.double)


@pytest.mark.parametrize('shift', [0.0, 0.25, 0.5, 1.0])
def test_identities_cut_until_the_mean_is_below_the_shift(normal, shift):
    found = layers_of_identities(normal, shift, 100)
    shares, ratios = zip(*found)
    for share, ratio in found:
        assert ratio**2 * (1 - share) <= share * (1 + 1e-6)  # Cauchy-Schwarz
    bound = shift**2 / (1 + shift**2)
    assert all(before >= after >= bound for before, after in zip(shares, shares[1:]))
    expected = thresholds(shift, 20)
    assert shares[:20] == pytest.approx(expected, abs=0.005)
    if shift == 0:
        assert expected[:6] == pytest.approx([0.5, 0.345, 0.264, 0.215, 0.181, 0.156], abs=5e-4)
        assert shares[-1] < 0.02
    else:
        assert ratios[-1] == pytest.approx(shift, rel=0.01)  # nothing is cut any more
        stays = {0.25: 0.103, 0.5: 0.329, 1.0: 0.728}[shift]
        assert shares[-1] == pytest.approx(stays, abs=0.005)


def test_an_exponential_tail_falls_as_one_over_the_layers():
    uniform = torch.rand(SAMPLES, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    values = -uniform.log() - math.log(2)  # half of them are above 0
    shares = [share for share, _ in layers_of_identities(values, 0.0, 60)]
    expected = [0.5]
    for _ in range(59):
        expected.append(expected[-1] * math.exp(-expected[-1]))
    assert shares == pytest.approx(expected, abs=0.005)
    assert 60 * expected[-1] == pytest.approx(1, abs=0.12)


# --- real chains -----------------------------------------------------------------------------


@pytest.fixture(scope='module')
def images():
    return next(iter(datasets.load('digits', '.').batches(True, batch_size=256, seed=1)))[0]


@torch.no_grad()
def outputs(f, params, images):
    """The output of each batch norm."""
    found = []

    def norm(*args, **kwargs):
        found.append(F.batch_norm(*args, **kwargs))
        return found[-1].clone()  # the next ReLU works in place

    f(images, params, True, norm=norm)
    return found


def define(seed, **scales):
    torch.manual_seed(seed)
    return define_diracnet(100, 1, 'digits', **scales)


@pytest.mark.parametrize('shift', [0.0, 0.5])
def test_first_layers_of_a_chain_follow_the_normal_thresholds(images, shift):
    """A chain begins as identities do, before its mixtures add up and while units are normal."""
    found = outputs(*define(1, bn_init=(1.0, shift), beta=0.03), images)
    shares = [(output > 0).double().mean().item() for output in found[:5]]
    assert shares == pytest.approx(thresholds(shift, 5), abs=0.05)


UNIFORM = 1 - 0.1 / math.sqrt(3) * math.atan(math.sqrt(3) / 0.1)  # per layer


@pytest.mark.parametrize(
    'bn_init, beta, per_layer, tolerance',
    [
        ((1.0, 1.0), 0.05, math.exp(-(0.05**2)), 0.05),
        ((1.0, 1.0), 0.1, math.exp(-(0.1**2)), 0.05),
        ('paper', 0.1, UNIFORM, 0.1),  # mixtures overwrite the channels with a small weight
    ],
)
def test_share_of_the_identity_after_n_blocks(images, bn_init, beta, per_layer, tolerance):
    """Means over three seeds, in the first group. The bias is 1, so that ReLU cuts little and only
    the mixtures count."""
    chains = []
    for seed in (1, 2, 3):
        f, params = define(seed, bn_init=bn_init, beta=beta)
        for key, tensor in params.items():
            if key.endswith('bn.bias'):
                tensor.detach().fill_(1)
        chains.append([output.relu() for output in outputs(f, params, images)])
    assert pytest.approx(0.913, abs=5e-4) == UNIFORM
    for n in (3, 10, 32):
        measured = fmean(kept(chain[n], chain[0]) for chain in chains)
        assert measured == pytest.approx(per_layer**n, abs=tolerance)


def test_one_over_the_root_of_the_depth_keeps_the_same_share_at_any_depth(images):
    for depth in (100, 202):
        torch.manual_seed(1)
        f, params = define_diracnet(depth, 1, 'digits', bn_init=(1.0, 1.0), beta='depth')
        found = outputs(f, params, images)
        measured = kept(found[-1].relu(), found[0].relu())
        assert measured == pytest.approx(math.exp(-1), abs=0.06)

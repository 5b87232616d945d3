"""The benchmark's own machinery, on the smallest network: what it measures really runs, and is what it says."""

import pytest
import torch

from diracnet import define_diracnet
from tools import benchmark, contestants, references


@pytest.mark.parametrize(
    'kind', ['DiracNet', 'textbook', 'plain', 'floor', '--recompute', '--dtype bfloat16']
)
def test_contestants_step(kind):
    torch.manual_seed(0)
    network = (10, 1, 'digits')
    inputs, targets = contestants.random_batch(network, 16)
    step = contestants.build(kind, network, inputs, targets)
    for _ in range(2):
        step()


def test_contestants_learn_the_same():
    """Ours and the textbook's step, with the same parameters and optimizer settings, stay together."""
    network = (10, 1, 'digits')
    inputs, targets = contestants.random_batch(network, 16)
    f, ours = define_diracnet(*network)
    params = references.with_deltas(
        {
            key: tensor.detach().clone().requires_grad_(tensor.requires_grad)
            for key, tensor in ours.items()
        }
    )
    theirs = contestants.textbook_step(params)
    step = contestants.training_step(
        f, ours
    )  # its module shares the memory of `ours`, but for convolutions
    for _ in range(3):
        theirs(inputs, targets)
        step(inputs, targets)
    for key in ('fc.weight', 'group2.block1.alpha', 'group0.block0.beta', 'bn.running_mean'):
        torch.testing.assert_close(ours[key], params[key], rtol=1e-4, atol=1e-6)


def test_contestant_is_a_process_with_a_peak():
    contestant = benchmark.Contestant('DiracNet', (10, 1, 'digits'), 64)
    samples = benchmark.alternate({'step': contestant}, 3)
    assert len(samples['step']) == 3 and min(samples['step']) > 0
    # At least the activations that the backward pass needs: two for each of 7 convolutions, floats.
    least = 64 * 4 * 2 * (3 * 16 * 64 + 2 * 32 * 16 + 2 * 64 * 4) / 2**20
    assert least < contestant.close() < 500

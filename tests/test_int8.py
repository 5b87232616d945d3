"""tools.int8: the steps against the loss of int8 do not change what a network computes."""

import pytest
import torch

from diracnet import DiracNet
from tools import int8


@pytest.fixture
def net():
    torch.manual_seed(0)
    return DiracNet(16, 1, 'digits').eval()


@pytest.fixture
def images(net):  # drawn after the network's weights
    return torch.randn(8, 1, 8, 8)


@torch.no_grad()
def test_steps_compute_the_same(net, images):
    expected, before = net(images), net.features.group1.block1.conv.weight.clone()
    changed = int8.separate(int8.equalize(net, images))
    torch.testing.assert_close(changed(images), expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(net.features.group1.block1.conv.weight, before)  # not changed in place
    conv = int8.separate(net).features.group1.block1.conv
    assert torch.equal(conv.diagonal.flatten(), before[:, :, 1, 1].diagonal())
    assert conv.weight[:, :, 1, 1].diagonal().abs().max() == 0

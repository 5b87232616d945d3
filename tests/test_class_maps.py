"""tools.class_maps: maps add up to logits, and lie where the evidence is."""

import json

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from diracnet import DiracNet
from lab.models import registry
from lab.onnx_models import to_onnx
from tools import export, predict
from tools.class_maps import SIDE, class_maps, draw


def random_folded(model, dataset, depth):
    torch.manual_seed(0)
    _, params = registry.define(model, depth, 0.25, dataset, num_classes=7)
    for key, tensor in params.items():
        if key.startswith('bn') or '.bn.' in key or key == 'fc.bias':
            tensor.data.uniform_(0.5, 1.5)
    return registry.folded_module(model, registry.fold(model, params))


@torch.no_grad()
@pytest.mark.parametrize(
    'model, dataset, depth, size, map_size',
    [(model, 'CIFAR10', 10, (32, 32), (8, 8)) for model in registry.FOLDS]
    + [('diracnet', 'ImageNet', 18, (96, 64), (3, 2))],
)
def test_maps_add_up_to_the_logits(model, dataset, depth, size, map_size):
    net = random_folded(model, dataset, depth)
    images = torch.randn(3, 3, *size)
    maps, bias = class_maps(net, images)
    assert maps.shape == (3, 7, *map_size)
    torch.testing.assert_close(maps.mean((2, 3)) + bias, net(images), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_evidence_lies_where_the_bright_square_is():
    net = DiracNet(10, 1, 'CIFAR10', in_channels=1).eval()
    for key, tensor in net.state_dict().items():  # channel 0 passes through the network
        tensor.zero_()
        if key.endswith('conv.weight'):
            tensor[0, 0, 1, 1] = 1
    net.fc.weight[3, 0], net.fc.weight[4, 0] = 2, -2
    image = torch.zeros(1, 1, 32, 32)
    image[:, :, 4:8, 24:28] = 1  # one position of the map
    maps, _ = class_maps(net, image)
    expected = torch.zeros(8, 8)
    expected[1, 6] = 2
    assert torch.equal(maps[0, 3], expected) and torch.equal(maps[0, 4], -expected)
    black = np.zeros((32, 32, 1), np.uint8)
    red, blue = (draw(black, maps[0, k])[:, SIDE:].astype(int) for k in (3, 4))
    row, column = np.unravel_index(red[:, :, 0].argmax(), (SIDE, SIDE))
    assert 28 <= row < 56 and 168 <= column < 196
    assert (red[:, :, 0] >= red[:, :, 2]).all() and (blue[:, :, 2] >= blue[:, :, 0]).all()


def test_a_picture_for_each_image(digits_run, digit_files, tmp_path, call):
    pytest.importorskip('onnxscript')
    files = sorted(digit_files.iterdir())[:3]
    twin = tmp_path / 'twin' / files[0].name
    twin.parent.mkdir()
    twin.write_bytes(files[0].read_bytes())
    broken = tmp_path / 'broken.png'
    broken.write_bytes(b'no image')
    onnx, int8 = tmp_path / 'net.onnx', tmp_path / 'net.int8.onnx'
    assert call(export.main, digits_run, onnx, int8).status == 0
    pictures = []
    for network in (digits_run, onnx, int8):
        out = tmp_path / 'new' / network.name
        result = call(
            predict.main, network, *files, twin, broken, '--json', '--explain', out, '--top', 1
        )
        assert result.status == 1
        lines = [json.loads(line) for line in result.out.splitlines()]
        names = [file.stem for file in files] + [f'{files[0].stem}-2']
        assert [line['explanation'] for line in lines] == [str(out / f'{n}.png') for n in names]
        assert sorted(path.stem for path in out.iterdir()) == sorted(names)
        whole = [cv2.imread(line['explanation']).astype(int) for line in lines]
        assert all(picture.shape[1:] == (2 * SIDE, 3) for picture in whole)
        assert all((picture[SIDE:] < 100).any() for picture in whole)  # the caption
        pictures.append([picture[:SIDE] for picture in whole])
    for run, float_onnx in zip(*pictures[:2]):
        assert abs(run - float_onnx).max() <= 1


def test_another_kind_of_network_is_refused(digit_files, tmp_path, refused):
    onnx = pytest.importorskip('onnx')
    pytest.importorskip('onnxscript')
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    onnx.save(to_onnx(net, (1, 8, 8), {}), tmp_path / 'net.onnx')
    image = next(digit_files.iterdir())
    arguments = (tmp_path / 'net.onnx', image, '--dataset', 'digits', '--explain', tmp_path)
    refused(1, ['net.onnx', 'pool'], predict.main, *arguments)

"""tools.quantize: its tables, from files whose noise is known, and bad input."""

import numpy as np
import pytest
import torch

from diracnet import DiracNet
from lab.folded import Reference
from lab.onnx_models import to_onnx
from lab.runs import checkpoint
from tools import int8, quantize


@pytest.fixture(autouse=True)
def onnx():
    for name in ('onnx', 'onnxruntime', 'onnxscript'):
        pytest.importorskip(name)


def rows(out):
    lines = [line for line in out.splitlines() if line.startswith('| ')]
    return [[cell.strip() for cell in line.split('|')[1:-1]] for line in lines]


def test_signal_to_noise():
    reference = np.array([[3.0, 4.0]])
    assert quantize.signal_to_noise(reference + [[0.5, 0]], reference) == pytest.approx(20)
    assert quantize.signal_to_noise(reference, reference) > 300


def test_recipes_and_layers(digits_run, tmp_path, call, monkeypatch):
    exported = 'identity apart, equalized, first and last layer in float'
    names = ('as folded', exported, 'identity apart, equalized')
    recipes = {name: int8.RECIPES[name] for name in names}
    monkeypatch.setattr(quantize, 'RECIPES', recipes)
    find_layers = quantize.find_layers
    monkeypatch.setattr(quantize, 'find_layers', lambda net: find_layers(net)[-1:])
    result = call(quantize.main, digits_run, '--held-out', 100, '--per-layer')
    assert result.status == 0 and result.err == ''
    for words in ('512 images to calibrate', '100 held out', '360 of the test set'):
        assert words in result.out
    _, _, unfolded, *results, _, _, layer = rows(result.out)
    assert [row[0] for row in (unfolded, *results)] == ['(unfolded, float)', *recipes]
    folded, improved, _ = results
    for column in (1, 3):  # held out, test
        assert float(improved[column]) > float(folded[column]) + 3 > 13
    for column in (2, 4):
        assert abs(float(improved[column]) - float(unfolded[column])) < 3
    name, taps, *ranges, alone, in_float = layer
    assert name == 'fc' and taps.endswith('(8.0)') and 1 < float(taps.split()[0]) < 8
    assert 0 < float(ranges[0]) <= float(ranges[1])
    assert 20 < float(alone) < 80 < float(in_float)  # the last recipe keeps this layer in float


def test_judge_against_pytorch(digits_run):
    """A network that is compared with itself has hardly any noise."""
    net = checkpoint.load(digits_run).fold()
    images = torch.randn(20, 1, 8, 8)
    with torch.no_grad():
        logits = net(images).numpy()
    content = to_onnx(net, (1, 8, 8), {}).SerializeToString()
    reference = Reference(images, torch.from_numpy(logits.argmax(1)), logits)
    decibels, top1 = quantize.judge(content, reference)
    assert float(decibels) > 80 and top1 == '100.00'


def test_bad_input(tmp_path, digits_run, refused):
    torch.save(DiracNet(10, 0.25, 'FashionMNIST').state_dict(), tmp_path / 'net.pth')
    options = ('--dataset', 'FashionMNIST', '--dataroot', tmp_path / 'nowhere')
    words = ['FashionMNIST', '--dataroot']
    refused(1, words, quantize.main, tmp_path / 'net.pth', *options)
    refused(1, ['net.pth', '--dataset'], quantize.main, tmp_path / 'net.pth')
    refused(2, 'MNIST', quantize.main, tmp_path / 'net.pth', '--dataset', 'MNIST')
    refused(2, '--held-out', quantize.main, digits_run, '--held-out', 0)

"""lab.folded: which images a network is calibrated on and compared with."""

import numpy as np
import pytest
import torch

from diracnet import DiracNet
from lab.data import datasets
from lab.data.image_files import prepare, read_image
from lab.data.preprocessing import normalize
from lab.errors import UserError
from lab.folded import load_folded
from lab.runs import checkpoint


def test_samples_from_memory(digits_run):
    network = load_folded(checkpoint.load(digits_run))
    assert network.dataset == 'digits' and network.classes == list('0123456789')
    assert network.input_shape == (1, 8, 8)
    pixels, targets = datasets.load('digits', '.').train
    inputs, classes = network.sample_images(True, 5, (100, 201))
    chosen = [100, 125, 150, 175, 200]
    expected = normalize(pixels[chosen], datasets.PREPROCESSING['digits'])
    assert torch.equal(inputs, expected) and torch.equal(classes, targets[chosen])
    assert len(network.sample_images(False, 10_000)[0]) == 360
    reference = network.reference(inputs, classes)
    with torch.no_grad():
        np.testing.assert_array_equal(reference.logits, network.unfolded(inputs).numpy())


def test_samples_from_files(image_folder, tmp_path, monkeypatch):
    torch.save(DiracNet(18, 0.125, num_classes=2).state_dict(), tmp_path / 'net.pth')
    network = load_folded(checkpoint.load(tmp_path / 'net.pth'), 'folder', image_folder)
    inputs, classes = network.sample_images(False, 2)
    files = [image_folder / 'val' / 'flower' / '0.jpg', image_folder / 'val' / 'temple' / '2.jpg']
    images = [prepare(read_image(file), network.preprocessing) for file in files]
    expected = normalize(torch.from_numpy(np.stack(images)), network.preprocessing)
    assert torch.equal(inputs, expected) and classes.tolist() == [0, 1]
    assert network.data.train[1].tolist() == [0] * 4 + [1] * 4
    monkeypatch.setattr('lab.folded.FILE_IMAGES', 3)
    assert len(network.sample_images(True, 8)[0]) == 3


def test_another_number_of_classes(image_folder, tmp_path):
    torch.save(DiracNet(18, 0.125, num_classes=5).state_dict(), tmp_path / 'net.pth')
    with pytest.raises(UserError, match=r'net\.pth.* 5 .*folder.* 2.*--dataset'):
        load_folded(checkpoint.load(tmp_path / 'net.pth'), 'folder', image_folder)

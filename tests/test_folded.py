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
    assert network.dataset == 'digits' and network.input_shape == (1, 8, 8)
    pixels, targets = datasets.load('digits', '.').train
    inputs, classes = network.sample_images(True, 5)
    chosen = [0, 359, 718, 1077, 1436]
    expected = normalize(pixels[chosen], datasets.PREPROCESSING['digits'])
    assert torch.equal(inputs, expected) and torch.equal(classes, targets[chosen])
    assert len(network.sample_images(False, 10_000)[0]) == 360


def test_samples_from_files(image_folder, tmp_path, monkeypatch, capfd):
    torch.save(DiracNet(18, 0.125, num_classes=2).state_dict(), tmp_path / 'net.pth')
    network = load_folded(checkpoint.load(tmp_path / 'net.pth'), 'folder', image_folder)
    files = [image_folder / 'val' / 'flower' / '0.jpg', image_folder / 'val' / 'temple' / '2.jpg']
    images = [prepare(read_image(file), network.preprocessing) for file in files]
    expected = normalize(torch.from_numpy(np.stack(images)), network.preprocessing)
    inputs, classes = network.sample_images(False, 2)
    assert torch.equal(inputs, expected) and classes.tolist() == [0, 1]
    assert network.data.train[1].tolist() == [0] * 4 + [1] * 4
    monkeypatch.setattr('lab.folded.FILE_IMAGES', 3)
    assert len(network.sample_images(True, 8)[0]) == 3
    files[0].write_bytes(b'broken')
    inputs, classes = network.sample_images(False, 2)
    assert torch.equal(inputs, expected[1:]) and classes.tolist() == [1]
    assert str(files[0]) in capfd.readouterr().err


def test_another_number_of_classes(image_folder, tmp_path):
    torch.save(DiracNet(18, 0.125, num_classes=5).state_dict(), tmp_path / 'net.pth')
    with pytest.raises(UserError, match=r'net\.pth'):
        load_folded(checkpoint.load(tmp_path / 'net.pth'), 'folder', image_folder)

"""Reading in a child process. (test_train.py trains on small copies of the real formats.)"""

import os

import numpy as np
import pytest
import torch

from lab.data import torchvision_sets
from lab.data.torchvision_sets import read_in_child
from lab.errors import UserError


def made(name, root, download):
    """What a reader returns: 5 training and 3 test images, random with a fixed seed."""
    random = np.random.default_rng(0)
    arrays = [random.integers(0, 256, (n, 4, 4, 3)).astype(np.uint8) for n in (5, 3)]
    return arrays, [list(range(5)), list(range(3))], ('a', name)


@pytest.mark.parametrize('message_bytes', [2**28, 100])
def test_images_arrive_whole_in_one_message_or_several(message_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision_sets, 'MESSAGE_BYTES', message_bytes)
    train, test, classes = read_in_child(made, 'CIFAR10', tmp_path, False)
    arrays, labels, _ = made('CIFAR10', tmp_path, False)
    assert classes == ('a', 'CIFAR10')
    for (images, targets), array, numbers in zip((train, test), arrays, labels):
        assert np.array_equal(images.numpy(), array) and images.dtype == torch.uint8
        assert targets.tolist() == numbers and targets.dtype == torch.int64


def test_errors_of_the_child(tmp_path):
    def refuse(name, root, download):
        raise UserError(f'{name} is missing')

    def die(name, root, download):
        os._exit(9)

    with pytest.raises(UserError, match='^CIFAR10 is missing$'):
        read_in_child(refuse, 'CIFAR10', tmp_path, False)
    with pytest.raises(UserError) as error:
        read_in_child(die, 'CIFAR10', tmp_path, False)
    assert 'CIFAR10' in str(error.value) and str(tmp_path) in str(error.value)

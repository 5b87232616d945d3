"""IDX files that belong elsewhere. (test_inputs.py has broken ones.)"""

import numpy as np

import train
from conftest import write_idx
from lab.data.fashion_mnist import IDX_FILES


def test_swapped_idx_files(fashion_mnist, tmp_path, refused):
    def refuse(words):
        command = ('--dataset', 'FashionMNIST', '--dataroot', fashion_mnist)
        refused(1, words, train.main, *command, '--save', tmp_path / 'run')

    def swap(a, b):
        contents = a.read_bytes(), b.read_bytes()
        b.write_bytes(contents[0])
        a.write_bytes(contents[1])

    images, labels, test_images, _ = (next(fashion_mnist.glob(f'{name}*')) for name in IDX_FILES)
    swap(images, labels)
    refuse(images)
    swap(images, labels)
    swap(images, test_images)
    refuse([images, '20 images', '50 labels'])
    swap(images, test_images)
    write_idx(test_images, np.zeros((20, 27, 28)))
    refuse(test_images)

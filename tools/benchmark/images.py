"""Images made for the benchmarks, and the batches of them."""

import pickle

import numpy as np
import torch

from lab.data import datasets

CHANNELS_AND_SIZE = {'digits': (1, 8), 'CIFAR10': (3, 32), 'ImageNet': (3, 224)}


def random_batch(dataset, batch, device='cpu', layout=torch.contiguous_format):
    """Normalized images (N, C, H, W) of a data set's size, and targets (N,) of 10 classes."""
    channels, size = CHANNELS_AND_SIZE[dataset]
    inputs = torch.randn(batch, channels, size, size)
    return inputs.to(device, memory_format=layout), torch.arange(batch, device=device) % 10


def small_batches(n, device='cpu'):
    """Training batches of n random images of CIFAR-10's size."""
    images = torch.randint(0, 256, (n, 32, 32, 3), dtype=torch.uint8)
    preprocessing = datasets.PREPROCESSING['CIFAR10']
    train = images, torch.arange(n) % 10
    data = datasets.Data('CIFAR10', train, None, (), preprocessing, mirrored=True)
    return data.batches(True, batch_size=128, pad=4, device=device)


def jpeg_batches(folder, part):
    """Batches of 64 from folder/train or folder/val, decoded in two processes."""
    return datasets.load('folder', folder).batches(part == 'train', batch_size=64, workers=2)


def write_photographs(folder, n):
    """Write n JPEGs of two classes to each of train/ and val/: crops of 500 x 375 pixels of
    scikit-learn's two photographs."""
    import cv2
    from sklearn.datasets import load_sample_images

    photographs, random = load_sample_images().images, np.random.default_rng(0)
    for part in ('train', 'val'):
        for label in ('0', '1'):
            (folder / part / label).mkdir(parents=True)
        for i in range(n):
            top, left = random.integers(0, 53), random.integers(0, 141)
            crop = photographs[i % 2][top : top + 375, left : left + 500]
            path = folder / part / str(i % 2) / f'{i:05}.jpg'
            cv2.imwrite(str(path), crop[..., ::-1])  # OpenCV's order of colors


def write_cifar10(folder, n, n_test):
    """Write random images in the format of CIFAR-10: n for training, n_test for testing."""
    from torchvision.datasets import CIFAR10

    folder, random = folder / CIFAR10.base_folder, np.random.default_rng(0)
    folder.mkdir()
    parts = [(name, n // 5) for name, _ in CIFAR10.train_list]
    for name, size in (*parts, (CIFAR10.test_list[0][0], n_test)):
        data = random.integers(0, 256, (size, 3 * 32 * 32), np.uint8)
        content = {'data': data, 'labels': [i % 10 for i in range(size)]}
        (folder / name).write_bytes(pickle.dumps(content))
    names = {CIFAR10.meta['key']: [str(i) for i in range(10)]}
    (folder / CIFAR10.meta['filename']).write_bytes(pickle.dumps(names))

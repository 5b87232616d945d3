"""Images for the benchmarks, made in the sizes and file formats of the real data sets."""

import hashlib
import pickle

import torch

CHANNELS_AND_SIZE = {'digits': (1, 8), 'CIFAR10': (3, 32), 'ImageNet': (3, 224)}


def random_batch(dataset, batch):
    """Normalized images (N, C, H, W) of a data set's size, and targets (N,) of 10 classes."""
    channels, size = CHANNELS_AND_SIZE[dataset]
    return torch.randn(batch, channels, size, size), torch.arange(batch) % 10


def random_cifar(n):
    """uint8 images (N, 32, 32, 3) and targets (N,)."""
    return torch.randint(0, 256, (n, 32, 32, 3), dtype=torch.uint8), torch.arange(n) % 10


def write_photographs(folder, n, size=(500, 375), quality=90):
    """Write n JPEGs of two classes to each of train/ and val/.

    They are crops of `size`, (width, height) in pixels, of scikit-learn's two photographs.
    """
    import cv2
    import numpy as np
    from sklearn.datasets import load_sample_images

    photographs, random = load_sample_images().images, np.random.default_rng(0)
    width, height = size
    for part in ('train', 'val'):
        for label in ('0', '1'):
            (folder / part / label).mkdir(parents=True)
        for i in range(n):
            top, left = random.integers(0, 427 - height + 1), random.integers(0, 640 - width + 1)
            crop = photographs[i % 2][top : top + height, left : left + width]
            path = folder / part / str(i % 2) / f'{i:05}.jpg'
            bgr = crop[..., ::-1]  # OpenCV's order
            cv2.imwrite(str(path), bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])


def write_cifar(root, images_per_file=10_000):
    """Write random images in CIFAR-10's format. Returns the MD5 sum of each file by name."""
    import numpy as np

    random = np.random.default_rng(0)
    contents = {}
    for name in (*(f'data_batch_{i}' for i in range(1, 6)), 'test_batch'):
        contents[name] = {
            'data': random.integers(0, 256, (images_per_file, 3072)).astype(np.uint8),
            'labels': random.integers(0, 10, images_per_file).tolist(),
        }
    contents['batches.meta'] = {'label_names': [f'class{i}' for i in range(10)]}
    folder = root / 'cifar-10-batches-py'
    folder.mkdir(parents=True)
    sums = {}
    for name, content in contents.items():
        file = pickle.dumps(content, protocol=2)
        (folder / name).write_bytes(file)
        sums[name] = hashlib.md5(file).hexdigest()
    return sums

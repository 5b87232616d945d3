"""Images made for the benchmarks, the batches of them, and other decoders of JPEGs."""

import io
import pickle
import time
from collections import deque
from functools import partial
from importlib.util import find_spec
from unittest.mock import patch

import numpy as np
import torch

from lab.data import datasets, image_files

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


def jpeg_batches(folder, part, workers=2):
    """Batches of 64 from folder/train or folder/val, decoded in `workers` processes."""
    return datasets.load('folder', folder).batches(part == 'train', batch_size=64, workers=workers)


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


# --- decoders: functions of a file's bytes; unlike ours, the others decode whole images alone ----


def decode_with_torchvision(content, *_):
    from torchvision.io import ImageReadMode, decode_jpeg

    image = decode_jpeg(torch.from_numpy(content), ImageReadMode.RGB, apply_exif_orientation=True)
    return image.permute(1, 2, 0).numpy()


def decode_with_pillow(content, *_):
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(content)).convert('RGB'))


def decode_with_simplejpeg(content, *_, **options):
    import simplejpeg

    return simplejpeg.decode_jpeg(content, 'RGB', **options)


DECODERS = {
    'ours': image_files.decode,
    'torchvision': decode_with_torchvision,
    'Pillow': decode_with_pillow,
}
if find_spec('simplejpeg'):  # not among the requirements
    DECODERS['simplejpeg'] = decode_with_simplejpeg
    less_exact = partial(decode_with_simplejpeg, fastdct=True, fastupsample=True)
    DECODERS['simplejpeg, less exact'] = less_exact


def decoding_times(batches, rounds):
    """{decoder: the ms of CPU time that a pass over the batches takes, one for each round}."""
    torch.set_num_threads(1)
    times, order = {name: [] for name in DECODERS}, list(DECODERS)
    for _ in range(rounds + 1):  # the first fills caches
        order.append(order.pop(0))
        for name in order:
            with patch.object(image_files, 'decode', DECODERS[name]):
                start = time.process_time()
                deque(batches, maxlen=0)
                times[name].append(1000 * (time.process_time() - start))
    return {name: own[1:] for name, own in times.items()}


def largest_difference(decoder, paths):
    """The largest difference between a decoder's pixels and ours."""
    contents = map(image_files.read_bytes, paths)
    pairs = ((DECODERS[decoder](c, ''), image_files.decode(c, '')) for c in contents)
    return max(np.abs(theirs.astype(int) - ours).max() for theirs, ours in pairs)

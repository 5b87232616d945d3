"""Fashion-MNIST from its four IDX files, plain or gzipped."""

import gzip
import struct
from math import prod

import numpy as np
import torch

from lab.data.messages import missing_data, one_line
from lab.errors import UserError

CLASSES = (
    'T-shirt/top',
    'Trouser',
    'Pullover',
    'Dress',
    'Coat',
    'Sandal',
    'Shirt',
    'Sneaker',
    'Bag',
    'Ankle boot',
)
TRAIN_FILES = ('train-images-idx3-ubyte', 'train-labels-idx1-ubyte')
TEST_FILES = ('t10k-images-idx3-ubyte', 't10k-labels-idx1-ubyte')
IDX_FILES = TRAIN_FILES + TEST_FILES
# Where the files may be under --dataroot: directly, or where torchvision or Debian puts them.
SUBFOLDERS = ('', 'FashionMNIST/raw', 'fashion-mnist', 'datasets/fashion-mnist')


def read_fashion_mnist(name, root, download):
    """Read the files under `root`; download them to it if one is missing and `download` is true.

    Returns:
        (images, targets) for training, the same for testing, class names. Images are uint8
        (N, 28, 28, 1), targets int64 (N,).

    Raises:
        UserError: a file is missing or broken.
    """
    files = _find_files(root)
    failure = ''
    if len(files) < len(IDX_FILES) and download:
        failure = _download(root)
        files = _find_files(root)
    missing = [file for file in IDX_FILES if file not in files]
    if missing:
        raise missing_data(
            f'{name} is incomplete under {root}{failure}',
            f'put {", ".join(missing)} there, plain or as .gz',
        )
    train, test = (
        _read_part(files[images], files[labels]) for images, labels in (TRAIN_FILES, TEST_FILES)
    )
    return train, test, CLASSES


def _find_files(root):
    """{file name without .gz: the first path that exists}"""
    found = {}
    for folder in SUBFOLDERS:
        for name in IDX_FILES:
            for path in (root / folder / name, root / folder / f'{name}.gz'):
                if path.is_file():
                    found.setdefault(name, path)
    return found


def _download(root):
    """Download with torchvision. Returns '', or why it failed, as part of a message."""
    from torchvision.datasets import FashionMNIST

    try:
        root.mkdir(parents=True, exist_ok=True)
        FashionMNIST(root, download=True)
    except (OSError, RuntimeError) as error:
        return f' and the download failed ({one_line(error)})'
    return ''


def _read_part(images_path, labels_path):
    """The training or test set: (images, targets)."""
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
    if len(images) != len(labels):
        raise UserError(
            f'{images_path} has {len(images)} images but {labels_path} has {len(labels)} labels: '
            'download both again'
        )
    if images.shape[1:] != (28, 28) or labels.max() > 9:
        raise UserError(
            f'{images_path} and {labels_path} are not Fashion-MNIST (28 x 28 pixels, '
            'labels 0 to 9): download both again'
        )
    return torch.from_numpy(images)[..., None], torch.from_numpy(labels.astype(np.int64))


def read_idx(path, ndim):
    """An IDX file of unsigned bytes as an array of `ndim` dimensions. Raises UserError.

    The format: two zeros, 8, the number of dimensions, their sizes as big-endian int32, the bytes
    (http://yann.lecun.com/exdb/mnist).
    """
    open_file = gzip.open if path.suffix == '.gz' else open
    try:
        with open_file(path, 'rb') as file:
            content = file.read()
    except (OSError, EOFError) as error:
        raise UserError(f'{path} cannot be read ({one_line(error)}): download it again') from None
    start = 4 + 4 * ndim  # of the values
    if content[:4] == bytes((0, 0, 8, ndim)) and len(content) >= start:
        shape = struct.unpack(f'>{ndim}i', content[4:start])
        if len(content) == start + prod(shape):
            return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()
    raise UserError(f'{path} is not a complete IDX file of {ndim} dimensions: download it again')

"""Readers of small data sets: scikit-learn's digits, Fashion-MNIST, CIFAR, and SVHN.

Each is read(name, root, download), with `name` of the data set, and `root`, the folder with its
files, to which torchvision downloads missing ones if `download` is true.

Each returns (images, targets) for training, the same for testing, and class names. Images are uint8
(N, H, W, C), targets int64 (N,). Each raises UserError if files are missing or broken.
"""

import contextlib
import gzip
import zlib

import numpy as np
import torch

from lab.errors import UserError

FASHION_CLASSES = (
    *('T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat'),
    *('Sandal', 'Shirt', 'Sneaker', 'Bag', 'Ankle boot'),
)
IDX_FILES = (
    *('train-images-idx3-ubyte', 'train-labels-idx1-ubyte'),
    *('t10k-images-idx3-ubyte', 't10k-labels-idx1-ubyte'),
)
# Where these may be under --dataroot: directly, or where torchvision or Debian puts them.
IDX_FOLDERS = ('', 'FashionMNIST/raw', 'fashion-mnist', 'datasets/fashion-mnist')


def read_digits(name, root, download):
    """The 1,797 digits of 8 x 8: the first 1,437 for training, the last 360 for testing. Most of
    the latter are by writers who are not in the training set. scikit-learn contains the files."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # 0..16 becomes 0..255
    images, targets = _tensors(pixels[..., None], digits.target)
    classes = tuple(map(str, digits.target_names))
    return (images[:1437], targets[:1437]), (images[1437:], targets[1437:]), classes


def _tensors(images, targets):
    return torch.from_numpy(np.ascontiguousarray(images)), torch.tensor(targets, dtype=torch.int64)


def _missing(problem, files):
    return UserError(
        f'{problem}: put {files} there, or pass another folder with --dataroot '
        '(--dataset digits needs no download)'
    )


# --- torchvision's ----------------------------------------------------------------------------


def read_cifar(name, root, download):
    """CIFAR10 or CIFAR100."""
    from torchvision import datasets

    reader = getattr(datasets, name)
    files = f'the folder {reader.base_folder} (from {reader.filename})'
    train, test = (_open(reader, root, download, files, train=train) for train in (True, False))
    return _tensors(train.data, train.targets), _tensors(test.data, test.targets), train.classes


def read_svhn(name, root, download):
    from torchvision.datasets import SVHN

    files = ' and '.join(SVHN.split_list[split][1] for split in ('train', 'test'))
    train, test = (_open(SVHN, root, download, files, split=split) for split in ('train', 'test'))
    # Its images are (N, C, H, W), unlike those of CIFAR.
    train, test = (_tensors(part.data.transpose(0, 2, 3, 1), part.labels) for part in (train, test))
    return train, test, tuple('0123456789')


def _open(reader, root, download, files, **part):
    """An instance of `reader`, a torchvision class, which checks MD5 sums; downloads if needed."""
    try:
        with contextlib.suppress(RuntimeError):  # a file is missing, or its MD5 sum is wrong
            return reader(root, **part)
        root.mkdir(parents=True, exist_ok=True)
        return reader(root, download=download, **part)
    except (OSError, RuntimeError, EOFError) as error:
        name = reader.__name__
        problem = f'{name} is missing under {root}, or a file has another MD5 sum ({error})'
        raise _missing(problem, files) from None


# --- Fashion-MNIST ----------------------------------------------------------------------------


def read_fashion_mnist(name, root, download):
    """28 x 28 pixels, from its four IDX files, plain or gzipped."""
    from torchvision.datasets import FashionMNIST

    problem, paths = f'{name} is incomplete under {root}', _idx_paths(root)
    if None in paths and download:
        try:
            root.mkdir(parents=True, exist_ok=True)
            FashionMNIST(root, download=True)
        except (OSError, RuntimeError) as error:
            problem += f' and the download failed ({error})'
        paths = _idx_paths(root)
    missing = [file for file, path in zip(IDX_FILES, paths) if path is None]
    if missing:
        raise _missing(problem, ', '.join(missing))
    train, test = (_read_part(*pair) for pair in (paths[:2], paths[2:]))
    return train, test, FASHION_CLASSES


def _idx_paths(root):
    """For each of IDX_FILES, the first path that exists, or None."""
    places = [[root / folder / file for folder in IDX_FOLDERS] for file in IDX_FILES]
    return [
        next((p for path in paths for p in (path, path.with_suffix('.gz')) if p.is_file()), None)
        for paths in places
    ]


def _read_part(images_path, labels_path):
    images, labels = _read_idx(images_path, 3), _read_idx(labels_path, 1)
    if images.shape != (len(labels), 28, 28) or labels.max(initial=0) > 9:
        raise UserError(
            f'{images_path} and {labels_path} are not Fashion-MNIST: {len(images)} images of '
            f'{images.shape[1:]} pixels, {len(labels)} labels up to {labels.max(initial=0)}; '
            'download both again'
        )
    return _tensors(images[..., None], labels)


def _read_idx(path, ndim):
    """An IDX file of unsigned bytes as an array of `ndim` dimensions. Raises UserError.

    The format: two zeros, 8, the number of dimensions, their sizes as big-endian int32, the bytes
    (http://yann.lecun.com/exdb/mnist).
    """
    open_file = gzip.open if path.suffix == '.gz' else open
    try:
        with open_file(path, 'rb') as file:
            content = file.read()
        if content[:4] != bytes((0, 0, 8, ndim)):
            raise ValueError(f'not an IDX file of {ndim} dimensions')
        sizes = np.frombuffer(content, '>i4', ndim, offset=4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * ndim).reshape(sizes).copy()
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f'{path} cannot be read ({error}): download it again') from None

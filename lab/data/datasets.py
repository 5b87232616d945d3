"""The data sets: one table, and `load`, which reads a data set named in it.

`load(name, root)` returns a `Data`. Its `batches(...)` are iterables of (images, targets):
floats (N, C, H, W) in channels_last, augmented and normalized, on the training device.
Each reader imports the libraries that only it needs.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from lab.data.batches import FolderBatches, MemoryBatches
from lab.data.digits import read_digits
from lab.data.fashion_mnist import read_fashion_mnist
from lab.data.image_folders import ImageFolder, list_classes
from lab.data.preprocessing import Preprocessing, cached_whitening
from lab.data.torchvision_sets import read_cifar, read_in_child, read_svhn
from lab.errors import OptionError


@dataclass(frozen=True)
class Source:
    """A row of the table: what this package knows about a data set.

    `read(name, root, download)` returns (images, targets) for training, the same for testing, and
    class names; it raises UserError. It is None for folders of image files.
    """

    preprocessing: Preprocessing
    read: Callable | None
    # Whether training images in memory are mirrored at random. Digits must not be.
    mirrored: bool = False


# Means and standard deviations are over all pixels of the training set. CIFAR's and ImageNet's
# are the paper's.
CIFAR = Preprocessing(3, 32, 32, (125.3, 123.0, 113.9), (63.0, 62.1, 66.7))
PHOTOGRAPHS = Preprocessing(3, 224, 256, (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))

# The facts about networks (form, channels, number of classes) are in diracnet.DATASETS.
SOURCES = {
    'digits': Source(Preprocessing(1, 8, 8, (77.9,), (95.7,)), read_digits),
    'FashionMNIST': Source(
        Preprocessing(1, 28, 28, (72.9,), (90.0,)), read_fashion_mnist, mirrored=True
    ),
    'CIFAR10': Source(CIFAR, partial(read_in_child, read_cifar), mirrored=True),
    'CIFAR100': Source(CIFAR, partial(read_in_child, read_cifar), mirrored=True),
    'SVHN': Source(
        Preprocessing(3, 32, 32, (111.6, 113.2, 120.6), (50.5, 51.3, 50.2)),
        partial(read_in_child, read_svhn),
    ),
    'ImageNet': Source(PHOTOGRAPHS, read=None),
    'folder': Source(PHOTOGRAPHS, read=None),
}
PREPROCESSING = {name: source.preprocessing for name, source in SOURCES.items()}


@dataclass(frozen=True)
class Data:
    """A data set: `train` and `test` are each (images, targets) in memory, or an `ImageFolder`.

    Images in memory are uint8 (N, H, W, C), targets int64 (N,).
    """

    name: str
    train: object
    test: object
    classes: tuple
    preprocessing: Preprocessing

    def batches(
        self, train, *, batch_size, device='cpu', seed=0, pad=0, cutout=0, workers=0, shard=(0, 1)
    ):
        """Batches of the training set, shuffled and augmented, or of the unchanged test set.

        Args:
            batch_size: of all processes together.
            pad, cutout: pixels of reflection around a random crop, and the side of the square that
                is cut out, for images in memory.
            workers: processes that decode image files.
            shard: (rank, number of processes).

        Returns:
            MemoryBatches or FolderBatches.

        Raises:
            OptionError: cutout for image files, or an impossible crop.
        """
        source = self.train if train else self.test
        if isinstance(source, ImageFolder):
            if cutout:
                raise OptionError(
                    f'--cutout needs images in memory, but {self.name} has image files'
                )
            return FolderBatches(
                source, batch_size, device=device, seed=seed, workers=workers, shard=shard
            )
        return MemoryBatches(
            *source,
            self.preprocessing,
            batch_size,
            device=device,
            seed=seed,
            shuffle=train,
            pad=pad if train else 0,
            cutout=cutout if train else 0,
            flip=train and SOURCES[self.name].mirrored,
            shard=shard,
        )

    def holdout(self, n):
        """This data set with the last n training samples as its test set, to choose options on.

        Raises:
            OptionError: a folder of image files, or n is out of range.
        """
        if isinstance(self.train, ImageFolder):
            raise OptionError(f'--holdout needs images in memory, but {self.name} has image files')
        images, targets = self.train
        if not 0 < n < len(images):
            raise OptionError(
                f'--holdout {n} is impossible: {self.name} has {len(images)} training samples; '
                f'choose 1 to {len(images) - 1}'
            )
        return replace(self, train=(images[:-n], targets[:-n]), test=(images[-n:], targets[-n:]))

    def per_class(self, n):
        """This data set with the first n training samples of each class alone.

        Raises:
            OptionError: a folder of image files, or a class has fewer.
        """
        if isinstance(self.train, ImageFolder):
            raise OptionError(
                f'--per_class needs images in memory, but {self.name} has image files'
            )
        images, targets = self.train
        indices = [(targets == c).nonzero()[:n, 0] for c in range(len(self.classes))]
        fewest = min(map(len, indices))
        if fewest < n:
            raise OptionError(
                f'--per_class {n} is impossible: a class of {self.name} has {fewest} training '
                'samples'
            )
        chosen = torch.cat(indices).sort().values
        return replace(self, train=(images[chosen], targets[chosen]))

    def whitened(self, root):
        """This data set with ZCA whitening as its preprocessing, fitted to the training images.

        The whitening is cached under `root`. Raises OptionError for a folder of image files.
        """
        if isinstance(self.train, ImageFolder):
            raise OptionError(
                f'--preprocess zca needs images in memory, but {self.name} has image files'
            )
        whitening = cached_whitening(self.train[0], _expanded(root), self.name)
        return replace(self, preprocessing=replace(self.preprocessing, whitening=whitening))


def load(name, root, *, download=True, image_size=224):
    """Read a data set.

    Args:
        name: a key of SOURCES.
        root: the folder with its files. If `download`, small data sets are downloaded to it.
        image_size: the network's input in pixels, for folders of image files.

    Returns:
        Data

    Raises:
        OptionError: an unknown name.
        UserError: files are missing or broken; the message says what to put where.
    """
    if name not in SOURCES:
        raise OptionError(f'unknown data set {name}: choose from {", ".join(SOURCES)}')
    source = SOURCES[name]
    root = _expanded(root)
    if source.read is None:
        return _load_folder(name, root, source.preprocessing, image_size)
    train, test, classes = source.read(name, root, download)
    return Data(name, train, test, tuple(classes), source.preprocessing)


def _expanded(root):
    """A path with ~ replaced by the home folder. Path.expanduser raises an error for other users
    that do not exist."""
    return Path(os.path.expanduser(root))


def _load_folder(name, root, preprocessing, image_size):
    """The Data of root/train/CLASS/* and root/val/CLASS/*."""
    resize = round(image_size * 256 / 224)
    preprocessing = replace(preprocessing, image_size=image_size, resize=resize)
    classes = list_classes(root)
    train, test = (ImageFolder(root, part, classes, preprocessing) for part in ('train', 'val'))
    return Data(name, train, test, tuple(classes), preprocessing)

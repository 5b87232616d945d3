"""The data sets: one table, and `load`, which reads a data set named in it.

`load(name, root)` returns a `Data`. Its `batches(...)` are iterables of (images, targets):
floats (N, C, H, W) in channels_last, augmented and normalized, on the training device.
Each reader imports the libraries that only it needs.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from lab.data.batches import FolderBatches, MemoryBatches
from lab.data.image_folders import (
    TEST_FOLDERS,
    find_splits,
    has_small_images,
    list_images,
    read_into_memory,
)
from lab.data.names import CLASS_NAMES, display_name, read_names
from lab.data.preprocessing import Preprocessing, cached_whitening, mean_and_std
from lab.data.readers import read_cifar, read_digits, read_fashion_mnist, read_svhn
from lab.errors import OptionError, UserError, printable
from lab.memory import total_memory


class DataSet(NamedTuple):
    """What is known about a data set before it is read."""

    preprocessing: Preprocessing
    read: Callable = None  # see lab.data.readers; None for folders of image files
    # Whether training images in memory are mirrored at random. Digits must not be.
    mirrored: bool = False


# Means and standard deviations are over all pixels of the training set. CIFAR's and ImageNet's
# are the paper's.
CIFAR = Preprocessing(3, 32, 32, (125.3, 123.0, 113.9), (63.0, 62.1, 66.7))
PHOTOGRAPHS = Preprocessing(3, 224, 256, (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
FASHION = Preprocessing(1, 28, 28, (72.9,), (90.0,))
HOUSE_NUMBERS = Preprocessing(3, 32, 32, (111.6, 113.2, 120.6), (50.5, 51.3, 50.2))

# Networks' form, channels and number of classes are in diracparams.DATASETS.
DATA_SETS = {
    'digits': DataSet(Preprocessing(1, 8, 8, (77.9,), (95.7,)), read_digits),
    'FashionMNIST': DataSet(FASHION, read_fashion_mnist, mirrored=True),
    'CIFAR10': DataSet(CIFAR, read_cifar, mirrored=True),
    'CIFAR100': DataSet(CIFAR, read_cifar, mirrored=True),
    'SVHN': DataSet(HOUSE_NUMBERS, read_svhn),
    'ImageNet': DataSet(PHOTOGRAPHS),
    'folder': DataSet(PHOTOGRAPHS),
}
PREPROCESSING = {name: known.preprocessing for name, known in DATA_SETS.items()}


@dataclass(frozen=True)
class Data:
    """A data set: `train` and `test` are each (images, targets), with int64 targets (N,).

    Images in memory are a tensor, uint8 (N, H, W, C); image files are an array of paths, bytes
    (N,). `test` is None for a folder without test images: see `tested_on`.
    """

    name: str
    train: tuple
    test: tuple
    classes: tuple
    preprocessing: Preprocessing
    mirrored: bool = False  # whether training images are mirrored at random
    from_files: bool = False  # whether the samples are sorted by class, as image files are
    broken: tuple = ({}, {})  # {path: message} of the files left out of train and test in memory
    notes: tuple = ()  # lines that a user should see

    @property
    def in_memory(self):
        return isinstance(self.train[0], torch.Tensor)

    def batches(
        self, train, *, batch_size, device='cpu', seed=0, pad=0, cutout=0, workers=0, shard=(0, 1)
    ):
        """Batches of the training set, shuffled and augmented, or of the unchanged test set.

        Args: those of MemoryBatches (pad and cutout) and FolderBatches (workers).

        Raises:
            OptionError: an option does not fit the images.
        """
        args = *(self.train if train else self.test), self.preprocessing, batch_size
        kwargs = dict(train=train, mirrored=self.mirrored, device=device, seed=seed, shard=shard)
        if self.in_memory:
            broken = self.broken[0 if train else 1]
            return MemoryBatches(*args, pad=pad, cutout=cutout, broken=broken, **kwargs)
        if cutout:
            raise self._needs_memory('--cutout')
        return FolderBatches(*args, workers=workers, **kwargs)

    def _needs_memory(self, option):
        return OptionError(
            f'{option} needs images in memory, but {printable(self.name)} has image files '
            '(--dataset folder --form cifar reads small ones into memory)'
        )

    def tested_on(self, holdout):
        """This data set, with `holdout` of the training samples as its test set if that is not 0.
        Raises UserError if there are no test images."""
        if holdout:
            return self.holdout(holdout)
        if self.test is None:
            folders = ', '.join(f'{name}/' for name in TEST_FOLDERS)
            raise UserError(
                f'{printable(self.name)} has no test images ({folders}): add a folder of them, or '
                'test on training images with train.py --holdout 20%'
            )
        return self

    def holdout(self, amount):
        """This data set with a part of the training samples as its test set, to choose options on.

        These are the last ones. Image files are sorted by class: of them, they are drawn at random,
        always the same.

        Args:
            amount: a number of samples, or a share such as '20%'.

        Raises:
            OptionError: the number is out of range, or a class has no sample left.
        """
        n, total = amount, len(self.train[1])
        if isinstance(amount, str):
            n = round(total * float(amount.rstrip('%')) / 100)
        if not 0 < n < total:
            raise OptionError(
                f'--holdout {amount} is impossible: that is {n} of the {total} training samples of '
                f'{printable(self.name)}; choose 1 to {total - 1}'
            )
        rest, held_out = slice(None, -n), slice(-n, None)
        if self.from_files:
            order = np.random.default_rng(0).permutation(total)
            rest, held_out = np.sort(order[n:]), np.sort(order[:n])
            left = np.bincount(np.asarray(self.train[1])[rest], minlength=len(self.classes))
            if not left.all():
                raise OptionError(
                    f'--holdout {amount} leaves {printable(self.classes[left.argmin()])} without '
                    'training samples: choose fewer'
                )
        test = _select(self.train, held_out)
        return self._with_train(rest, test=test, broken=(self.broken[0], {}))

    def per_class(self, n):
        """This data set with the first n training samples of each class alone. Raises OptionError
        if a class has fewer."""
        targets = np.asarray(self.train[1])
        indices = [np.flatnonzero(targets == c)[:n] for c in range(len(self.classes))]
        for label, own in zip(self.classes, indices):
            if len(own) < n:
                raise OptionError(
                    f'--per_class {n} is impossible: the class {printable(str(label))} of '
                    f'{printable(self.name)} has {len(own)} training samples'
                )
        return self._with_train(np.sort(np.concatenate(indices)))

    def _with_train(self, indices, **changes):
        """This data set with a part of its training set."""
        changed = replace(self, train=_select(self.train, indices), **changes)
        return changed.standardized() if self.in_memory and self.from_files else changed

    def standardized(self):
        """This data set with the mean and standard deviation of its own training images."""
        mean, std = mean_and_std(self.train[0])
        return replace(self, preprocessing=replace(self.preprocessing, mean=mean, std=std))

    def whitened(self, root):
        """This data set with ZCA whitening as its preprocessing, fitted to the training images, and
        cached under `root`. Raises OptionError for a folder of image files."""
        if not self.in_memory:
            raise self._needs_memory('--preprocess zca')
        whitening = cached_whitening(self.train[0], Path(os.path.expanduser(root)))
        return replace(self, preprocessing=replace(self.preprocessing, whitening=whitening))


def _select(part, indices):
    images, targets = part
    return images[indices], targets[indices]


def load(name, root, *, download=True, form=None, image_size=None):
    """The Data of a data set.

    Args:
        name: a key of DATA_SETS.
        root: the folder with its files. If `download`, small data sets are downloaded to it.
        form: for a folder of image files, 'imagenet' (the default), whose images stay in their
            files, or 'cifar', whose small images are read into memory.
        image_size: the network's input in pixels, for image files; None: 224, or 32 for form cifar.

    Raises:
        OptionError: an unknown name.
        UserError: files are missing or broken; the message says what to put where.
    """
    if name not in DATA_SETS:
        raise OptionError(f'unknown data set {name}: choose from {", ".join(DATA_SETS)}')
    # Unlike Path.expanduser, this keeps the name of a user that does not exist.
    known, root = DATA_SETS[name], Path(os.path.expanduser(root))
    if known.read is None:
        return _load_folder(name, root, form, image_size)
    train, test, classes = known.read(name, root, download)
    return Data(name, train, test, tuple(classes), known.preprocessing, known.mirrored)


def _load_folder(name, root, form, image_size):
    """The Data of image files under `root`, in the splits that `find_splits` finds."""
    folders = find_splits(root)
    classes, train, ignored = list_images(folders[0])
    test, notes = None, []
    if folders[1]:
        test_classes, test, ignored_too = list_images(folders[1])
        ignored += ignored_too
        differences = sorted(set(classes) ^ set(test_classes))
        if differences:
            label = differences[0]
            has, lacks = folders if label in classes else folders[::-1]
            raise UserError(
                f'{lacks} has no folder {printable(label)}, but {has} has: both need the same '
                'classes'
            )
        if folders[1].name != TEST_FOLDERS[0]:
            notes.append(f'the test images are those in {folders[1].name}/')
    if ignored:
        counts = (f'{n} {suffix} in {label}' for (label, suffix), n in ignored.most_common(5))
        notes.append(
            f'{ignored.total():,} files are ignored, because their suffixes are not those of '
            f'images, such as {", ".join(counts)}'
        )
    if name == 'folder' and form is None and has_small_images(train[0]):
        notes.append(
            'the images are small: consider --form cifar, whose networks are made for them'
        )
    if form == 'cifar':
        size = resize = image_size or CIFAR.image_size
    else:
        size = image_size or PHOTOGRAPHS.image_size
        resize = round(size * 256 / 224)
    names = read_names(root / CLASS_NAMES)
    data = Data(
        display_name(name, root),
        train,
        test,
        tuple(names.get(folder, folder) for folder in classes),
        replace(PHOTOGRAPHS, image_size=size, resize=resize),
        mirrored=True,
        from_files=True,
        notes=tuple(map(printable, notes)),
    )
    return _in_memory(data) if form == 'cifar' else data


def _in_memory(data):
    """A Data of image files with its images in memory. Raises UserError."""
    size = data.preprocessing.image_size
    parts = [data.train, data.test] if data.test else [data.train]
    n = sum(len(targets) for _, targets in parts)
    needed, available = n * size**2 * data.preprocessing.channels, total_memory()
    if needed > available:
        raise UserError(
            f'{printable(data.name)} has {n:,} images, which need {needed / 1e9:,.1f} GB of memory '
            f'as {size} x {size} pixels, but this machine has {available / 1e9:,.1f} GB: use a '
            'smaller --image_size, or --form imagenet'
        )
    read = [read_into_memory(*part, data.preprocessing) for part in parts]
    (train, train_broken), (test, test_broken) = [*read, (None, {})][:2]
    data = replace(data, train=train, test=test, broken=(train_broken, test_broken))
    return data.standardized()

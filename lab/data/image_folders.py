"""Folders of image files: their splits, their classes, the lists of their files, their images."""

import copy
import os
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from lab.data.image_files import (
    SUFFIXES,
    image_size,
    is_hidden,
    prepare,
    read_image,
    real_lineage,
    training_crop,
    walk_images,
)
from lab.data.messages import missing_data
from lab.data.names import read_names
from lab.distributed import rank
from lab.errors import UserError, printable

TEST_FOLDERS = ('val', 'validation', 'valid', 'test')  # the first that exists is the test set
CLASS_NAMES = 'classes.txt'  # may be in the root: a line FOLDER<TAB>NAME for each class
SMALL = 64  # pixels: images up to this width are better kept in memory


class ImageFolder(torch.utils.data.Dataset):
    """The images of a training set (`train`) or a test set in the folder `root`.

    The index of an item is (seed, epoch, index). The item is (image, target, problems): uint8
    (size, size, 3), the class, and (path, message) of each broken file encountered. In training,
    the next intact image replaces a broken one. In testing, image is None for a broken file.

    Args:
        names, targets: arrays of the files relative to `root` (bytes), and of their classes
            (int64). They are no lists, so that worker processes share their memory: counting
            references to the items of a list would write to it, and so copy it.
        mirrored: whether half of the training images are mirrored.
    """

    TRIES = 20  # this many broken files in a row, or in a batch: something else must be wrong

    def __init__(self, root, names, targets, preprocessing, train, mirrored=True):
        self.root, self.names, self.targets = Path(root), names, targets
        self.preprocessing, self.train, self.mirrored = preprocessing, train, mirrored

    def __len__(self):
        return len(self.names)

    def changed(self, **attributes):
        """A copy with other attributes."""
        other = copy.copy(self)
        vars(other).update(attributes)
        return other

    def path(self, index):
        return self.root / os.fsdecode(self.names[index])

    def __getitem__(self, place):
        seed, epoch, index = place
        problems = []
        for attempt in range(self.TRIES if self.train else 1):
            sample = (index + attempt) % len(self)
            path = self.path(sample)
            try:
                image = self._read(path, seed=(seed, epoch, 1, sample))
            except UserError as error:
                # Returned, not raised: DataLoader would put a traceback into the message.
                problems.append((str(path), str(error)))
            else:
                image = torch.from_numpy(np.ascontiguousarray(image))
                return image, int(self.targets[sample]), problems
        return None, int(self.targets[index]), problems

    def _read(self, path, seed):
        if self.train:
            size = self.preprocessing.image_size
            return training_crop(path, size, np.random.default_rng(seed), self.mirrored)
        return prepare(read_image(path), self.preprocessing)


def read_into_memory(folder, classes):
    """All images of an ImageFolder, as `prepare` makes them, without the broken ones.

    Returns:
        (images, targets): uint8 (N, size, size, channels), int64 (N,).
        broken: {path: message} of the files that could not be used.

    Raises:
        UserError: all images of a class are broken.
    """
    from tqdm import tqdm

    size, channels = folder.preprocessing.image_size, folder.preprocessing.channels
    images = np.empty((len(folder), size, size, channels), np.uint8)
    whole, broken = np.ones(len(folder), bool), {}
    label = f'reading {printable(folder.root.name)}'
    disable = None if rank() == 0 else True  # None: if the output is not a terminal
    for index in tqdm(range(len(folder)), label, unit='img', disable=disable, leave=False):
        path = folder.path(index)
        try:
            images[index] = prepare(read_image(path), folder.preprocessing)
        except UserError as error:
            whole[index], broken[str(path)] = False, str(error)
    if broken:
        images = images[whole]
    targets = folder.targets[whole]
    counts = np.bincount(targets, minlength=len(classes))
    if not counts.all():
        label = printable(classes[counts.argmin()])
        raise UserError(f'{printable(str(folder.root))} has no image of {label} that can be read')
    return (torch.from_numpy(images), torch.from_numpy(targets)), broken


def has_small_images(folder):
    """Whether the first hundred images of an ImageFolder, as far as they can be read, are small."""
    sizes = [image_size(folder.path(index)) for index in range(min(100, len(folder)))]
    widths = [size[0] for size in sizes if size]
    return bool(widths) and max(widths) <= SMALL


# --- splits and classes -----------------------------------------------------------------------


def find_splits(root):
    """The folders of the training and of the test images under `root`, whose names may be in
    capitals. The second is None if there is none; then the first may be `root` itself."""
    names = os.listdir(root) if os.access(root, os.R_OK) and os.path.isdir(root) else []
    folders = {name.lower(): root / name for name in names if os.path.isdir(root / name)}
    train = folders.get('train', root / 'train')
    test = next((folders[name] for name in TEST_FOLDERS if name in folders), None)
    return (root if names and test is None and 'train' not in folders else train), test


def list_classes(train, test=None):
    """The class names: the folders in `train`, which must also be those in `test`.

    Raises:
        UserError: the folders do not exist, or they differ, or there is only one class.
    """
    classes = _class_folders(train)
    if test is not None:
        found = {train: classes, test: _class_folders(test)}
        for folder, other in ((train, test), (test, train)):
            missing = sorted(set(found[other]) - set(found[folder]))
            if missing:
                more = f' (and {len(missing) - 1} more)' if len(missing) > 1 else ''
                raise UserError(
                    f'{folder} has no folder {printable(missing[0])}{more}, but {other} has: '
                    f'{folder.name} and {other.name} need the same classes'
                )
    if len(classes) == 1:
        raise UserError(
            f'{train} has one class, {printable(classes[0])}: a network needs two or more to '
            'choose from'
        )
    return classes


def _class_folders(folder):
    """Sorted names of the folders in a folder, without hidden ones and links that lead back up."""
    remedy = 'put train/CLASS/*.jpg and val/CLASS/*.jpg under the folder of the data'
    above = real_lineage(folder)
    try:
        classes = [
            entry.name
            for entry in os.scandir(folder)
            if os.path.isdir(entry)
            and not is_hidden(entry.name)
            and real_lineage(entry)[0] not in above
        ]
    except OSError as error:
        raise missing_data(f'{folder} cannot be read ({error.strerror})', remedy) from None
    if not classes:
        raise missing_data(f'{folder} has no folders of classes', remedy)
    names = {}
    for name in sorted(classes):
        first = names.setdefault(os.path.realpath(folder / name), name)
        if first != name:
            raise UserError(f'{printable(str(folder / name))} is the same folder as {first}')
    return list(names.values())


def class_names(root, classes):
    """The classes with the names that root/classes.txt gives them. Raises UserError."""
    names = read_names(root / CLASS_NAMES)
    return tuple(names.get(label, label) for label in classes)


# --- the files --------------------------------------------------------------------------------


def list_images(folder, classes, apart=None):
    """The image files under folder/CLASS.

    Args:
        apart: the folder of the other split. Links to it are not followed.

    Returns:
        names: array of the files relative to `folder`, bytes (N,).
        targets: array of the indices of their classes, int64 (N,).
        ignored: Counter of the other files, by their class and suffix.

    Raises:
        UserError: a folder cannot be read, or a class has no images.
    """
    roots, others = ([place / label for label in classes] for place in (folder, apart or folder))
    names, targets, ignored = [], [], Counter()
    for index, inside, images, rest in walk_images(roots, others):
        relative = os.path.relpath(inside, folder)
        names.extend(os.fsencode(os.path.join(relative, image)) for image in images)
        targets.extend([index] * len(images))
        suffixes = (os.path.splitext(name)[1].lower() or 'without a suffix' for name in rest)
        ignored.update((classes[index], suffix) for suffix in suffixes)
    targets = np.array(targets, np.int64)
    counts = np.bincount(targets, minlength=len(classes))
    if not counts.all():
        empty = classes[counts.argmin()]
        raise UserError(
            f'{printable(str(folder / empty))} has no images of its own ({", ".join(SUFFIXES)}), '
            f'and {sum(n for (label, _), n in ignored.items() if label == empty)} other files: add '
            'images, or remove the folder'
        )
    return np.array(names), targets, ignored

"""Folders of image files, ROOT/train/CLASS/* and ROOT/val/CLASS/*: their lists and their images."""

import io
import os
import time
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch

from lab.data.image_files import (
    SUFFIXES,
    prepare,
    read_image,
    real_lineage,
    training_crop,
    walk_images,
)
from lab.data.messages import missing_data
from lab.errors import UserError, printable
from lab.files import cache_path, write_atomically

VERSION = 3  # of the cached lists; it changes with the rules of which files a list has
KEYS = ('version', 'names', 'targets', 'folders', 'times', 'classes')


class ImageFolder(torch.utils.data.Dataset):
    """The images under root/part; `part` is train or val.

    The index of an item is (seed, epoch, index). The item is (image, target, problems): uint8
    (size, size, 3), the class, and (path, message) of each broken file encountered. In training,
    the next intact image replaces a broken one. In testing, image is None for a broken file.
    """

    TRIES = 20  # this many broken files in a row, or in a batch: something else must be wrong

    def __init__(self, root, part, classes, preprocessing):
        self.root, self.train = Path(root) / part, part == 'train'
        # Arrays, not lists, so that worker processes share their memory: counting references to
        # the items of a list would write to it, and so copy it.
        self.names, self.targets = list_files(Path(root), part, classes)
        self.preprocessing = preprocessing

    def __len__(self):
        return len(self.names)

    def __getitem__(self, place):
        seed, epoch, index = place
        problems = []
        for attempt in range(self.TRIES if self.train else 1):
            sample = (index + attempt) % len(self)
            path = self.root / os.fsdecode(self.names[sample])
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
            return training_crop(path, size, np.random.default_rng(seed))
        return prepare(read_image(path), self.preprocessing)


def list_classes(root):
    """The class names: the folders in root/train, which must also be those in root/val.

    Raises:
        UserError: the folders do not exist, or they differ.
    """
    found = {part: _class_folders(root, part) for part in ('train', 'val')}
    for part, other in (('train', 'val'), ('val', 'train')):
        missing = sorted(set(found[other]) - set(found[part]))
        if missing:
            more = f' (and {len(missing) - 1} more)' if len(missing) > 1 else ''
            raise UserError(
                f'{root / part} has no folder {printable(missing[0])}{more}, '
                f'but {root / other} has: '
                'train and val need the same classes'
            )
    return found['train']


def _class_folders(root, part):
    """Sorted names of the folders in root/part, without hidden ones and links that lead back up."""
    remedy = f'put {part}/CLASS/*.jpg under {root}'
    above = real_lineage(root / part)
    try:
        folders = [
            entry.name
            for entry in os.scandir(root / part)
            if os.path.isdir(entry) and real_lineage(entry)[0] not in above
        ]
    except OSError as error:
        raise missing_data(f'{root / part} cannot be read ({error.strerror})', remedy) from None
    classes = sorted(name for name in folders if not name.startswith('.'))
    if not classes:
        raise missing_data(f'{root / part} has no folders of classes', remedy)
    return classes


# --- the list of files and its cache ----------------------------------------------------------


def list_files(root, part, classes):
    """The image files under root/part.

    The list is cached, because it takes minutes to read a million names from a slow disk. The cache
    is used as long as no folder's modification time has changed: adding or removing a file changes
    that of its folder.

    Returns:
        Arrays: names relative to root/part (bytes), indices of their classes (int64).

    Raises:
        UserError: a folder cannot be read, or a class has no images.
    """
    path = cache_path(root, f'.diracnets-{part}.npz')
    listing = _read_cache(path)
    if not listing or not _is_current(listing, root / part, classes):
        listing = _list_folder(root, part, classes)
        # A folder that changes twice within a tick of the file system's clock keeps its time. So
        # the list of a folder that has just changed is not cached.
        if listing['times'].max() < time.time_ns() - 2_000_000_000:
            _write_cache(path, listing)
    return listing['names'], listing['targets']


def _list_folder(root, part, classes):
    """The files, and what `_is_current` compares, as a dict of arrays."""
    folder, other = root / part, root / {'train': 'val', 'val': 'train'}[part]
    roots, apart = ([place / label for label in classes] for place in (folder, other))
    names, targets, times = [], [], {}
    for index, inside, images in walk_images(roots, apart):
        relative = os.path.relpath(inside, folder)
        times[os.fsencode(relative)] = os.stat(inside).st_mtime_ns
        names.extend(os.fsencode(os.path.join(relative, image)) for image in images)
        targets.extend([index] * len(images))
    targets = np.array(targets, np.int64)
    counts = np.bincount(targets, minlength=len(classes))
    if not counts.all():
        raise UserError(
            f'{printable(str(folder / classes[counts.argmin()]))} has no images of its own '
            f'({", ".join(SUFFIXES)}): add some, or remove the class from train and val'
        )
    return {
        'version': np.array(VERSION),
        'names': np.array(names),
        'targets': targets,
        'folders': np.array(list(times)),
        'times': np.array(list(times.values())),
        'classes': _encode(classes),
    }


def _encode(classes):
    return np.array([os.fsencode(name) for name in classes])


def _is_current(listing, folder, classes):
    if listing['version'] != VERSION or not np.array_equal(listing['classes'], _encode(classes)):
        return False
    try:
        return all(
            os.stat(folder / os.fsdecode(name)).st_mtime_ns == time
            for name, time in zip(listing['folders'], listing['times'])
        )
    except OSError:  # a folder is gone
        return False


def _read_cache(path):
    """The cached list; None if the file is missing or broken."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            listing = {key: file[key] for key in KEYS}
            is_whole = file['checksum'] == _checksum(listing)
    except Exception:  # np.load raises many types for broken files
        is_whole = False
    return listing if is_whole else None


def _checksum(listing):
    return sha256(b''.join(listing[key].tobytes() for key in KEYS)).hexdigest()


def _write_cache(path, listing):
    content = io.BytesIO()
    np.savez(content, checksum=_checksum(listing), **listing)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content.getvalue())
    except OSError:
        pass  # without a cache the next run lists the files again

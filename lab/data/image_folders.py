"""Folders of image files: their splits, the lists of their files, and small images in memory."""

import contextlib
import os
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from lab.data.image_files import prepare, read_image
from lab.distributed import rank
from lab.errors import UserError, printable

SMALL = 64  # pixels: larger images are for networks of the ImageNet form
SUFFIXES = ('.jpg', '.jpeg', '.jfif', '.png', '.gif', '.bmp', '.ppm', '.webp', '.tif', '.tiff')
TEST_FOLDERS = ('val', 'validation', 'valid', 'test')  # the first that exists is the test set


def find_images(path):
    """The image files that `path` names: itself, or the images under it, sorted, if it is a folder.
    Raises UserError if it has none, or if a folder in it cannot be read."""
    path = Path(path)
    if not os.path.isdir(path):
        return [path]
    files = sorted(Path(folder, name) for folder, images, _ in walk_images(path) for name in images)
    if not files:
        raise UserError(f'{printable(str(path))} contains no images ({", ".join(SUFFIXES)})')
    return files


def walk_images(root):
    """Yield (folder, sorted names of its images, names of its other files) for `root` and all
    folders under it, without hidden ones.

    Links are followed, but no folder is walked twice, and none that contains one that is walked.
    So links cannot form loops. Raises UserError if a folder cannot be read.
    """
    walked = set()
    _add_folder(root, walked)
    for folder, inner, files in os.walk(root, onerror=_raise, followlinks=True):
        inner[:] = [
            name
            for name in sorted(inner)
            if not _is_hidden(name) and _add_folder(os.path.join(folder, name), walked)
        ]
        images, others = [], []
        for name in sorted(files):
            if not _is_hidden(name):
                (images if name.lower().endswith(SUFFIXES) else others).append(name)
        yield folder, images, others


def _is_hidden(name):
    """Whether a file or folder is none of the user's: its name begins with a dot, or it is what
    macOS adds to archives."""
    return name.startswith('.') or name == '__MACOSX'


def _add_folder(path, walked):
    """Add the real path of a folder, and of those that contain it, to the set `walked`. Returns
    False if it is already there."""
    real = Path(os.path.realpath(path))
    if real in walked:
        return False
    walked.update((real, *real.parents))
    return True


def _raise(error):
    raise UserError(
        f'{printable(str(error.filename))} cannot be read ({error.strerror}): fix its permissions '
        'or remove it'
    )


def find_splits(root):
    """The folders of the training and of the test images under `root`, whose names may be in
    capitals. The second is None if there is none; then the first may be `root` itself."""
    names = os.listdir(root) if os.access(root, os.R_OK) and os.path.isdir(root) else []
    folders = {name.lower(): root / name for name in names if os.path.isdir(root / name)}
    train = folders.get('train', root / 'train')
    test = next((folders[name] for name in TEST_FOLDERS if name in folders), None)
    return (root if names and test is None and 'train' not in folders else train), test


def list_images(folder):
    """The image files of a training or test set.

    Returns:
        classes: the sorted names of the folders in `folder`.
        (paths, targets): arrays of bytes and int64 (N,). They are no lists, so that worker
            processes share their memory: counting references to the items of a list would write
            to it, and so copy it.
        ignored: Counter of the other files, by their class and suffix.

    Raises:
        UserError: there are fewer than two classes, or one without images, or a folder that cannot
            be read.
    """
    if not os.path.isdir(folder):
        raise _refusal(folder, 'is not a folder that can be read')
    classes, paths, targets, ignored = [], [], [], Counter()
    for inside, images, others in walk_images(folder):
        label = os.path.relpath(inside, folder).split(os.sep)[0]
        if label == os.curdir:
            continue
        if label not in classes[-1:]:
            classes.append(label)
        paths.extend(os.fsencode(os.path.join(inside, name)) for name in images)
        targets.extend([len(classes) - 1] * len(images))
        suffixes = (os.path.splitext(name)[1].lower() or 'without a suffix' for name in others)
        ignored.update((label, suffix) for suffix in suffixes)
    if len(classes) < 2:
        raise _refusal(folder, 'needs two or more folders of classes')
    targets = np.array(targets, np.int64)
    counts = np.bincount(targets, minlength=len(classes))
    if not counts.all():
        empty = classes[counts.argmin()]
        others = sum(n for (label, _), n in ignored.items() if label == empty)
        raise _refusal(folder / empty, f'has no images of its own, and {others} other files')
    return classes, (np.array(paths), targets), ignored


def _refusal(folder, problem):
    return UserError(
        f'{printable(str(folder))} {problem}: put images ({", ".join(SUFFIXES)}) into train/CLASS '
        'and val/CLASS, or pass another folder with --dataroot'
    )


def has_small_images(paths):
    """Whether the first images, as far as they can be read, have at most SMALL pixels a side."""
    sides = []
    for path in paths[:20]:
        with contextlib.suppress(UserError):
            sides.append(max(read_image(os.fsdecode(path)).shape[:2]))
    return bool(sides) and max(sides) <= SMALL


def read_into_memory(paths, targets, preprocessing):
    """The images of files, as `prepare` makes them, without the broken ones.

    Returns:
        (images, targets): uint8 (N, size, size, channels), int64 (N,).
        broken: {path: message} of the files that could not be used.

    Raises:
        UserError: all images of a class are broken.
    """
    from tqdm import tqdm

    size = preprocessing.image_size
    images = np.empty((len(paths), size, size, preprocessing.channels), np.uint8)
    whole, broken = np.ones(len(paths), bool), {}
    disable = None if rank() == 0 else True  # None: if the output is not a terminal
    for index in tqdm(range(len(paths)), 'reading', unit='img', disable=disable, leave=False):
        path = os.fsdecode(paths[index])
        try:
            images[index] = prepare(read_image(path), preprocessing)
        except UserError as error:
            whole[index], broken[path] = False, str(error)
    lost = set(targets) - set(targets[whole])
    if lost:
        path = os.fsdecode(paths[np.isin(targets, list(lost)).argmax()])
        raise UserError(f'no image like {printable(path)}, of its class, can be read')
    return (torch.from_numpy(images[whole]), torch.from_numpy(targets[whole])), broken

"""Batches of a data set: order, augmentation, worker processes."""

import os
import weakref
from pathlib import Path

import numpy as np
import torch

from lab.data.image_files import list_files, prepare, read_image, training_crop
from lab.data.preprocessing import normalize, whiten
from lab.errors import OptionError, UserError


class Ordered:
    """What batches of every kind have: a size, an epoch, and an order that follows from (seed, epoch)."""

    def __init__(self, n, batch_size, seed, shuffle, shard):
        self.n, self.batch_size, self.seed, self.shuffle = n, batch_size, seed, shuffle
        self.rank, self.world = shard
        self.epoch, self.start = 0, 0  # where the next iteration begins: epoch, and batch in it
        self.broken, self.broken_before = (
            {},
            {},
        )  # broken files of this epoch, path to message; those before `start`

    def __len__(self):
        return -(-self.n // self.batch_size)

    def size(self, number):
        """Samples in a batch, of all processes together."""
        return min(self.batch_size, self.n - number * self.batch_size)

    def order(self):
        """Arrays of indices, one for each batch from `start` on; of several processes, each has its share of every batch."""
        order = (
            np.random.default_rng((self.seed, self.epoch, 0)).permutation(self.n)
            if self.shuffle
            else np.arange(self.n)
        )
        for start in range(self.start * self.batch_size, self.n, self.batch_size):
            yield order[start : start + self.batch_size][self.rank :: self.world]


class MemoryBatches(Ordered):
    """Batches of images that live whole on the device.

    Args:
        images: uint8 (N, H, W, C); targets: int64 (N,). Both are moved to `device` once.
        shuffle: a new order every epoch, from (seed, epoch); else the order they have.
        pad: random crop of the original size out of the image padded so far by reflection; flip: random mirroring.
        shard: (rank, processes); each process has its share of every batch.

    Iterating gives (images, targets): normalized (B, C, H, W) and (B,); the last batch may be smaller. `epoch` says which
    epoch the next iteration is.
    """

    def __init__(
        self,
        images,
        targets,
        preprocessing,
        batch_size,
        *,
        device='cpu',
        seed=0,
        shuffle=False,
        pad=0,
        flip=False,
        shard=(0, 1),
    ):
        super().__init__(len(images), batch_size, seed, shuffle, shard)
        if pad >= min(images.shape[1:3]):
            raise OptionError(
                f'--randomcrop_pad {pad}: reflection needs images of more than {pad} pixels, '
                f'and these have {min(images.shape[1:3])}; choose a smaller one'
            )
        self.images, self.targets = images.to(device), targets.to(device)
        if preprocessing.whitening:  # of the whole image, so before it is cropped
            self.images = whiten(self.images, preprocessing.whitening)
        self.preprocessing, self.pad, self.flip, self.scratch = preprocessing, pad, flip, None

    def __iter__(self):
        windows = self._windows() if self.pad or self.flip else None
        for indices in self.order():
            indices = torch.from_numpy(indices).to(self.images.device)
            images = self.images[indices] if windows is None else self._cut(indices, *windows)
            yield normalize(images, self.preprocessing), self.targets[indices]

    def _windows(self):
        """For every sample of this epoch, by its index: offsets of the crop in (0 .. 2 pad) and whether it is mirrored."""
        random = np.random.default_rng((self.seed, self.epoch, 1))
        offsets = random.integers(0, 2 * self.pad + 1, (self.n, 2))
        flips = random.integers(0, 2, self.n) if self.flip else np.zeros(self.n, np.int64)
        return torch.from_numpy(offsets).to(self.images.device), torch.from_numpy(flips).to(
            self.images.device
        )

    def _cut(self, indices, offsets, flips):
        """Crop, reflect and mirror in one gather: every pixel of the result is looked up in the flat list of all pixels."""
        n, height, width, channels = self.images.shape
        rows = (
            torch.arange(height, device=indices.device) + offsets[indices, :1] - self.pad
        )  # (B, H)
        columns = (
            torch.arange(width, device=indices.device) + offsets[indices, 1:] - self.pad
        )  # (B, W)
        columns = torch.where(flips[indices, None] > 0, columns.flip(1), columns)
        rows = (indices[:, None] * height + _reflect(rows, height)) * width
        columns = _reflect(columns, width)
        # The two large intermediates keep their memory from batch to batch: fresh memory costs more than the gather.
        if self.scratch is None or len(self.scratch[0]) < len(indices):
            small = torch.int32 if n * height * width < 2**31 else torch.int64
            self.scratch = (
                torch.empty(len(indices), height, width, dtype=small, device=indices.device),
                self.images.new_empty(len(indices), height, width, channels),
            )
        pixels, cut = (buffer[: len(indices)] for buffer in self.scratch)
        torch.add(
            rows.to(pixels.dtype)[:, :, None], columns.to(pixels.dtype)[:, None, :], out=pixels
        )
        torch.index_select(
            self.images.view(-1, channels), 0, pixels.view(-1), out=cut.view(-1, channels)
        )
        return (
            cut if not cut.is_floating_point() else cut.clone()
        )  # floats are handed on as they are


def _reflect(positions, size):
    """Positions outside 0 .. size - 1 mirrored at the border pixels, which are not repeated."""
    positions = positions.abs()
    return torch.where(positions < size, positions, 2 * (size - 1) - positions)


class ImageFolder(torch.utils.data.Dataset):
    """The image files of root/part. Items are asked for as (seed, epoch, index) and are (image, target, problems): uint8
    (size, size, 3), and (path, message) of each broken file that came up.

    In training another sample, the next that is whole, takes the place of a broken one. In testing it is left out: image is None.
    """

    TRIES = 20  # broken files in a row, or in one batch; after so many it's not the files

    def __init__(self, root, part, classes, preprocessing):
        self.root, self.train = Path(root) / part, part == 'train'
        # Arrays, not lists: worker processes share their memory for good, as no reference counts are written into it.
        self.names, self.targets = list_files(Path(root), part, classes)
        self.preprocessing = preprocessing

    def __len__(self):
        return len(self.names)

    def __getitem__(self, where):
        seed, epoch, index = where
        problems = []
        for attempt in range(self.TRIES if self.train else 1):
            sample = (index + attempt) % len(self)
            path = self.root / os.fsdecode(self.names[sample])
            try:
                if self.train:
                    image = training_crop(
                        path,
                        self.preprocessing.image_size,
                        np.random.default_rng((seed, epoch, 1, sample)),
                    )
                else:
                    image = prepare(read_image(path), self.preprocessing)
                return (
                    torch.from_numpy(np.ascontiguousarray(image)),
                    int(self.targets[sample]),
                    problems,
                )
            except UserError as error:  # as a value: exceptions come out of worker processes with a traceback for a message
                problems.append((str(path), str(error)))
        return None, int(self.targets[index]), problems


class _Slots(torch.utils.data.Dataset):
    """An ImageFolder in whole batches, written into memory that the processes share and use again: fresh shared memory for each
    batch, which DataLoader makes of tensors, costs a fifth of the time. A batch is asked for as (slot, [(seed, epoch, index)])."""

    def __init__(self, folder, slots, batch_size):
        size = folder.preprocessing.image_size
        self.folder, self.slots = (
            folder,
            torch.empty(slots, batch_size, size, size, 3, dtype=torch.uint8).share_memory_(),
        )

    def __getitem__(self, batch):
        """(slot, targets of the images now in it, problems)"""
        slot, places = batch
        targets, problems = [], []
        for place in places:
            image, target, found = self.folder[place]
            problems.extend(found)
            if image is not None:
                self.slots[slot, len(targets)] = image
                targets.append(target)
        return slot, targets, problems


def _single_opencv_thread(*_):
    """The workers are the parallelism. Called before they are forked, too: a child that inherits OpenCV's pool of threads,
    without the threads, would wait for them for ever."""
    import cv2

    if cv2.getNumThreads() != 1:
        cv2.setNumThreads(1)


class _Order(torch.utils.data.Sampler):
    """The slot of each batch and where its samples are, for the epoch that `batches` is at."""

    def __init__(self, batches):
        # No cycle of references: with the batches go the loader and its worker processes, at once.
        self.batches = weakref.proxy(batches)

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        batches = self.batches
        for number, indices in enumerate(batches.order()):
            yield (
                number % batches.slots,
                [(batches.seed, batches.epoch, index) for index in indices.tolist()],
            )


class FolderBatches(Ordered):
    """Batches of an ImageFolder, decoded in `workers` processes, normalized on the device; shuffled if it is a training one.

    Iterating gives (images, targets): normalized (B, C, H, W) floats in channels_last, and int64 (B,). `epoch` says which epoch the
    next iteration is; `broken` has the files that could not be used in it, path to message.

    Raises:
        UserError: many broken files in one batch.
    """

    PREFETCH = 2

    def __init__(self, folder, batch_size, *, device='cpu', seed=0, workers=0, shard=(0, 1)):
        super().__init__(len(folder), batch_size, seed, folder.train, shard)
        self.folder, self.device = folder, torch.device(device)
        _single_opencv_thread()
        # DataLoader keeps PREFETCH batches per worker under way; one more is being read from here.
        self.slots = self.PREFETCH * workers + 1
        self.source = _Slots(folder, self.slots, -(-min(batch_size, self.n) // self.world))
        self.loader = torch.utils.data.DataLoader(
            self.source,
            batch_size=None,
            sampler=_Order(self),
            num_workers=workers,
            persistent_workers=workers > 0,
            prefetch_factor=self.PREFETCH if workers else None,
            worker_init_fn=_single_opencv_thread,
        )

    def __iter__(self):
        self.broken = dict(self.broken_before)
        for slot, targets, problems in self.loader:
            self.broken.update(problems)
            if len(problems) >= ImageFolder.TRIES and self.folder.train:
                raise UserError(
                    f'{len(problems)} files of {self.folder.root} in one batch are broken, as {problems[0][1]}'
                )
            if targets or self.world > 1:  # processes go on in step
                images, targets = (
                    self.source.slots[slot, : len(targets)],
                    torch.tensor(targets, dtype=torch.int64),
                )
                if (
                    self.device.type == 'cuda'
                ):  # the slot is written again while the copy is still under way
                    images, targets = images.pin_memory(), targets.pin_memory()
                images = images.to(self.device, non_blocking=True)
                yield (
                    normalize(images, self.folder.preprocessing),
                    targets.to(self.device, non_blocking=True),
                )

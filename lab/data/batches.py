"""Batches of a data set: their order, augmentation in memory, and decoding in worker processes.

No random state is stored. The order of an epoch follows from (seed, epoch), and the augmentation of
a sample from (seed, epoch, index), so a run can resume at any batch with the same pixels.
"""

import contextlib
import os
import signal
import threading
import warnings
import weakref

import numpy as np
import torch

from lab import cuda
from lab.data.image_files import prepare, read_image, training_crop
from lab.data.preprocessing import normalize, whiten
from lab.errors import OptionError, UserError

PREFETCH = 2  # batches that DataLoader prepares per worker
TRIES = 20  # this many broken files in a row, or in a batch: something else must be wrong
CAN_WAIT_FOR_SIGNALS = hasattr(signal, 'sigwaitinfo')  # not on macOS and Windows


class Batches:
    """What all batches share: sizes, and the order of the samples.

    Before iterating, set `epoch`, and set `start` to the number of the first batch. Iterating
    yields (images, targets): normalized floats (B, C, H, W) in channels_last, and int64 (B,), on
    `device`. The last batch may be smaller.

    Args:
        images: in memory, a tensor, uint8 (N, H, W, C); or an array of paths, bytes (N,).
        targets: int64 (N,).
        train: whether to shuffle and augment; the images of a test set stay as they are.
        mirrored: whether half of the training images are mirrored, at random.
        shard: (rank, number of processes); each process gets its share of every batch.

    Attributes:
        n, batch_size: samples in an epoch and in a batch, of all processes together.
        n_files: n, and the files that were left out when the images were read into memory.
        broken: {path: message} of the files of this epoch that could not be used.
        broken_before: the same for the batches before `start`; set it when resuming.
    """

    def __init__(
        self, images, targets, preprocessing, batch_size, *, train, mirrored, device, seed, shard
    ):
        self.images, self.targets, self.preprocessing = images, targets, preprocessing
        self.n, self.batch_size, self.seed, self.train = len(images), batch_size, seed, train
        self.mirrored, self.device = train and mirrored, torch.device(device)
        self.rank, self.world = shard
        self.epoch, self.start = 0, 0
        self.n_files, self.broken, self.broken_before = self.n, {}, {}

    def __len__(self):
        return -(-self.n // self.batch_size)

    def size(self, number):
        """Samples in a batch, of all processes together."""
        return min(self.batch_size, self.n - number * self.batch_size)

    def order(self):
        """For each batch from `start`, the indices of this process's share, an integer array."""
        if self.train:
            order = np.random.default_rng((self.seed, self.epoch, 0)).permutation(self.n)
        else:
            order = np.arange(self.n)
        for start in range(self.start * self.batch_size, self.n, self.batch_size):
            yield order[start : start + self.batch_size][self.rank :: self.world]

    def _send(self, tensor):
        """A tensor of the CPU on `device`, without waiting for a GPU."""
        is_cuda = self.device.type == 'cuda'
        return cuda.send(tensor, self.device) if is_cuda else tensor.to(self.device)


class MemoryBatches(Batches):
    """Batches of images that are all in the device's memory.

    Args (for Batches, and):
        pad: pad training images by this many reflected pixels, then crop them at random.
        cutout: side of the square around a random pixel that is set to 0, the mean.
        broken: {path: message} of the image files that are not among the images.

    Raises:
        OptionError: pad is not smaller than the images.
    """

    def __init__(self, *args, pad=0, cutout=0, broken=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.pad, self.cutout = (pad, cutout) if self.train else (0, 0)
        if self.pad >= min(self.images.shape[1:3]):
            raise OptionError(
                f'--randomcrop_pad {pad} is too large: it must be less than the size of the '
                f'images, {min(self.images.shape[1:3])} pixels'
            )
        self.broken = broken or {}
        self.n_files += len(self.broken)
        self.images, self.targets = self.images.to(self.device), self.targets.to(self.device)
        whitening = self.preprocessing.whitening
        if whitening:  # it takes whole images, so it comes before the crop
            self.images = whiten(self.images, whitening)

    def __iter__(self):
        # All that is small is made for the whole epoch, so that a batch costs a GPU four kernels,
        # and Python no copy that waits for the GPU.
        shares = [torch.from_numpy(share) for share in self.order()]
        order = self._send(torch.cat([torch.empty(0, dtype=torch.int64), *shares]))
        targets, is_augmented = self.targets[order], self.pad or self.mirrored
        rows, columns = self._pixels(order) if is_augmented else (None, None)
        in_rows, in_columns = self._squares(order) if self.cutout else (None, None)
        start = 0
        for share in shares:
            batch = slice(start, start + len(share))
            start += len(share)
            if is_augmented:
                images = self._gather(rows[batch], columns[batch])
            else:
                images = self.images[order[batch]]
            inputs = normalize(images, self.preprocessing)
            if self.cutout:
                mask = in_rows[batch, :, None] & in_columns[batch, None, :]  # (B, H, W)
                inputs.masked_fill_(mask[:, None], 0)
            yield inputs, targets[batch]

    def _pixels(self, order):
        """Where the cropped and mirrored images of the samples in `order` come from, in the list of
        all pixels: where the row of each pixel begins (M, H), and its place in that row (M, W)."""
        random = np.random.default_rng((self.seed, self.epoch, 1))
        offsets = self._send(torch.from_numpy(random.integers(0, 2 * self.pad + 1, (self.n, 2))))
        height, width = self.images.shape[1:3]
        rows, columns = (
            _reflect(torch.arange(size, device=self.device) + first[order, None] - self.pad, size)
            for size, first in zip((height, width), offsets.T)
        )
        if self.mirrored:
            flips = self._send(torch.from_numpy(random.integers(0, 2, self.n)))
            columns = torch.where(flips[order, None] > 0, columns.flip(1), columns)
        return (order[:, None] * height + rows) * width, columns

    def _gather(self, rows, columns):
        """The pixels at these places: (B, H, W, C)."""
        pixels = rows[:, :, None] + columns[:, None, :]  # (B, H, W)
        images = self.images.view(-1, self.images.shape[3]).index_select(0, pixels.view(-1))
        return images.view(*pixels.shape, -1)

    def _squares(self, order):
        """Which rows (M, H) and columns (M, W) of the samples in `order` are in the square of
        --cutout in this epoch. Its center is in the image, but a part of it may be outside."""
        random = np.random.default_rng((self.seed, self.epoch, 2))
        sizes = self.images.shape[1:3]
        centers = random.integers(0, sizes, (self.n, 2))
        squares = self._send(torch.from_numpy(centers - self.cutout // 2))
        places = (
            torch.arange(size, device=self.device) - first[order, None]
            for size, first in zip(sizes, squares.T)
        )
        return ((place >= 0) & (place < self.cutout) for place in places)


def _reflect(positions, size):
    """Positions outside 0 .. size - 1, reflected at the border pixels without repeating them."""
    positions = positions.abs()
    return torch.where(positions < size, positions, 2 * (size - 1) - positions)


class FolderBatches(Batches):
    """Batches of image files, decoded in `workers` processes and normalized on the device.

    In training, images are cropped at random, and the next intact image replaces a broken one.
    Test batches leave out broken files. Iterating raises UserError if TRIES files of a training
    batch are broken, or all.
    """

    def __init__(self, *args, workers=0, **kwargs):
        super().__init__(*args, **kwargs)
        _use_one_opencv_thread()
        # One slot for each prefetched batch, and one for the batch that is being read.
        size, self.n_slots = self.preprocessing.image_size, PREFETCH * workers + 1
        share = -(-min(self.batch_size, self.n) // self.world)
        self.slots = torch.empty(self.n_slots, share, size, size, 3, dtype=torch.uint8)
        # More workers than cores are the user's choice (--nthread).
        warnings.filterwarnings('ignore', 'This DataLoader will create')
        self.loader = torch.utils.data.DataLoader(
            _Reader(self),
            batch_size=None,
            sampler=_SlotOrder(self),
            num_workers=workers,
            persistent_workers=workers > 0,
            prefetch_factor=PREFETCH if workers else None,
            worker_init_fn=_set_up_worker,
        )

    def __iter__(self):
        self.broken = dict(self.broken_before)
        with _blocked_signals():  # workers may start here
            batches = iter(self.loader)
        for slot, targets, problems in batches:
            self.broken.update(problems)
            if self.train and problems and (len(problems) >= TRIES or not targets):
                raise UserError(
                    f'{len(problems)} image files are broken in one training batch; the first: '
                    f'{next(iter(problems.values()))}'
                )
            if targets or self.world > 1:  # all processes need the same number of batches
                images = self._send(self.slots[slot, : len(targets)])
                targets = self._send(torch.tensor(targets, dtype=torch.int64))
                yield normalize(images, self.preprocessing), targets


class _Reader(torch.utils.data.Dataset):
    """Reads batches of image files into `slots`, reused memory that all processes share.

    DataLoader alone would allocate shared memory for each batch, which takes a fifth of the time.
    The index of an item is (slot, seed, epoch, indices). The item is (slot, targets of the images
    that are now in it, {path: message} of the broken files).
    """

    def __init__(self, batches):
        self.paths, self.targets = batches.images, batches.targets
        self.preprocessing, self.slots = batches.preprocessing, batches.slots.share_memory_()
        self.train, self.mirrored = batches.train, batches.mirrored

    def __getitem__(self, batch):
        slot, seed, epoch, indices = batch
        targets, problems = [], {}
        for index in indices:
            for sample in range(index, index + TRIES) if self.train else [index]:
                sample %= len(self.paths)
                path = os.fsdecode(self.paths[sample])
                try:
                    image = self._read(path, (seed, epoch, 1, sample))
                except UserError as error:
                    # Returned, not raised: DataLoader would put a traceback into the message.
                    problems[path] = str(error)
                    continue
                self.slots[slot, len(targets)] = torch.from_numpy(np.ascontiguousarray(image))
                targets.append(int(self.targets[sample]))
                break
        return slot, targets, problems

    def _read(self, path, seed):
        if self.train:
            size = self.preprocessing.image_size
            return training_crop(path, size, np.random.default_rng(seed), self.mirrored)
        return prepare(read_image(path), self.preprocessing)


class _SlotOrder(torch.utils.data.Sampler):
    """For each batch of the epoch, what `_Reader` needs."""

    def __init__(self, batches):
        # No reference cycle: deleting the batches ends the loader's worker processes at once.
        self.batches = weakref.proxy(batches)

    def __iter__(self):
        batches = self.batches
        for number, indices in enumerate(batches.order()):
            yield number % batches.n_slots, batches.seed, batches.epoch, indices.tolist()


@contextlib.contextmanager
def _blocked_signals():
    """A context in which signals that stop a run wait until its end. A process that is started in
    it goes on blocking them."""
    if not CAN_WAIT_FOR_SIGNALS:
        yield
        return
    stopping = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stopping)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _set_up_worker(_):
    """Set up a worker process. It leaves signals, which are blocked, to the main process, which may
    have to save first: schedulers and terminals send them to all processes."""
    _use_one_opencv_thread()
    if CAN_WAIT_FOR_SIGNALS:
        threading.Thread(target=_end_at_the_signal_of_the_parent, daemon=True).start()


def _end_at_the_signal_of_the_parent():
    """At its exit, the main process sends SIGTERM to the workers, and waits for them to end."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _use_one_opencv_thread():
    """Keep OpenCV to one thread, because the workers already run in parallel.

    This is also called before workers are forked: otherwise a child would inherit OpenCV's thread
    pool without its threads, and wait for them forever.
    """
    import cv2

    if cv2.getNumThreads() != 1:
        cv2.setNumThreads(1)

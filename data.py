"""Data sets as batches: read, ordered, augmented and normalized, the same pixels every time.

`load(name, root)` gives a `Data`; its `batches(...)` are iterables of (images, targets), images (N, C, H, W) floats in
channels_last on the device that trains. Randomness is a function of where one is: the order of an epoch follows from
(seed, epoch), the augmentation of a sample from (seed, epoch, its index), so nothing has to be saved to go on exactly.

Small images stay in memory as one uint8 tensor and are augmented a batch at a time; image files are in images.py.
Libraries that not every data set needs are imported where they are used.
"""
import gzip
import os
import sys
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch

from diracnet import DATASETS
from errors import OptionError, UserError
from images import (FolderBatches, ImageFolder, Ordered, Preprocessing, cache_file, contrast_normalized, list_classes, normalize,
                    whiten)

DIGITS = tuple('0123456789')
FASHION = ('T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag', 'Ankle boot')
NO_DOWNLOAD_HINT = '(--dataset digits needs no download)'


# Means and standard deviations over the training sets, every pixel. CIFAR's and ImageNet's are the paper's.
PREPROCESSING = {
    'digits': Preprocessing(1, 8, 8, (77.9,), (95.7,)),
    'FashionMNIST': Preprocessing(1, 28, 28, (72.9,), (90.0,)),
    'CIFAR10': Preprocessing(3, 32, 32, (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),
    'CIFAR100': Preprocessing(3, 32, 32, (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),
    'SVHN': Preprocessing(3, 32, 32, (111.6, 113.2, 120.6), (50.5, 51.3, 50.2)),
    'ImageNet': Preprocessing(3, 224, 256, (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
}
PREPROCESSING['folder'] = PREPROCESSING['ImageNet']
FLIPPED = {'FashionMNIST', 'CIFAR10', 'CIFAR100'}  # a mirrored digit is another sign


@dataclass(frozen=True)
class Data:
    """A data set: `train` and `test` are (images, targets) in memory, or an `ImageFolder` each."""
    name: str
    train: object
    test: object
    classes: tuple
    preprocessing: Preprocessing

    def batches(self, train, *, batch_size, device='cpu', seed=0, pad=0, workers=0, shard=(0, 1)):
        """Batches of the training set, shuffled and augmented (`pad`: pixels of reflection around a random crop), or of
        the test set, neither. `shard` is (rank, processes). See MemoryBatches and FolderBatches."""
        source = self.train if train else self.test
        if isinstance(source, ImageFolder):
            return FolderBatches(source, batch_size, device=device, seed=seed, workers=workers, shard=shard)
        return MemoryBatches(*source, self.preprocessing, batch_size, device=device, seed=seed, shuffle=train,
                             pad=pad if train else 0, flip=train and self.name in FLIPPED, shard=shard)

    def holdout(self, n):
        """This data set with the last n training samples (in order) for a test set, for whoever needs to select."""
        if isinstance(self.train, ImageFolder):
            raise OptionError(f'--holdout is for small images, and {self.name} is a folder of files')
        images, targets = self.train
        if not 0 < n < len(images):
            raise OptionError(f'--holdout {n}: {self.name} has {len(images)} training samples; hold out fewer, and at least 1')
        return replace(self, train=(images[:-n], targets[:-n]), test=(images[-n:], targets[-n:]))

    def whitened(self, root):
        """This data set with ZCA whitening for its preprocessing, fitted to its training images (or read from the cache)."""
        if isinstance(self.train, ImageFolder):
            raise OptionError(f'--preprocess zca is for small images, and {self.name} is a folder of files')
        return replace(self, preprocessing=replace(self.preprocessing, whitening=_cached_whitening(
            self.train[0], Path(root).expanduser(), self.name)))


def load(name, root, *, download=True, image_size=224):
    """Read a data set. `root` is where its files are, or are downloaded to where torchvision knows how; `image_size` is for
    folders of image files.

    Raises:
        UserError: files that are missing or broken; the message says what to put where.
    """
    root = Path(root).expanduser()
    preprocessing = PREPROCESSING.get(name)
    if name == 'digits':
        parts, classes = _digits(), DIGITS
    elif name == 'FashionMNIST':
        parts, classes = _fashion_mnist(root, download), FASHION
    elif name in ('CIFAR10', 'CIFAR100', 'SVHN'):
        parts, classes = _torchvision(name, root, download)
    elif name in ('ImageNet', 'folder'):
        preprocessing = replace(preprocessing, image_size=image_size, resize=round(image_size * 256 / 224))
        classes = list_classes(root)
        parts = [ImageFolder(root, part, classes, preprocessing) for part in ('train', 'val')]
    else:
        raise OptionError(f'unknown data set {name}; there are {", ".join(DATASETS)}')
    return Data(name, *parts, tuple(classes), preprocessing)


# --- reading ---------------------------------------------------------------------------------------------------------


def _digits():
    """scikit-learn's 1,797 digits, 8 x 8: the first 1,437 to train, the last 360 (other writers) to test, no shuffle."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError('the data set digits comes with scikit-learn; pip install scikit-learn') from None
    digits = load_digits()
    images = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8))[..., None]  # 0..16 -> 0..255
    targets = torch.from_numpy(digits.target.astype(np.int64))
    return (images[:1437], targets[:1437]), (images[1437:], targets[1437:])


def _torchvision(name, root, download):
    """CIFAR10, CIFAR100 and SVHN as torchvision reads, checks (MD5) and downloads them: (images, targets) of both parts, classes.

    In a child process, whose memory goes when it has read: torchvision alone, and its copies of the images, take as much as the
    whole training.
    """
    import multiprocessing
    if 'fork' not in multiprocessing.get_all_start_methods():
        return _parts(_read_torchvision(name, root, download))
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context('fork').Process(target=_send, args=(sender, name, root, download), daemon=True)
    child.start()
    sender.close()
    try:
        error, shapes, targets, classes = receiver.recv()
        if error:
            raise UserError(error)
        arrays = [np.empty(shape, np.uint8) for shape in shapes]
        for array in arrays:
            for part in np.array_split(array, -(-array.nbytes // 2 ** 28)):  # a pipe's message has less than 2 GB
                receiver.recv_bytes_into(part.data.cast('B'))
    except EOFError:
        raise UserError(f'the process that reads {name} under {root} died (out of memory?)') from None
    child.join()
    return _parts((arrays, targets, classes))


def _parts(found):
    arrays, targets, classes = found
    return [(torch.from_numpy(array), torch.tensor(labels)) for array, labels in zip(arrays, targets)], classes


def _send(sender, name, root, download):
    try:
        arrays, targets, classes = _read_torchvision(name, root, download)
    except UserError as error:
        return sender.send((str(error), None, None, None))
    sender.send((None, [array.shape for array in arrays], targets, classes))
    for array in arrays:
        for part in np.array_split(array, -(-array.nbytes // 2 ** 28)):
            sender.send_bytes(part.data.cast('B'))


def _read_torchvision(name, root, download):
    """uint8 (N, H, W, C) and a list of labels for each part, and the classes."""
    from torchvision import datasets
    reader = getattr(datasets, name)
    splits = [{'split': 'train'}, {'split': 'test'}] if name == 'SVHN' else [{'train': True}, {'train': False}]
    try:
        try:
            sets = [reader(root, **split) for split in splits]
        except RuntimeError:  # not there, or not whole
            if not download:
                raise
            root.mkdir(parents=True, exist_ok=True)
            sets = [reader(root, download=True, **split) for split in splits]
    except (OSError, RuntimeError, EOFError) as error:
        files = (', '.join(row[1] for row in list(reader.split_list.values())[:2]) if name == 'SVHN'
                 else f'the folder {reader.base_folder} (of {reader.filename})')
        broken = _broken_file(reader, root)
        raise UserError(f'{f"{broken} is broken (its MD5 sum is wrong)" if broken else f"{name} is not whole under {root}"} and could not be '
                        f'downloaded ({_reason(error)}): put {files} there, or name its place with --dataroot {NO_DOWNLOAD_HINT}') from None
    if name == 'SVHN':  # comes as (N, C, H, W)
        return [np.ascontiguousarray(part.data.transpose(0, 2, 3, 1)) for part in sets], [part.labels.tolist() for part in sets], DIGITS
    return [np.ascontiguousarray(part.data) for part in sets], [list(part.targets) for part in sets], tuple(sets[0].classes)


def _broken_file(reader, root):
    """The first file of a data set of torchvision's that is there, but not as it should be."""
    from torchvision.datasets.utils import check_integrity
    if hasattr(reader, 'split_list'):
        files = [(root / file_name, md5) for _, file_name, md5 in reader.split_list.values()]
    else:
        files = [(root / reader.base_folder / file_name, md5) for file_name, md5 in
                 [*reader.train_list, *reader.test_list, (reader.meta['filename'], reader.meta['md5'])]]
    return next((path for path, md5 in files if path.exists() and not check_integrity(path, md5)), None)


IDX_FILES = ('train-images-idx3-ubyte', 'train-labels-idx1-ubyte', 't10k-images-idx3-ubyte', 't10k-labels-idx1-ubyte')
IDX_SUBFOLDERS = ('', 'FashionMNIST/raw', 'fashion-mnist', 'datasets/fashion-mnist')


def _fashion_mnist(root, download):
    """Fashion-MNIST's four IDX files, gzipped or not, at a few usual places under `root`; else downloaded."""
    found = _find_idx(root)
    if len(found) < 4 and download:
        from torchvision.datasets import FashionMNIST
        try:
            root.mkdir(parents=True, exist_ok=True)
            FashionMNIST(root, download=True)
        except (OSError, RuntimeError) as error:
            reason = f' and could not be downloaded ({_reason(error)})'
        else:
            reason = ''
        found = _find_idx(root)
    else:
        reason = ''
    if len(found) < 4:
        missing = [name for name in IDX_FILES if name not in found]
        raise UserError(f'FashionMNIST is not whole under {root}{reason}: put {", ".join(missing)} there, plain or with .gz, '
                        f'or name their place with --dataroot {NO_DOWNLOAD_HINT}')
    parts = []
    for images_file, targets_file in (IDX_FILES[:2], IDX_FILES[2:]):
        images, targets = _read_idx(found[images_file], 3), _read_idx(found[targets_file], 1)
        if len(images) != len(targets):
            raise UserError(f'{found[images_file]} holds {len(images)} images and {found[targets_file]} {len(targets)} labels; '
                            'they belong to different sets: fetch them again')
        if images.shape[1:] != (28, 28) or targets.max() > 9:
            raise UserError(f'{found[images_file]} and its labels are not Fashion-MNIST (28 x 28 pixels, labels 0 to 9): '
                            'fetch them again')
        parts.append((torch.from_numpy(images)[..., None], torch.from_numpy(targets.astype(np.int64))))
    return parts


def _find_idx(root):
    found = {}
    for folder in IDX_SUBFOLDERS:
        for name in IDX_FILES:
            for path in (root / folder / name, root / folder / (name + '.gz')):
                if name not in found and path.is_file():
                    found[name] = path
    return found


def _read_idx(path, ndim):
    """An IDX file of unsigned bytes: two zeros, 8, the number of dimensions, each as a big-endian int32, the bytes."""
    try:
        with (gzip.open if path.suffix == '.gz' else open)(path, 'rb') as file:
            content = file.read()
    except (OSError, EOFError) as error:
        raise UserError(f'{path} can not be read ({_reason(error)}): fetch it again') from None
    shape = tuple(np.frombuffer(content[4:4 + 4 * ndim], '>i4')) if content[:4] == bytes((0, 0, 8, ndim)) else None
    if shape is None or len(content) != 4 + 4 * ndim + int(np.prod(shape, dtype=np.int64)):
        raise UserError(f'{path} is not an IDX file of {ndim} dimensions and whole: fetch it again')
    return np.frombuffer(content, np.uint8, offset=4 + 4 * ndim).reshape(shape).copy()


def _reason(error):
    text = ' '.join(str(error).split())
    return text if len(text) < 160 else text[:160] + ' ...'


# --- small images ----------------------------------------------------------------------------------------------------


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

    def __init__(self, images, targets, preprocessing, batch_size, *, device='cpu', seed=0, shuffle=False, pad=0, flip=False,
                 shard=(0, 1)):
        super().__init__(len(images), batch_size, seed, shuffle, shard)
        if pad >= min(images.shape[1:3]):
            raise OptionError(f'--randomcrop_pad {pad}: reflection needs images of more than {pad} pixels, '
                              f'and these have {min(images.shape[1:3])}; choose a smaller one')
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
        return torch.from_numpy(offsets).to(self.images.device), torch.from_numpy(flips).to(self.images.device)

    def _cut(self, indices, offsets, flips):
        """Crop, reflect and mirror in one gather: every pixel of the result is looked up in the flat list of all pixels."""
        n, height, width, channels = self.images.shape
        rows = torch.arange(height, device=indices.device) + offsets[indices, :1] - self.pad  # (B, H)
        columns = torch.arange(width, device=indices.device) + offsets[indices, 1:] - self.pad  # (B, W)
        columns = torch.where(flips[indices, None] > 0, columns.flip(1), columns)
        rows = (indices[:, None] * height + _reflect(rows, height)) * width
        columns = _reflect(columns, width)
        # The two large intermediates keep their memory from batch to batch: fresh memory costs more than the gather.
        if self.scratch is None or len(self.scratch[0]) < len(indices):
            small = torch.int32 if n * height * width < 2 ** 31 else torch.int64
            self.scratch = (torch.empty(len(indices), height, width, dtype=small, device=indices.device),
                            self.images.new_empty(len(indices), height, width, channels))
        pixels, cut = (buffer[:len(indices)] for buffer in self.scratch)
        torch.add(rows.to(pixels.dtype)[:, :, None], columns.to(pixels.dtype)[:, None, :], out=pixels)
        torch.index_select(self.images.view(-1, channels), 0, pixels.view(-1), out=cut.view(-1, channels))
        return cut if not cut.is_floating_point() else cut.clone()  # floats are handed on as they are


def _reflect(positions, size):
    """Positions outside 0 .. size - 1 mirrored at the border pixels, which are not repeated."""
    positions = positions.abs()
    return torch.where(positions < size, positions, 2 * (size - 1) - positions)


# --- ZCA whitening ---------------------------------------------------------------------------------------------------

FILTER_BIAS = 0.1  # added to every eigenvalue, as in the whitened CIFAR that Wide ResNets were first trained on


def fit_whitening(images):
    """ZCA after global contrast normalization, fitted to uint8 images (N, H, W, C).

    Returns:
        {'mean': (D,), 'matrix': (D, D)} for `images.whiten`, D = H W C: U diag((eigenvalue + 0.1) ** -1/2) U^T of their covariance.
    """
    flat = contrast_normalized(images)
    mean = flat.mean(0)
    flat -= mean
    eigenvalues, vectors = torch.linalg.eigh((flat.T @ flat / len(flat)).double())
    matrix = vectors * (eigenvalues.clamp(min=0) + FILTER_BIAS).rsqrt() @ vectors.T
    return {'mean': mean, 'matrix': matrix.float()}


def _cached_whitening(images, root, name):
    """fit_whitening, kept beside the data under the SHA-256 of the images it was fitted to, with its own."""
    path = cache_file(root, f'zca-{name}-{sha256(images.numpy().tobytes()).hexdigest()[:16]}.pt')
    try:
        cached = torch.load(path, weights_only=True)
        if cached['sha256'] == _digest(cached):
            return {key: cached[key] for key in ('mean', 'matrix')}
    except FileNotFoundError:
        pass
    except Exception:  # noqa: BLE001  whatever torch finds wrong with a broken file
        cached = None
    if path.exists():
        print(f'{path} is broken; the whitening is computed again', file=sys.stderr)
    whitening = fit_whitening(images)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
        torch.save({**whitening, 'sha256': _digest(whitening)}, temporary)
        os.replace(temporary, path)
    except OSError as error:
        print(f'the whitening could not be kept in {path} ({error.strerror})', file=sys.stderr)
    return whitening


def _digest(whitening):
    return sha256(b''.join(whitening[key].numpy().tobytes() for key in ('mean', 'matrix'))).hexdigest()

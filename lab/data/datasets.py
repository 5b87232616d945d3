"""Data sets as batches: read, ordered, augmented and normalized, the same pixels every time.

`load(name, root)` gives a `Data`; its `batches(...)` are iterables of (images, targets), images (N, C, H, W) floats in
channels_last on the device that trains. Randomness is a function of where one is: the order of an epoch follows from
(seed, epoch), the augmentation of a sample from (seed, epoch, its index), so nothing has to be saved to go on exactly.

Small images stay in memory as one uint8 tensor and are augmented a batch at a time; image files are in images.py.
Libraries that not every data set needs are imported where they are used.
"""

import gzip
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from diracnet import DATASETS
from lab.errors import OptionError, UserError
from lab.data.batches import FolderBatches, ImageFolder, MemoryBatches
from lab.data.image_files import list_classes
from lab.data.preprocessing import Preprocessing, cached_whitening

DIGITS = tuple('0123456789')
FASHION = (
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
            flip=train and self.name in FLIPPED,
            shard=shard,
        )

    def holdout(self, n):
        """This data set with the last n training samples (in order) for a test set, for whoever needs to select."""
        if isinstance(self.train, ImageFolder):
            raise OptionError(
                f'--holdout is for small images, and {self.name} is a folder of files'
            )
        images, targets = self.train
        if not 0 < n < len(images):
            raise OptionError(
                f'--holdout {n}: {self.name} has {len(images)} training samples; hold out fewer, and at least 1'
            )
        return replace(self, train=(images[:-n], targets[:-n]), test=(images[-n:], targets[-n:]))

    def whitened(self, root):
        """This data set with ZCA whitening for its preprocessing, fitted to its training images (or read from the cache)."""
        if isinstance(self.train, ImageFolder):
            raise OptionError(
                f'--preprocess zca is for small images, and {self.name} is a folder of files'
            )
        return replace(
            self,
            preprocessing=replace(
                self.preprocessing,
                whitening=cached_whitening(self.train[0], Path(root).expanduser(), self.name),
            ),
        )


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
        preprocessing = replace(
            preprocessing, image_size=image_size, resize=round(image_size * 256 / 224)
        )
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
        raise UserError(
            'the data set digits comes with scikit-learn; pip install scikit-learn'
        ) from None
    digits = load_digits()
    images = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8))[
        ..., None
    ]  # 0..16 -> 0..255
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
    child = multiprocessing.get_context('fork').Process(
        target=_send, args=(sender, name, root, download), daemon=True
    )
    child.start()
    sender.close()
    try:
        error, shapes, targets, classes = receiver.recv()
        if error:
            raise UserError(error)
        arrays = [np.empty(shape, np.uint8) for shape in shapes]
        for array in arrays:
            for part in np.array_split(
                array, -(-array.nbytes // 2**28)
            ):  # a pipe's message has less than 2 GB
                receiver.recv_bytes_into(part.data.cast('B'))
    except EOFError:
        raise UserError(
            f'the process that reads {name} under {root} died (out of memory?)'
        ) from None
    child.join()
    return _parts((arrays, targets, classes))


def _parts(found):
    arrays, targets, classes = found
    return [
        (torch.from_numpy(array), torch.tensor(labels)) for array, labels in zip(arrays, targets)
    ], classes


def _send(sender, name, root, download):
    try:
        arrays, targets, classes = _read_torchvision(name, root, download)
    except UserError as error:
        return sender.send((str(error), None, None, None))
    sender.send((None, [array.shape for array in arrays], targets, classes))
    for array in arrays:
        for part in np.array_split(array, -(-array.nbytes // 2**28)):
            sender.send_bytes(part.data.cast('B'))


def _read_torchvision(name, root, download):
    """uint8 (N, H, W, C) and a list of labels for each part, and the classes."""
    from torchvision import datasets

    reader = getattr(datasets, name)
    splits = (
        [{'split': 'train'}, {'split': 'test'}]
        if name == 'SVHN'
        else [{'train': True}, {'train': False}]
    )
    try:
        try:
            sets = [reader(root, **split) for split in splits]
        except RuntimeError:  # not there, or not whole
            if not download:
                raise
            root.mkdir(parents=True, exist_ok=True)
            sets = [reader(root, download=True, **split) for split in splits]
    except (OSError, RuntimeError, EOFError) as error:
        files = (
            ', '.join(row[1] for row in list(reader.split_list.values())[:2])
            if name == 'SVHN'
            else f'the folder {reader.base_folder} (of {reader.filename})'
        )
        broken = _broken_file(reader, root)
        raise UserError(
            f'{f"{broken} is broken (its MD5 sum is wrong)" if broken else f"{name} is not whole under {root}"} and could not be '
            f'downloaded ({_reason(error)}): put {files} there, or name its place with --dataroot {NO_DOWNLOAD_HINT}'
        ) from None
    if name == 'SVHN':  # comes as (N, C, H, W)
        return (
            [np.ascontiguousarray(part.data.transpose(0, 2, 3, 1)) for part in sets],
            [part.labels.tolist() for part in sets],
            DIGITS,
        )
    return (
        [np.ascontiguousarray(part.data) for part in sets],
        [list(part.targets) for part in sets],
        tuple(sets[0].classes),
    )


def _broken_file(reader, root):
    """The first file of a data set of torchvision's that is there, but not as it should be."""
    from torchvision.datasets.utils import check_integrity

    if hasattr(reader, 'split_list'):
        files = [(root / file_name, md5) for _, file_name, md5 in reader.split_list.values()]
    else:
        files = [
            (root / reader.base_folder / file_name, md5)
            for file_name, md5 in [
                *reader.train_list,
                *reader.test_list,
                (reader.meta['filename'], reader.meta['md5']),
            ]
        ]
    return next(
        (path for path, md5 in files if path.exists() and not check_integrity(path, md5)), None
    )


IDX_FILES = (
    'train-images-idx3-ubyte',
    'train-labels-idx1-ubyte',
    't10k-images-idx3-ubyte',
    't10k-labels-idx1-ubyte',
)
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
        raise UserError(
            f'FashionMNIST is not whole under {root}{reason}: put {", ".join(missing)} there, plain or with .gz, '
            f'or name their place with --dataroot {NO_DOWNLOAD_HINT}'
        )
    parts = []
    for images_file, targets_file in (IDX_FILES[:2], IDX_FILES[2:]):
        images, targets = _read_idx(found[images_file], 3), _read_idx(found[targets_file], 1)
        if len(images) != len(targets):
            raise UserError(
                f'{found[images_file]} holds {len(images)} images and {found[targets_file]} {len(targets)} labels; '
                'they belong to different sets: fetch them again'
            )
        if images.shape[1:] != (28, 28) or targets.max() > 9:
            raise UserError(
                f'{found[images_file]} and its labels are not Fashion-MNIST (28 x 28 pixels, labels 0 to 9): '
                'fetch them again'
            )
        parts.append(
            (torch.from_numpy(images)[..., None], torch.from_numpy(targets.astype(np.int64)))
        )
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
    shape = (
        tuple(np.frombuffer(content[4 : 4 + 4 * ndim], '>i4'))
        if content[:4] == bytes((0, 0, 8, ndim))
        else None
    )
    if shape is None or len(content) != 4 + 4 * ndim + int(np.prod(shape, dtype=np.int64)):
        raise UserError(f'{path} is not an IDX file of {ndim} dimensions and whole: fetch it again')
    return np.frombuffer(content, np.uint8, offset=4 + 4 * ndim).reshape(shape).copy()


def _reason(error):
    text = ' '.join(str(error).split())
    return text if len(text) < 160 else text[:160] + ' ...'

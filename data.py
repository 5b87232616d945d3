"""Data sets as batches: read, ordered, augmented and normalized, the same pixels every time.

`load(name, root)` gives a `Data`; its `batches(...)` are iterables of (images, targets), images (N, C, H, W) floats in
channels_last on the device that trains. Randomness is a function of where one is: the order of an epoch follows from
(seed, epoch), the augmentation of a sample from (seed, epoch, its index), so nothing has to be saved to go on exactly.

Small images stay in memory as one uint8 tensor and are augmented a batch at a time; JPEG folders are decoded by OpenCV
in worker processes, which hand over uint8. Libraries that not every data set needs are imported where they are used.
"""
import gzip
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from diracnet import DATASETS
from errors import OptionError, UserError

DIGITS = tuple('0123456789')
FASHION = ('T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag', 'Ankle boot')
NO_DOWNLOAD_HINT = '(--dataset digits needs no download)'


@dataclass(frozen=True)
class Preprocessing:
    """What turns an image file into a network's input; travels in checkpoints. mean and std are on 0..255, RGB."""
    channels: int
    image_size: int  # pixels, height and width of the network's input
    resize: int  # shorter side before the center crop; for small images equal to image_size
    mean: tuple
    std: tuple

    def as_dict(self):
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, facts):
        return cls(**{**facts, 'mean': tuple(facts['mean']), 'std': tuple(facts['std'])})


# Means and standard deviations over the training sets, every pixel. CIFAR's and ImageNet's are the paper's.
PREPROCESSING = {
    'digits': Preprocessing(1, 8, 8, (77.9,), (95.7,)),
    'FashionMNIST': Preprocessing(1, 28, 28, (72.9,), (90.0,)),
    'CIFAR10': Preprocessing(3, 32, 32, (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),
    'CIFAR100': Preprocessing(3, 32, 32, (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),
    'SVHN': Preprocessing(3, 32, 32, (111.6, 113.2, 120.6), (50.5, 51.3, 50.2)),
    'ImageNet': Preprocessing(3, 224, 256, (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
}
FLIPPED = {'FashionMNIST', 'CIFAR10', 'CIFAR100', 'ImageNet'}  # a mirrored digit is another sign


@dataclass(frozen=True)
class Data:
    """A data set: `train` and `test` are (images, targets) in memory, or an `ImageFolder` each."""
    name: str
    train: object
    test: object
    classes: tuple
    preprocessing: Preprocessing

    def batches(self, train, *, batch_size, device='cpu', seed=0, pad=0, workers=0):
        """Batches of the training set, shuffled and augmented (`pad`: pixels of reflection around a random crop), or of
        the test set, neither. See MemoryBatches and FolderBatches."""
        source = self.train if train else self.test
        if isinstance(source, ImageFolder):
            return FolderBatches(source, self.preprocessing, batch_size, device=device, seed=seed, workers=workers)
        return MemoryBatches(*source, self.preprocessing, batch_size, device=device, seed=seed, shuffle=train,
                             pad=pad if train else 0, flip=train and self.name in FLIPPED)

    def holdout(self, n):
        """This data set with the last n training samples (in order) for a test set, for whoever needs to select."""
        if isinstance(self.train, ImageFolder):
            raise OptionError(f'--holdout is for small images; {self.name} is a folder of files')
        images, targets = self.train
        if not 0 < n < len(images):
            raise OptionError(f'--holdout {n}: {self.name} has {len(images)} training samples; hold out fewer, and at least 1')
        return replace(self, train=(images[:-n], targets[:-n]), test=(images[-n:], targets[-n:]))


def load(name, root, *, download=True):
    """Read a data set. `root` is where its files are, or are downloaded to where torchvision knows how.

    Raises:
        UserError: files that are missing or broken; the message says what to put where.
    """
    root = Path(root).expanduser()
    if name == 'digits':
        parts, classes = _digits(), DIGITS
    elif name == 'FashionMNIST':
        parts, classes = _fashion_mnist(root, download), FASHION
    elif name in ('CIFAR10', 'CIFAR100', 'SVHN'):
        parts, classes = _torchvision(name, root, download)
    elif name == 'ImageNet':
        parts, classes = _folders(root)
    else:
        raise UserError(f'unknown data set {name}; there are {", ".join(DATASETS)}')
    return Data(name, *parts, tuple(classes), PREPROCESSING[name])


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
    """CIFAR10, CIFAR100 and SVHN as torchvision reads, checks (MD5) and downloads them."""
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
        raise UserError(f'{name} is not whole under {root} and could not be downloaded ({_reason(error)}): '
                        f'put {files} there, or name its place with --dataroot {NO_DOWNLOAD_HINT}') from None
    parts = []
    for part in sets:
        images = part.data.transpose(0, 2, 3, 1) if name == 'SVHN' else part.data  # SVHN comes as (N, C, H, W)
        targets = part.labels if name == 'SVHN' else part.targets
        parts.append((torch.from_numpy(np.ascontiguousarray(images)), torch.as_tensor(targets, dtype=torch.int64)))
    return parts, DIGITS if name == 'SVHN' else sets[0].classes


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


def normalize(images, preprocessing, dtype=torch.float32):
    """uint8 (N, H, W, C) to normalized floats (N, C, H, W) in channels_last, on the same device."""
    n, height, width, channels = images.shape
    # One pass over rows of width * channels: a broadcast along the last dimension is several times as fast as over channels.
    std = torch.tensor(preprocessing.std, dtype=torch.float64)
    scale = (1 / std).repeat(width).to(images.device, dtype)
    shift = (-torch.tensor(preprocessing.mean, dtype=torch.float64) / std).repeat(width).to(images.device, dtype)
    rows = torch.addcmul(shift, images.reshape(n, height, width * channels).to(dtype), scale)
    return rows.view(n, height, width, channels).permute(0, 3, 1, 2)


class MemoryBatches:
    """Batches of images that live whole on the device.

    Args:
        images: uint8 (N, H, W, C); targets: int64 (N,). Both are moved to `device` once.
        shuffle: a new order every epoch, from (seed, epoch); else the order they have.
        pad: random crop of the original size out of the image padded so far by reflection; flip: random mirroring.

    Iterating gives (images, targets): normalized (B, C, H, W) and (B,); the last batch may be smaller. `epoch` says which
    epoch the next iteration is.
    """

    def __init__(self, images, targets, preprocessing, batch_size, *, device='cpu', seed=0, shuffle=False, pad=0, flip=False):
        if pad >= min(images.shape[1:3]):
            raise OptionError(f'--randomcrop_pad {pad}: reflection needs images of more than {pad} pixels, '
                            f'and these have {min(images.shape[1:3])}; choose a smaller one')
        self.images, self.targets = images.to(device), targets.to(device)
        self.preprocessing, self.batch_size = preprocessing, batch_size
        self.seed, self.shuffle, self.pad, self.flip = seed, shuffle, pad, flip
        self.epoch = 0
        self.n = len(images)

    def __len__(self):
        return -(-self.n // self.batch_size)

    def __iter__(self):
        order = np.random.default_rng((self.seed, self.epoch, 0)).permutation(self.n) if self.shuffle else np.arange(self.n)
        order = torch.from_numpy(order).to(self.images.device)
        windows = self._windows() if self.pad or self.flip else None
        for indices in order.split(self.batch_size):
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
        _, height, width, channels = self.images.shape
        rows = torch.arange(height, device=indices.device) + offsets[indices, :1] - self.pad  # (B, H)
        columns = torch.arange(width, device=indices.device) + offsets[indices, 1:] - self.pad  # (B, W)
        columns = torch.where(flips[indices, None] > 0, columns.flip(1), columns)
        rows, columns = _reflect(rows, height), _reflect(columns, width)
        pixels = (indices[:, None] * height + rows)[:, :, None] * width + columns[:, None, :]  # (B, H, W)
        return self.images.view(-1, channels).index_select(0, pixels.view(-1)).view(-1, height, width, channels)


def _reflect(positions, size):
    """Positions outside 0 .. size - 1 mirrored at the border pixels, which are not repeated."""
    positions = positions.abs()
    return torch.where(positions < size, positions, 2 * (size - 1) - positions)


# --- image files -----------------------------------------------------------------------------------------------------

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.ppm', '.webp', '.tif', '.tiff')


def read_image(path):
    """An image file as RGB uint8 (H, W, 3), by OpenCV. Raises UserError if it can't be read or is none."""
    import cv2
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # a broken file is told by the error below; OpenCV's own remarks would stand in its way
    try:
        content = np.fromfile(path, np.uint8)
    except OSError as error:
        raise UserError(f'{path} can not be read ({error.strerror})') from None
    image = cv2.imdecode(content, cv2.IMREAD_COLOR) if content.size else None
    if image is None:
        raise UserError(f'{path} is not an image that OpenCV can read')
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def prepare(image, preprocessing):
    """RGB uint8 (H, W, 3) to what the network is tested on: uint8 (image_size, image_size, channels).

    Shorter side to `resize`, bicubic (area where a small image shrinks, which bicubic would alias), the center cropped.
    """
    import cv2
    height, width = image.shape[:2]
    shorter, size = min(height, width), preprocessing.image_size
    target = (width * preprocessing.resize // shorter, height * preprocessing.resize // shorter)  # the longer truncated
    small = preprocessing.resize == size
    if target != (width, height):
        image = cv2.resize(image, target, interpolation=cv2.INTER_AREA if small and shorter > size else cv2.INTER_CUBIC)
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    image = image[top:top + size, left:left + size]
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None] if preprocessing.channels == 1 else image


def random_crop(image, size, random):
    """Inception's crop: 8 % to 100 % of the area, aspect 3/4 to 4/3 (log-uniform), resized bicubic to (size, size, 3); mirrored
    half of the time. Where ten tries don't fit, the center with the nearest aspect, as torchvision does."""
    import cv2
    height, width = image.shape[:2]
    for _ in range(10):
        area = height * width * random.uniform(0.08, 1)
        aspect = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = random.integers(0, height - h + 1), random.integers(0, width - w + 1)
            break
    else:
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        top, left = (height - h) // 2, (width - w) // 2
    image = cv2.resize(image[top:top + h, left:left + w], (size, size), interpolation=cv2.INTER_CUBIC)
    return image[:, ::-1] if random.integers(0, 2) else image


def _folders(root):
    """train/ and val/ with a folder of images for each class, as ImageNet is kept; classes are the folders of train/."""
    from torchvision.datasets.folder import find_classes, make_dataset
    sets = []
    for part in ('train', 'val'):
        try:
            if part == 'train':
                classes, to_index = find_classes(root / part)
            samples = make_dataset(str(root / part), to_index, extensions=IMAGE_SUFFIXES)
        except OSError as error:
            raise UserError(f'no images in folders under {root / part} ({_reason(error)}): put {part}/CLASS/*.jpg under {root}, or name '
                            f'another place with --dataroot {NO_DOWNLOAD_HINT}') from None
        sets.append(ImageFolder(samples, train=part == 'train'))
    return sets, classes


class ImageFolder(torch.utils.data.Dataset):
    """Image files, decoded and cut to uint8 (size, size, 3). Items are asked for as (seed, epoch, index)."""

    def __init__(self, samples, train):
        self.samples, self.train = samples, train  # samples: (path, class index)
        self.preprocessing = PREPROCESSING['ImageNet']

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, where):
        seed, epoch, index = where
        path, target = self.samples[index]
        try:
            image = read_image(path)
        except UserError as error:  # exceptions come out of worker processes with a traceback for a message
            return str(error), target
        if self.train:
            image = random_crop(image, self.preprocessing.image_size, np.random.default_rng((seed, epoch, 1, index)))
        else:
            image = prepare(image, self.preprocessing)
        return torch.from_numpy(np.ascontiguousarray(image)), target


def _collate(items):
    """(images, targets), or for a broken file its error message."""
    images, targets = zip(*items)
    for image in images:
        if isinstance(image, str):
            return image
    return torch.stack(images), torch.tensor(targets)


def _single_opencv_thread(*_):
    """The workers are the parallelism. Called before they are forked, too: a child that inherits OpenCV's pool of threads,
    without the threads, would wait for them for ever."""
    import cv2
    if cv2.getNumThreads() != 1:
        cv2.setNumThreads(1)


class FolderBatches:
    """Batches of an ImageFolder, decoded in `workers` processes, normalized on the device. Otherwise as MemoryBatches."""

    def __init__(self, folder, preprocessing, batch_size, *, device='cpu', seed=0, workers=0):
        self.folder, self.preprocessing, self.batch_size = folder, preprocessing, batch_size
        self.device, self.seed, self.workers = torch.device(device), seed, workers
        self.epoch = 0
        self.n = len(folder)

    def __len__(self):
        return -(-self.n // self.batch_size)

    def __iter__(self):
        order = range(self.n)
        if self.folder.train:
            order = np.random.default_rng((self.seed, self.epoch, 0)).permutation(self.n).tolist()
        _single_opencv_thread()
        loader = torch.utils.data.DataLoader(
            self.folder, batch_size=self.batch_size, sampler=[(self.seed, self.epoch, index) for index in order],
            collate_fn=_collate, num_workers=self.workers,
            worker_init_fn=_single_opencv_thread, pin_memory=self.device.type == 'cuda')
        for batch in loader:
            if isinstance(batch, str):
                raise UserError(batch)
            images, targets = batch
            images = images.to(self.device, non_blocking=True)
            yield normalize(images, self.preprocessing), targets.to(self.device, non_blocking=True)


def image_files(paths):
    """The files that paths name, folders standing for the images in them, sorted. Raises UserError where there are none."""
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(file for file in path.rglob('*') if file.suffix.lower() in IMAGE_SUFFIXES)
            if not inside:
                raise UserError(f'{path} is a folder without images ({", ".join(IMAGE_SUFFIXES)})')
            files.extend(inside)
        elif not os.access(path, os.R_OK):
            raise UserError(f'{path} is no file that can be read')
        else:
            files.append(path)
    return files

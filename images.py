"""Image files: decoded by OpenCV to the RGB that a person sees, cut, listed, and loaded in worker processes.

The preprocessing is the one that the published weights were trained with: bicubic; to test, the shorter side to 256 and the
center of 224; to train, a random crop of 8 % to 100 % of the area, resized to 224, mirrored half of the time.
"""
import os
import time
import weakref
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from errors import UserError

SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.ppm', '.webp', '.tif', '.tiff')


@dataclass(frozen=True)
class Preprocessing:
    """What turns an image into a network's input; travels in checkpoints. mean and std are on 0..255, RGB.

    `whitening` is None, or the dict of tensors that `data.fit_whitening` gives; then mean and std are not used.
    """
    channels: int
    image_size: int  # pixels, height and width of the network's input
    resize: int  # shorter side before the center crop; for small images equal to image_size
    mean: tuple
    std: tuple
    whitening: dict = field(default=None, compare=False)

    def as_dict(self):
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, facts):
        return cls(**{**facts, 'mean': tuple(facts['mean']), 'std': tuple(facts['std'])})


def normalize(images, preprocessing, dtype=torch.float32):
    """uint8 (N, H, W, C) to the network's input: floats (N, C, H, W) in channels_last, on the same device.

    Floats are taken to be whitened already, and change only their shape.
    """
    n, height, width, channels = images.shape
    if images.is_floating_point():
        return images.to(dtype).permute(0, 3, 1, 2)
    if preprocessing.whitening:
        return whiten(images, preprocessing.whitening).to(dtype).permute(0, 3, 1, 2)
    # One pass over rows of width * channels: a broadcast along the last dimension is several times as fast as over channels.
    std = torch.tensor(preprocessing.std, dtype=torch.float64)
    scale = (1 / std).repeat(width).to(images.device, dtype)
    shift = (-torch.tensor(preprocessing.mean, dtype=torch.float64) / std).repeat(width).to(images.device, dtype)
    rows = images.reshape(n, height, width * channels)
    normalized = torch.empty(rows.shape, device=images.device, dtype=dtype)
    # On a CPU in pieces that stay in its cache; on a GPU at once.
    piece = n if images.is_cuda else max(1, 2 ** 19 // (height * width * channels))
    for target, part in zip(normalized.split(piece), rows.split(piece)):
        torch.addcmul(shift, target.copy_(part), scale, out=target)
    return normalized.view(n, height, width, channels).permute(0, 3, 1, 2)


def contrast_normalized(images):
    """Global contrast normalization: uint8 (N, H, W, C) to floats (N, H W C), each image of mean 0 and variance 1."""
    flat = images.reshape(len(images), -1).float()
    flat = flat - flat.mean(1, keepdim=True)
    deviation = flat.square().mean(1, keepdim=True).sqrt()
    return flat / torch.where(deviation > 0, deviation, 1)  # an image of one color stays zero


def whiten(images, whitening):
    """Contrast normalization and ZCA: uint8 (N, H, W, C) to floats of the same shape."""
    mean, matrix = (whitening[name].to(images.device) for name in ('mean', 'matrix'))
    return torch.cat([(contrast_normalized(part) - mean) @ matrix for part in images.split(5000)]).view(images.shape)


# --- decoding and cutting --------------------------------------------------------------------------------------------


def read_image(path):
    """An image file as RGB uint8 (H, W, 3), upright, transparent parts over white. UserError if it is none, or not whole."""
    return decode(_read(path), path)


def _read(path):
    try:
        return np.fromfile(path, np.uint8)
    except OSError as error:
        raise UserError(f'{path} can not be read ({error.strerror}); restore it or remove it') from None


def decode(content, path, reduce=1):
    """The bytes of an image file to RGB, see read_image. `reduce` 2, 4 or 8 decodes a JPEG at that part of its size."""
    import cv2
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # the error below says it all
    jpeg, image = content[:2].tobytes() == b'\xff\xd8', None
    if content.size and _whole(content, jpeg):
        if jpeg:
            image = cv2.imdecode(content, getattr(cv2, f'IMREAD_REDUCED_COLOR_{reduce}') if reduce > 1 else cv2.IMREAD_COLOR)
        else:
            image = cv2.imdecode(content, cv2.IMREAD_UNCHANGED)
            if image is not None:
                image = _over_white(image) if image.ndim == 3 and image.shape[2] == 4 else cv2.imdecode(content, cv2.IMREAD_COLOR)
    if image is None:
        raise UserError(f'{path} is not an image that OpenCV can read, or not whole; replace it or remove it')
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)


def _whole(content, jpeg):
    """Whether JPEG and PNG files have their end: OpenCV gives cut ones a gray rest, without an error."""
    if jpeg:
        data = content.tobytes()
        # Inside a scan the end marker can't occur: the last one must come after the last start of a scan.
        return data.endswith(b'\xff\xd9') or data.rfind(b'\xff\xd9') > data.rfind(b'\xff\xda')
    return content[:4].tobytes() != b'\x89PNG' or content[-32:].tobytes().rfind(b'IEND') >= 0


def _over_white(image):
    """BGRA of 8 or 16 bits to BGR of 8 bits, as it looks on a white page."""
    scaled = image.astype(np.float32) / np.iinfo(image.dtype).max
    color, alpha = scaled[..., :3], scaled[..., 3:]
    return np.rint(255 * (color * alpha + 1 - alpha)).astype(np.uint8)


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


def crop_window(height, width, random):
    """Inception's crop, (top, left, height, width): 8 % to 100 % of the area, aspect 3/4 to 4/3, log-uniform. Where ten tries
    don't fit, the largest center of an aspect in that range; the same distribution as torchvision's RandomResizedCrop."""
    for _ in range(10):
        area = height * width * random.uniform(0.08, 1)
        aspect = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return random.integers(0, height - h + 1), random.integers(0, width - w + 1), h, w
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


LARGE_FILE = 150_000  # bytes; a smaller JPEG hardly has crops of twice the usual target


def training_crop(path, size, random):
    """A random crop of an image file, RGB uint8 (size, size, 3), mirrored half of the time.

    Where the crop of a JPEG is at least twice (four, eight times) the target, libjpeg decodes it at that part of its size.
    """
    import cv2
    content, reduce, window = _read(path), 1, None
    if content.size > LARGE_FILE and content[:2].tobytes() == b'\xff\xd8':
        shape = _jpeg_shape(content)
        if shape:
            window = crop_window(*shape, random)
            reduce = max(factor for factor in (1, 2, 4, 8) if factor == 1 or min(window[2:]) >= factor * size)
    image = decode(content, path, reduce)
    top, left, height, width = window or crop_window(*image.shape[:2], random)
    image = image[top // reduce:-(-(top + height) // reduce), left // reduce:-(-(left + width) // reduce)]
    image = cv2.resize(image, (size, size), interpolation=cv2.INTER_CUBIC)
    return cv2.flip(image, 1) if random.integers(0, 2) else image


def _jpeg_shape(content):
    """Height and width that a JPEG will decode to, from its header; None where Pillow can't tell."""
    from io import BytesIO

    from PIL import Image
    try:
        with Image.open(BytesIO(content)) as header:  # lazy: nothing is decoded
            width, height = header.size
            return (width, height) if header.getexif().get(0x0112, 1) in (5, 6, 7, 8) else (height, width)
    except (OSError, ValueError, SyntaxError):
        return None


# --- folders ---------------------------------------------------------------------------------------------------------


def image_files(paths):
    """The files that paths name, folders standing for the images in them, sorted. Raises UserError where there are none."""
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(file for file in path.rglob('*') if file.suffix.lower() in SUFFIXES)
            if not inside:
                raise UserError(f'{path} is a folder without images ({", ".join(SUFFIXES)})')
            files.extend(inside)
        elif not os.access(path, os.R_OK):
            raise UserError(f'{path} is no file that can be read')
        else:
            files.append(path)
    return files


def cache_file(root, name):
    """Where to keep what was computed from the data at root: beside the data, or in the user's cache if that is read-only."""
    if os.access(root, os.W_OK):
        return Path(root) / name
    from hashlib import sha256
    folder = Path(os.environ.get('XDG_CACHE_HOME', '~/.cache')).expanduser() / 'diracnets'
    return folder / f'{sha256(os.fsencode(Path(root).resolve())).hexdigest()[:16]}-{name}'


def list_classes(root):
    """Names of the classes: the folders of root/train, which root/val must have, too. Raises UserError."""
    found = {}
    for part in ('train', 'val'):
        try:
            found[part] = sorted(entry.name for entry in os.scandir(root / part) if entry.is_dir() and entry.name[0] != '.')
        except OSError as error:
            raise UserError(f'{root / part} can not be read ({error.strerror}): put {part}/CLASS/*.jpg under {root}, or name another '
                            'place with --dataroot (--dataset digits needs no download)') from None
        if not found[part]:
            raise UserError(f'{root / part} has no folders of classes: put {part}/CLASS/*.jpg under {root}, or name another place with '
                            '--dataroot (--dataset digits needs no download)')
    for part, other in (('train', 'val'), ('val', 'train')):
        missing = sorted(set(found[other]) - set(found[part]))
        if missing:
            raise UserError(f'{root / part} has no folder {missing[0]}, which {root / other} has'
                            + (f' (and {len(missing) - 1} more)' if missing[1:] else '') + ': train and val must have the same classes')
    return found['train']


def list_files(root, part, classes):
    """The image files of a part, as (names relative to root/part, bytes in one array; class indices). Raises UserError.

    The list is cached, since reading a million names takes minutes from a slow disk. A folder's modification time tells
    whether a file in it came or went.
    """
    path = cache_file(root, f'.diracnets-{part}.npz')
    try:
        with np.load(path, allow_pickle=False) as cached:
            folders, times, names, targets = (cached[key] for key in ('folders', 'times', 'names', 'targets'))
            if list(cached['classes']) == [os.fsencode(name) for name in classes] and all(
                    os.stat(root / part / os.fsdecode(folder)).st_mtime_ns == time for folder, time in zip(folders, times)):
                return names, targets
    except (OSError, ValueError, KeyError, EOFError):
        pass  # none yet, or a broken one: listed again
    except Exception as error:  # zipfile's own, which NumPy lets through
        if type(error).__name__ != 'BadZipFile':
            raise
    names, targets, folders = [], [], {}
    for index, label in enumerate(classes):
        before = len(names)
        for folder, _, files in os.walk(root / part / label, onerror=_raise, followlinks=True):
            relative = os.path.relpath(folder, root / part)
            folders[os.fsencode(relative)] = os.stat(folder).st_mtime_ns
            names.extend(os.fsencode(os.path.join(relative, file)) for file in sorted(files) if file.lower().endswith(SUFFIXES))
        if len(names) == before:
            raise UserError(f'{root / part / label} has no images ({", ".join(SUFFIXES)}): fill the class or remove its folders')
        targets.extend([index] * (len(names) - before))
    names, targets = np.array(names), np.array(targets, np.int64)
    # A folder that changes in the same tick of the file system's clock would not be noticed: the list of a fresh one isn't kept.
    if max(folders.values()) < time.time_ns() - 2_000_000_000:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
            with open(temporary, 'wb') as file:
                np.savez(file, folders=np.array(list(folders)), times=np.array(list(folders.values())), names=names, targets=targets,
                         classes=np.array([os.fsencode(name) for name in classes]))
            os.replace(temporary, path)
        except OSError:
            pass  # a full or read-only disk costs the time to list again, nothing else
    return names, targets


def _raise(error):
    raise UserError(f'{error.filename} can not be read ({error.strerror}): mend its permissions or remove it')


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
                    image = training_crop(path, self.preprocessing.image_size, np.random.default_rng((seed, epoch, 1, sample)))
                else:
                    image = prepare(read_image(path), self.preprocessing)
                return torch.from_numpy(np.ascontiguousarray(image)), int(self.targets[sample]), problems
            except UserError as error:  # as a value: exceptions come out of worker processes with a traceback for a message
                problems.append((str(path), str(error)))
        return None, int(self.targets[index]), problems


class _Slots(torch.utils.data.Dataset):
    """An ImageFolder in whole batches, written into memory that the processes share and use again: fresh shared memory for each
    batch, which DataLoader makes of tensors, costs a fifth of the time. A batch is asked for as (slot, [(seed, epoch, index)])."""

    def __init__(self, folder, slots, batch_size):
        size = folder.preprocessing.image_size
        self.folder, self.slots = folder, torch.empty(slots, batch_size, size, size, 3, dtype=torch.uint8).share_memory_()

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
            yield number % batches.slots, [(batches.seed, batches.epoch, index) for index in indices.tolist()]


class Ordered:
    """What batches of every kind have: a size, an epoch, and an order that follows from (seed, epoch)."""

    def __init__(self, n, batch_size, seed, shuffle, shard):
        self.n, self.batch_size, self.seed, self.shuffle = n, batch_size, seed, shuffle
        self.rank, self.world = shard
        self.epoch, self.start = 0, 0  # where the next iteration begins: epoch, and batch in it
        self.broken, self.broken_before = {}, {}  # broken files of this epoch, path to message; those before `start`

    def __len__(self):
        return -(-self.n // self.batch_size)

    def size(self, number):
        """Samples in a batch, of all processes together."""
        return min(self.batch_size, self.n - number * self.batch_size)

    def order(self):
        """Arrays of indices, one for each batch from `start` on; of several processes, each has its share of every batch."""
        order = np.random.default_rng((self.seed, self.epoch, 0)).permutation(self.n) if self.shuffle else np.arange(self.n)
        for start in range(self.start * self.batch_size, self.n, self.batch_size):
            yield order[start:start + self.batch_size][self.rank::self.world]


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
            self.source, batch_size=None, sampler=_Order(self), num_workers=workers, persistent_workers=workers > 0,
            prefetch_factor=self.PREFETCH if workers else None, worker_init_fn=_single_opencv_thread)

    def __iter__(self):
        self.broken = dict(self.broken_before)
        for slot, targets, problems in self.loader:
            self.broken.update(problems)
            if len(problems) >= ImageFolder.TRIES and self.folder.train:
                raise UserError(f'{len(problems)} files of {self.folder.root} in one batch are broken, as {problems[0][1]}')
            if targets or self.world > 1:  # processes go on in step
                images, targets = self.source.slots[slot, :len(targets)], torch.tensor(targets, dtype=torch.int64)
                if self.device.type == 'cuda':  # the slot is written again while the copy is still under way
                    images, targets = images.pin_memory(), targets.pin_memory()
                images = images.to(self.device, non_blocking=True)
                yield normalize(images, self.folder.preprocessing), targets.to(self.device, non_blocking=True)

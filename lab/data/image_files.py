"""Image files: decoded by OpenCV to the RGB that a person sees, cut, listed, and loaded in worker processes.

The preprocessing is the one that the published weights were trained with: bicubic; to test, the shorter side to 256 and the
center of 224; to train, a random crop of 8 % to 100 % of the area, resized to 224, mirrored half of the time.
"""

import os
import time
from pathlib import Path

import numpy as np

from lab.errors import UserError
from lab.files import cache_path

SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.ppm', '.webp', '.tif', '.tiff')


def read_image(path):
    """An image file as RGB uint8 (H, W, 3), upright, transparent parts over white. UserError if it is none, or not whole."""
    return decode(_read(path), path)


def _read(path):
    try:
        return np.fromfile(path, np.uint8)
    except OSError as error:
        raise UserError(
            f'{path} can not be read ({error.strerror}); restore it or remove it'
        ) from None


def decode(content, path, reduce=1):
    """The bytes of an image file to RGB, see read_image. `reduce` 2, 4 or 8 decodes a JPEG at that part of its size."""
    import cv2

    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # the error below says it all
    jpeg, image = content[:2].tobytes() == b'\xff\xd8', None
    if content.size and _whole(content, jpeg):
        if jpeg:
            image = cv2.imdecode(
                content,
                getattr(cv2, f'IMREAD_REDUCED_COLOR_{reduce}') if reduce > 1 else cv2.IMREAD_COLOR,
            )
        else:
            image = cv2.imdecode(content, cv2.IMREAD_UNCHANGED)
            if image is not None:
                image = (
                    _over_white(image)
                    if image.ndim == 3 and image.shape[2] == 4
                    else cv2.imdecode(content, cv2.IMREAD_COLOR)
                )
    if image is None:
        raise UserError(
            f'{path} is not an image that OpenCV can read, or not whole; replace it or remove it'
        )
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
    target = (
        width * preprocessing.resize // shorter,
        height * preprocessing.resize // shorter,
    )  # the longer truncated
    small = preprocessing.resize == size
    if target != (width, height):
        image = cv2.resize(
            image,
            target,
            interpolation=cv2.INTER_AREA if small and shorter > size else cv2.INTER_CUBIC,
        )
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    image = image[top : top + size, left : left + size]
    return (
        cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None] if preprocessing.channels == 1 else image
    )


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
            reduce = max(
                factor for factor in (1, 2, 4, 8) if factor == 1 or min(window[2:]) >= factor * size
            )
    image = decode(content, path, reduce)
    top, left, height, width = window or crop_window(*image.shape[:2], random)
    image = image[
        top // reduce : -(-(top + height) // reduce), left // reduce : -(-(left + width) // reduce)
    ]
    image = cv2.resize(image, (size, size), interpolation=cv2.INTER_CUBIC)
    return cv2.flip(image, 1) if random.integers(0, 2) else image


def _jpeg_shape(content):
    """Height and width that a JPEG will decode to, from its header; None where Pillow can't tell."""
    from io import BytesIO

    from PIL import Image

    try:
        with Image.open(BytesIO(content)) as header:  # lazy: nothing is decoded
            width, height = header.size
            return (
                (width, height)
                if header.getexif().get(0x0112, 1) in (5, 6, 7, 8)
                else (height, width)
            )
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


def list_classes(root):
    """Names of the classes: the folders of root/train, which root/val must have, too. Raises UserError."""
    found = {}
    for part in ('train', 'val'):
        try:
            found[part] = sorted(
                entry.name
                for entry in os.scandir(root / part)
                if entry.is_dir() and entry.name[0] != '.'
            )
        except OSError as error:
            raise UserError(
                f'{root / part} can not be read ({error.strerror}): put {part}/CLASS/*.jpg under {root}, or name another '
                'place with --dataroot (--dataset digits needs no download)'
            ) from None
        if not found[part]:
            raise UserError(
                f'{root / part} has no folders of classes: put {part}/CLASS/*.jpg under {root}, or name another place with '
                '--dataroot (--dataset digits needs no download)'
            )
    for part, other in (('train', 'val'), ('val', 'train')):
        missing = sorted(set(found[other]) - set(found[part]))
        if missing:
            raise UserError(
                f'{root / part} has no folder {missing[0]}, which {root / other} has'
                + (f' (and {len(missing) - 1} more)' if missing[1:] else '')
                + ': train and val must have the same classes'
            )
    return found['train']


def list_files(root, part, classes):
    """The image files of a part, as (names relative to root/part, bytes in one array; class indices). Raises UserError.

    The list is cached, since reading a million names takes minutes from a slow disk. A folder's modification time tells
    whether a file in it came or went.
    """
    path = cache_path(root, f'.diracnets-{part}.npz')
    try:
        with np.load(path, allow_pickle=False) as cached:
            folders, times, names, targets = (
                cached[key] for key in ('folders', 'times', 'names', 'targets')
            )
            if list(cached['classes']) == [os.fsencode(name) for name in classes] and all(
                os.stat(root / part / os.fsdecode(folder)).st_mtime_ns == time
                for folder, time in zip(folders, times)
            ):
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
            names.extend(
                os.fsencode(os.path.join(relative, file))
                for file in sorted(files)
                if file.lower().endswith(SUFFIXES)
            )
        if len(names) == before:
            raise UserError(
                f'{root / part / label} has no images ({", ".join(SUFFIXES)}): fill the class or remove its folders'
            )
        targets.extend([index] * (len(names) - before))
    names, targets = np.array(names), np.array(targets, np.int64)
    # A folder that changes in the same tick of the file system's clock would not be noticed: the list of a fresh one isn't kept.
    if max(folders.values()) < time.time_ns() - 2_000_000_000:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
            with open(temporary, 'wb') as file:
                np.savez(
                    file,
                    folders=np.array(list(folders)),
                    times=np.array(list(folders.values())),
                    names=names,
                    targets=targets,
                    classes=np.array([os.fsencode(name) for name in classes]),
                )
            os.replace(temporary, path)
        except OSError:
            pass  # a full or read-only disk costs the time to list again, nothing else
    return names, targets


def _raise(error):
    raise UserError(
        f'{error.filename} can not be read ({error.strerror}): mend its permissions or remove it'
    )

"""Image files: find them, decode them to RGB with OpenCV, and crop them to a network's input.

The preprocessing is the one that the published weights were trained with. Resizing is bicubic.
Testing: the shorter side is resized to 256, and the image cropped to its central 224 x 224.
Training: a random crop of 8 % to 100 % of the area is resized to 224 x 224, and mirrored half of
the time.
"""

import io
import os
from pathlib import Path

import numpy as np

from lab.errors import UserError

SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.ppm', '.webp', '.tif', '.tiff')
LARGE_FILE = 150_000  # bytes; smaller JPEGs rarely have crops of twice the usual 224 pixels
ORIENTATION = 0x0112  # a tag of EXIF
TURNED = (5, 6, 7, 8)  # its values for images that lie on their side


def find_images(paths):
    """The files that `paths` name, with each folder replaced by the images under it, sorted.

    Raises:
        UserError: a folder without images, or a file that cannot be read.
    """
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(file for file in path.rglob('*') if file.suffix.lower() in SUFFIXES)
            if not inside:
                raise UserError(f'{path} contains no images ({", ".join(SUFFIXES)})')
            files.extend(inside)
        elif os.access(path, os.R_OK):
            files.append(path)
        else:
            raise UserError(f'{path} does not exist or cannot be read')
    return files


# --- decoding ---------------------------------------------------------------------------------


def read_image(path):
    """An image file as RGB uint8 (H, W, 3), upright, with transparent parts white.

    Gray, palette, CMYK and 16-bit images are converted.

    Raises:
        UserError: the file cannot be read, is not an image, or is truncated.
    """
    return decode(_read(path), path)


def _read(path):
    """The bytes of a file, uint8 (N,)."""
    try:
        return np.fromfile(path, np.uint8)
    except OSError as error:
        raise UserError(
            f'{path} cannot be read ({error.strerror}): restore it or remove it'
        ) from None


def decode(content, path, reduce=1):
    """`read_image` for the bytes of a file, uint8 (N,). `path` is for the error message.

    `reduce` 2, 4 or 8 decodes a JPEG at a half, a quarter or an eighth of its size.
    """
    import cv2

    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # the error below is enough
    image = _decode_bgr(content, reduce) if _is_whole(content) else None
    if image is None:
        raise UserError(
            f'{path} is not an image that OpenCV can read, or is truncated: replace it or remove it'
        )
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)


def _decode_bgr(content, reduce):
    """BGR uint8 (H, W, 3), or None if OpenCV cannot decode the bytes."""
    import cv2

    if _is_jpeg(content):
        flag = cv2.IMREAD_COLOR
        if reduce > 1:
            flag = getattr(cv2, f'IMREAD_REDUCED_COLOR_{reduce}')
        return cv2.imdecode(content, flag)
    image = cv2.imdecode(content, cv2.IMREAD_UNCHANGED)
    if image is None:
        return None
    if image.ndim == 3 and image.shape[2] == 4:
        return _over_white(image)
    return cv2.imdecode(content, cv2.IMREAD_COLOR)


def _is_jpeg(content):
    return content[:2].tobytes() == b'\xff\xd8'


def _is_whole(content):
    """Whether a JPEG or PNG is complete. OpenCV silently completes a truncated one with gray."""
    if not content.size:
        return False
    if _is_jpeg(content):
        data = content.tobytes()
        # A scan cannot contain the end marker, so in a whole file the last end marker comes after
        # the last start of a scan. (A thumbnail in the header has an end marker, too.)
        return data.endswith(b'\xff\xd9') or data.rfind(b'\xff\xd9') > data.rfind(b'\xff\xda')
    is_png = content[:4].tobytes() == b'\x89PNG'
    return not is_png or b'IEND' in content[-32:].tobytes()


def _over_white(image):
    """BGRA of 8 or 16 bits over a white background: BGR of 8 bits."""
    scaled = image.astype(np.float32) / np.iinfo(image.dtype).max
    color, alpha = scaled[..., :3], scaled[..., 3:]
    return np.rint(255 * (color * alpha + 1 - alpha)).astype(np.uint8)


# --- cropping ---------------------------------------------------------------------------------


def prepare(image, preprocessing):
    """Prepare an image for testing: RGB uint8 (H, W, 3) to uint8 (size, size, channels).

    The shorter side is resized to `resize`, then the image is cropped to its central `image_size`.
    Resizing is bicubic, except that for networks of small images, larger images are averaged by
    area: bicubic would alias.
    """
    import cv2

    height, width = image.shape[:2]
    shorter, size = min(height, width), preprocessing.image_size
    # The length of the longer side is truncated to an integer, as in the original code.
    target = (width * preprocessing.resize // shorter, height * preprocessing.resize // shorter)
    if target != (width, height):
        shrinks = preprocessing.resize == size and shorter > size
        interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
        image = cv2.resize(image, target, interpolation=interpolation)
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    image = image[top : top + size, left : left + size]
    if preprocessing.channels == 1:
        return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None]
    return image


def crop_window(height, width, random):
    """A random window (top, left, height, width) with 8 % to 100 % of an image's area.

    This is Inception's crop, with the distribution of torchvision's RandomResizedCrop: the aspect
    ratio is log-uniform between 3/4 and 4/3. If ten tries do not fit into the image, it is the
    largest centered window with an aspect ratio in that range.
    """
    for _ in range(10):
        area = height * width * random.uniform(0.08, 1)
        aspect = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return random.integers(0, height - h + 1), random.integers(0, width - w + 1), h, w
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def training_crop(path, size, random):
    """A random crop of an image file, RGB uint8 (size, size, 3), mirrored half of the time.

    A JPEG whose crop is at least 2, 4 or 8 times the size is decoded at that fraction of its
    size, which is faster. Raises UserError as read_image does.
    """
    import cv2

    content, window, reduce = _read(path), None, 1
    shape = _jpeg_shape(content) if content.size > LARGE_FILE and _is_jpeg(content) else None
    if shape:
        window = crop_window(*shape, random)
        reduce = _reduction(min(window[2:]), size)
    image = decode(content, path, reduce)
    top, left, height, width = window or crop_window(*image.shape[:2], random)
    bottom, right = -(-(top + height) // reduce), -(-(left + width) // reduce)  # rounded up
    image = image[top // reduce : bottom, left // reduce : right]
    image = cv2.resize(image, (size, size), interpolation=cv2.INTER_CUBIC)
    return cv2.flip(image, 1) if random.integers(0, 2) else image


def _reduction(length, size):
    """The largest of JPEG's reductions after which `length` is still at least `size`."""
    for reduce in (8, 4, 2):
        if length >= reduce * size:
            return reduce
    return 1


def _jpeg_shape(content):
    """Height and width that a JPEG decodes to, from its header; None if Pillow cannot read it."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as header:  # this decodes no pixels
            width, height = header.size
            turned = header.getexif().get(ORIENTATION, 1) in TURNED
    except (OSError, ValueError, SyntaxError):
        return None
    return (width, height) if turned else (height, width)

"""Image files: decode them to RGB with OpenCV, and crop them to a network's input.

The preprocessing is the one that the published weights were trained with. Resizing is bicubic.
Testing: the shorter side is resized to 256, and the image cropped to its central 224 x 224.
Training: a random crop of 8 % to 100 % of the area is resized to 224 x 224, and mirrored half of
the time.
"""

import contextlib
import io
import os
import re
import warnings

import numpy as np

from lab.errors import UserError, printable
from lab.files import size_of

LARGE_FILE = 150_000  # bytes; smaller JPEGs rarely have crops of twice the usual 224 pixels
ORIENTATION = 0x0112  # a tag of EXIF
TURNED = (5, 6, 7, 8)  # its values for images that lie on their side
LONGEST = 64  # times the shorter side: how much of the longer side testing looks at

# OpenCV compares an image's header with these limits before it decodes any pixels. It reads the
# first when it is imported, and cannot hold more bytes than the second.
os.environ.setdefault('OPENCV_IO_MAX_IMAGE_PIXELS', str(2**28))
MAX_BYTES = 2**31 - 1


# --- decoding ---------------------------------------------------------------------------------


def read_image(path):
    """An image file as RGB uint8 (H, W, 3), upright, with transparent parts white.

    Gray, palette, CMYK and 16-bit images are converted. Of an animation, this is the first frame.
    Raises UserError if the file cannot be read, is not an image, is truncated, or is too large.
    """
    return decode(read_bytes(path), path)


def read_bytes(path):
    """The bytes of an image file, uint8 (N,). Raises UserError."""
    try:
        if size_of(path) <= MAX_BYTES:
            return np.fromfile(path, np.uint8)
    except OSError as error:
        raise _refusal(path, f'cannot be read ({error.strerror})') from None
    raise _refusal(path, 'has 2 GiB or more')


def _refusal(path, problem):
    return UserError(f'{printable(str(path))} {problem}: replace it or remove it')


def decode(content, path, reduce=1):
    """`read_image` for the bytes of a file, uint8 (N,). `path` is for the error message.

    `reduce` 2, 4 or 8 decodes a JPEG at a half, a quarter or an eighth of its size.
    """
    import cv2

    with _opencv_errors(path), _silent_stderr():
        image = _decode_bgr(content, path, reduce) if _is_whole(content) else None
    if image is None:
        raise _refusal(path, 'is not an image that OpenCV can read, or is truncated')
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)


@contextlib.contextmanager
def _opencv_errors(path):
    """Turn what OpenCV raises into a UserError about a file."""
    import cv2

    try:
        yield
    except cv2.error as error:
        problem, limit = error.err or error, re.search(r'CV_IO_MAX_IMAGE_\w+', error.err or '')
        if limit:
            problem = f'it is larger than the environment variable OPEN{limit[0]} allows'
        raise _refusal(path, f'cannot be decoded ({problem})') from None


@contextlib.contextmanager
def _silent_stderr():
    """Drop what OpenCV and its libraries print about broken images: it does not name the file."""
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)


def _decode_bgr(content, path, reduce):
    """BGR uint8 (H, W, 3), or None if OpenCV cannot decode the bytes.

    Raises UserError for pixels that are no bytes and no 16-bit integers: nothing says which of
    their values is white.
    """
    import cv2

    if _is_jpeg(content):
        scale = f'REDUCED_COLOR_{reduce}' if reduce > 1 else 'COLOR'
        return cv2.imdecode(content, getattr(cv2, f'IMREAD_{scale}'))
    image = cv2.imdecode(content, cv2.IMREAD_UNCHANGED)
    if image is None:
        return None
    if image.dtype not in (np.uint8, np.uint16):
        raise _refusal(path, f'has pixels of the type {image.dtype}, not of 8 or 16 bits')
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
    return not is_png or b'IEND\xaeB`\x82' in content.tobytes()  # with its checksum


def _over_white(image):
    """BGRA of 8 or 16 bits over a white background: BGR of 8 bits."""
    result = np.empty((*image.shape[:2], 3), np.uint8)
    for top in range(0, len(image), 256):  # in parts: floats take several times the memory
        scaled = image[top : top + 256].astype(np.float32) / np.iinfo(image.dtype).max
        color, alpha = scaled[..., :3], scaled[..., 3:]
        result[top : top + 256] = np.rint(255 * (color * alpha + 1 - alpha))
    return result


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
    # Only the center remains. Of a very long image, the rest would not fit into memory.
    height, width = min(height, LONGEST * shorter), min(width, LONGEST * shorter)
    image = _center(image, height, width)
    # The length of the longer side is truncated to an integer, as in the original code.
    target = (width * preprocessing.resize // shorter, height * preprocessing.resize // shorter)
    if target != (width, height):
        shrinks = preprocessing.resize == size and shorter > size
        interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
        image = cv2.resize(image, target, interpolation=interpolation)
    image = _center(image, size, size)
    if preprocessing.channels == 1:
        return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None]
    return image


def _center(image, height, width):
    """The central part of an image (H, W, C), as a view (height, width, C)."""
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]


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


def training_crop(path, size, random, mirrored=True):
    """A random crop of an image file, RGB uint8 (size, size, 3); if `mirrored`, half of the time a
    mirror image.

    A JPEG whose crop is at least 2, 4 or 8 times the size is decoded at that fraction of its
    size, which is faster. Raises UserError as read_image does.
    """
    import cv2

    content, window, reduce = read_bytes(path), None, 1
    shape = image_size(content) if content.size > LARGE_FILE and _is_jpeg(content) else None
    if shape:
        window = crop_window(*shape, random)
        # The largest of JPEG's reductions after which the crop has still at least this size.
        reduce = next((n for n in (8, 4, 2) if min(window[2:]) >= n * size), 1)
    image = decode(content, path, reduce)
    top, left, height, width = window or crop_window(*image.shape[:2], random)
    bottom, right = -(-(top + height) // reduce), -(-(left + width) // reduce)  # rounded up
    image = image[top // reduce : bottom, left // reduce : right]
    with _opencv_errors(path):  # the header may contradict the image
        image = cv2.resize(image, (size, size), interpolation=cv2.INTER_CUBIC)
    return cv2.flip(image, 1) if mirrored and random.integers(0, 2) else image


def image_size(content):
    """Height and width of the bytes of an image, uint8 (N,), when it is upright, from its header;
    None if Pillow cannot read it."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # about large images; the limit is OpenCV's
            with Image.open(io.BytesIO(content)) as header:  # this decodes no pixels
                width, height = header.size
                turned = header.getexif().get(ORIENTATION, 1) in TURNED
    except Exception:  # Pillow raises many types for broken headers
        return None
    return (width, height) if turned else (height, width)

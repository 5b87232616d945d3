"""Image files: every kind decodes to RGB, and is cut as published networks expect."""

import os

import cv2
import numpy as np
import pytest
from data_helpers import jpeg
from PIL import Image, ImageOps
from scipy.stats import chi2_contingency

from conftest import python
from lab.data import datasets, image_files
from lab.data.image_folders import find_images

# --- cutting ----------------------------------------------------------------------------------


def same_distribution(a, b):
    """A test of homogeneity over twelve quantiles of both samples."""
    edges = np.unique(np.quantile(np.concatenate([a, b]), np.linspace(0, 1, 13)[1:-1]))
    table = [np.bincount(np.digitize(x, edges), minlength=len(edges) + 1) for x in (a, b)]
    return chi2_contingency(np.array(table)[:, np.sum(table, 0) > 0]).pvalue > 1e-3


# windows of 800 x 150 often fall back to the center
@pytest.mark.parametrize('width, height', [(500, 375), (64, 64), (800, 150)])
def test_crop_geometry_is_torchvisions(width, height):
    import torch
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    random = np.random.default_rng(0)
    ours = [image_files.crop_window(height, width, random) for _ in range(5000)]
    blank = Image.new('RGB', (width, height))
    scale, ratio = (0.08, 1), (3 / 4, 4 / 3)
    theirs = [RandomResizedCrop.get_params(blank, scale, ratio) for _ in range(5000)]

    def quantities(windows):
        top, left, h, w = np.array(windows, float).T
        return h * w, w / h, top / (height - h + 1), left / (width - w + 1)

    for a, b in zip(quantities(ours), quantities(theirs)):
        assert same_distribution(a, b)


def test_training_crop_is_the_window_mirrored_half_of_the_time(photographs, tmp_path):
    path, mirrored = tmp_path / 'photo.bmp', 0
    cv2.imwrite(str(path), photographs[0][..., ::-1])
    for seed in range(60):
        crop = image_files.training_crop(path, 32, np.random.default_rng(seed))
        top, left, h, w = image_files.crop_window(427, 640, np.random.default_rng(seed))
        window = photographs[0][top : top + h, left : left + w]
        expected = cv2.resize(window, (32, 32), interpolation=cv2.INTER_CUBIC)
        assert np.array_equal(crop, expected) != np.array_equal(crop[:, ::-1], expected)
        mirrored += np.array_equal(crop[:, ::-1], expected)
        plain = image_files.training_crop(path, 32, np.random.default_rng(seed), mirrored=False)
        assert np.array_equal(plain, expected)
    assert 18 <= mirrored <= 42


def test_evaluation_is_the_originals(photographs, tmp_path):
    """Shorter side 256, the longer truncated, the center of 224; large files are not reduced."""
    path = tmp_path / 'photo.jpg'
    for image in (
        photographs[0],
        photographs[0].transpose(1, 0, 2),
        photographs[1][:200, :333],
        np.tile(photographs[1], (4, 4, 1)),
    ):
        cv2.imwrite(str(path), np.ascontiguousarray(image[..., ::-1]))
        rgb = cv2.imread(str(path))[..., ::-1]
        height, width = rgb.shape[:2]
        scale = 256 / min(height, width)
        size = int(width * scale + 1e-9), int(height * scale + 1e-9)
        resized = cv2.resize(np.ascontiguousarray(rgb), size, interpolation=cv2.INTER_CUBIC)
        top, left = (size[1] - 224) // 2, (size[0] - 224) // 2
        expected = resized[top : top + 224, left : left + 224]
        actual = image_files.prepare(
            image_files.read_image(path), datasets.PREPROCESSING['ImageNet']
        )
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize('shape', [(1, 20_000), (20_000, 1), (2, 3000)])
def test_long_images_need_little_memory(shape):
    resource = pytest.importorskip('resource')
    image = np.zeros((*shape, 3), np.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    prepared = image_files.prepare(image, datasets.PREPROCESSING['ImageNet'])
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # kB
    assert prepared.shape == (224, 224, 3) and growth < 100_000


def test_reduced_decoding_changes_little(photographs, tmp_path):
    image = cv2.resize(photographs[0], (2560, 1708), interpolation=cv2.INTER_CUBIC)
    paths = [tmp_path / 'large.jpg', tmp_path / 'large.bmp']  # only the JPEG is reduced
    for path in paths:
        cv2.imwrite(str(path), image[..., ::-1])
    assert paths[0].stat().st_size > image_files.LARGE_FILE
    differences = []
    for seed in range(10):
        crops = [image_files.training_crop(path, 96, np.random.default_rng(seed)) for path in paths]
        # blurred, since shrinking by another factor leaves other aliases in the details
        smooth = [cv2.blur(crop.astype(float), (5, 5)) for crop in crops]
        differences.append(np.abs(smooth[0] - smooth[1]).mean())
    assert 0 < np.median(differences) < 6 and max(differences) < 12, differences


# --- decoding ---------------------------------------------------------------------------------


def shown(path):
    """What a viewer shows, by Pillow: upright, on a white page."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode in ('RGBA', 'LA') or 'transparency' in image.info:
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image.convert('RGBA'))
    return np.asarray(image.convert('RGB')).astype(float)


def tolerance(path):
    """JPEG decoders round differently, and convert CMYK by other formulas."""
    if path.name == 'cmyk.jpg':
        return 6
    return 2 if path.suffix == '.jpg' else 1


def test_every_kind_of_image_becomes_rgb(photographs, tmp_path):
    photo = Image.fromarray(photographs[1]).resize((160, 106))
    rgba = photo.convert('RGBA')
    rgba.putalpha(Image.linear_gradient('L').resize(photo.size))
    others = [photo.rotate(90), photo.rotate(180)]
    animated = {'save_all': True, 'append_images': others}
    palette = photo.quantize(60)
    transparent = palette.copy()
    transparent.info['transparency'] = 3
    kinds = {
        **{f'rgb.{suffix}': photo for suffix in ('png', 'tif', 'bmp', 'ppm', 'webp')},
        **{f'gray.{suffix}': photo.convert('L') for suffix in ('png', 'tif', 'jpg')},
        'rgba.png': rgba,
        'rgba.webp': rgba,
        'rgba-tall.png': rgba.resize((40, 600)),
        'la.png': rgba.convert('LA'),
        'palette.png': palette,
        'palette.gif': palette,
        'palette-transparent.png': transparent,
        'bilevel.png': photo.convert('1'),
        'cmyk.jpg': photo.convert('CMYK'),
    }
    for name, image in kinds.items():
        image.save(tmp_path / name, **({'lossless': True} if name.endswith('webp') else {}))
    transparent.save(tmp_path / 'transparent.gif', transparency=3)
    palette.save(tmp_path / 'animated.gif', **animated)
    photo.save(tmp_path / 'animated.webp', lossless=True, **animated)
    photo.save(tmp_path / 'pages.tif', **animated)
    photo.save(tmp_path / 'progressive.jpg', progressive=True)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        (tmp_path / f'turned{orientation}.jpg').write_bytes(jpeg(photo, exif=exif))
    files = find_images(tmp_path)
    assert len(files) == len(kinds) + 13
    for path in files:
        image = image_files.read_image(path)
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
        expected = shown(path)
        assert image.shape == expected.shape, path
        difference = np.abs(image - expected).mean()
        assert difference < tolerance(path), (path, difference)


@pytest.mark.parametrize('suffix, channels', [('png', 1), ('png', 3), ('png', 4), ('tif', 3)])
def test_sixteen_bits(suffix, channels, photographs, tmp_path):
    opaque = np.full((*photographs[0].shape[:2], 1), 255, np.uint8)
    deep = np.dstack([photographs[0][..., ::-1], opaque]).astype(np.uint16) * 257
    cv2.imwrite(
        str(tmp_path / f'deep.{suffix}'), deep[..., 2] if channels == 1 else deep[..., :channels]
    )
    image = image_files.read_image(tmp_path / f'deep.{suffix}').astype(int)
    expected = photographs[0] if channels > 1 else photographs[0][..., :1].repeat(3, 2)
    np.testing.assert_allclose(image, expected, atol=1)


def test_limit_of_pixels(tmp_path):
    """OpenCV takes the limit from the environment, unless this package sets the default."""
    Image.new('L', (50, 40)).save(tmp_path / 'image.png')
    program = (
        'import sys; from lab.data import image_files; import os\n'
        'print(os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"])\n'
        'image_files.read_image(sys.argv[1])'
    )
    for limit, error in ((None, ''), ('2000', ''), ('1999', 'OPENCV_IO_MAX_IMAGE_PIXELS')):
        env = {**os.environ, **({'OPENCV_IO_MAX_IMAGE_PIXELS': limit} if limit else {})}
        result = python('-c', program, tmp_path / 'image.png', env=env)
        assert result.out.strip() == (limit or str(2**28))
        assert error in result.err and bool(result.err) == bool(error), result

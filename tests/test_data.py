"""Data: the same pixels every time, the distributions they are drawn from, every kind of file, and bad ones."""

import contextlib
import io
import os
import shutil
import time

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from scipy.stats import chi2_contingency, chisquare

from lab.data import datasets as data
from lab.data import image_files as images
import train
from lab.data.preprocessing import normalize
from conftest import DEVICES, python, read_log, write_idx


def small_set(n=300, size=32, channels=3, seed=0):
    random = np.random.default_rng(seed)
    pixels = torch.from_numpy(random.integers(0, 256, (n, size, size, channels)).astype(np.uint8))
    return pixels, torch.arange(n)


def cifar_like(n=300, **kwargs):
    source = data.Data(
        'CIFAR10', small_set(n), small_set(50), tuple('0123456789'), data.PREPROCESSING['CIFAR10']
    )
    return source.batches(True, **{'batch_size': 64, 'seed': 3, 'pad': 4, **kwargs})


def epoch_of(batches, epoch):
    """Pixels and targets of an epoch, by the sample."""
    batches.epoch = epoch
    inputs, targets = (torch.cat(parts) for parts in zip(*batches))
    return inputs.cpu(), targets.cpu()


def folder_batches(root, train=True, size=64, **kwargs):
    source = data.load('folder', root, image_size=size)
    return source.batches(train, **{'batch_size': 5, 'seed': 3, **kwargs})


@pytest.fixture
def many_files(tmp_path, photographs):
    """A folder of 150 training and 20 test images of two classes, small PNGs."""
    root = tmp_path / 'many'
    random = np.random.default_rng(1)
    for part, n in (('train', 75), ('val', 10)):
        for label in ('a', 'b'):
            (root / part / label).mkdir(parents=True)
            for i in range(n):
                top, left = random.integers(0, 380), random.integers(0, 590)
                cv2.imwrite(
                    str(root / part / label / f'{i:03}.png'),
                    photographs[label == 'b'][top : top + 40, left : left + 48, ::-1],
                )
    return root


# --- the same pixels -------------------------------------------------------------------------------------------------


def test_pixels_do_not_depend_on_workers_history_or_shards(image_folder):
    expected = {epoch: epoch_of(folder_batches(image_folder), epoch) for epoch in (1, 2)}
    for workers in (0, 1, 4):
        batches = folder_batches(image_folder, workers=workers)
        for epoch in (2, 1, 2):  # in any order, as after a resume
            for actual, wanted in zip(epoch_of(batches, epoch), expected[epoch]):
                assert torch.equal(actual, wanted)
    for world in (2, 3):
        shards = [folder_batches(image_folder, shard=(rank, world)) for rank in range(world)]
        for shard in shards:
            shard.epoch = 1
        position = 0
        for parts in zip(*shards):  # of every global batch, each process has its share
            inputs, targets = (
                expected[1][0][position : position + 5],
                expected[1][1][position : position + 5],
            )
            for rank, (x, y) in enumerate(parts):
                assert torch.equal(x, inputs[rank::world]) and torch.equal(y, targets[rank::world])
            position += 5
        assert position >= 8
    assert not torch.equal(expected[1][0], expected[2][0])
    other_seed = epoch_of(folder_batches(image_folder, seed=4), 1)
    assert not torch.equal(other_seed[0], expected[1][0])


@pytest.mark.parametrize('device', DEVICES)
def test_small_images_likewise(device):
    inputs, targets = epoch_of(cifar_like(device=device), 5)
    assert inputs.shape == (300, 3, 32, 32) and sorted(targets.tolist()) == list(range(300))
    again = cifar_like(device=device)
    epoch_of(again, 4)
    for actual, wanted in zip(epoch_of(again, 5), (inputs, targets)):
        assert torch.equal(actual, wanted)
    for world in (2, 3):
        shards = [
            epoch_of(cifar_like(device=device, shard=(rank, world)), 5) for rank in range(world)
        ]
        together = {int(y): x for part in shards for x, y in zip(*part)}
        assert len(together) == 300 and all(
            torch.equal(together[int(y)], x) for x, y in zip(inputs, targets)
        )
    by_index = {int(y): x for x, y in zip(inputs, targets)}
    # the augmentation is the sample's, whatever the batch size or the order
    for x, y in zip(*epoch_of(cifar_like(device=device, batch_size=7), 5)):
        assert torch.equal(by_index[int(y)], x)
    changed = [
        not torch.equal(by_index[int(y)], x)
        for x, y in zip(*epoch_of(cifar_like(device=device), 6))
    ]
    assert sum(changed) > 280
    batch, _ = next(iter(cifar_like(device=device)))
    assert batch.is_contiguous(memory_format=torch.channels_last) and batch.device.type == device


def denormalized(inputs):
    facts = data.PREPROCESSING['CIFAR10']
    return (
        (inputs.permute(0, 2, 3, 1) * torch.tensor(facts.std) + torch.tensor(facts.mean))
        .round()
        .to(torch.uint8)
        .numpy()
    )


def test_crop_is_out_of_the_reflected_image():
    """Every sample is one of the windows of NumPy's padded image, mirrored or not."""
    batches = cifar_like(40)
    inputs, targets = epoch_of(batches, 2)
    for image, index in zip(denormalized(inputs), targets.tolist()):
        padded = np.pad(batches.images[index].numpy(), ((4, 4), (4, 4), (0, 0)), mode='reflect')
        found = [
            (top, left, step)
            for step in (1, -1)
            for top in range(9)
            for left in range(9)
            if np.array_equal(padded[top : top + 32, left : left + 32][:, ::step], image)
        ]
        assert len(found) == 1


def windows_of(epoch, n=2000):
    """(top, left, mirrored) of every sample, read off images whose colors are coordinates."""
    batches = cifar_like(n)
    batches.images[..., 0], batches.images[..., 1] = torch.arange(32)[:, None], torch.arange(32)
    inputs, targets = epoch_of(batches, epoch)
    rows, columns = denormalized(inputs)[:, 12, :, :2].transpose(2, 0, 1).astype(int)
    mirrored = columns[:, 12] > columns[:, 13]
    windows = np.stack(
        [
            rows[:, 12] - 12 + 4,
            np.where(mirrored, columns[:, 19], columns[:, 12]) - 12 + 4,
            mirrored,
        ],
        1,
    )
    return windows[np.argsort(targets.numpy())]


def test_crops_and_mirroring_are_uniform_and_independent():
    drawn = [windows_of(epoch) for epoch in (1, 2, 3)]
    windows = np.concatenate(drawn)
    assert (
        chisquare(np.bincount(windows[:, 0] * 9 + windows[:, 1], minlength=81)).pvalue > 1e-3
    )  # each offset
    assert chisquare(np.bincount(windows[:, 2], minlength=2)).pvalue > 1e-3
    for a, b in ((0, 2), (1, 2)):
        assert (
            chi2_contingency(np.histogram2d(windows[:, a], windows[:, b], bins=(9, 2))[0]).pvalue
            > 1e-3
        )
    # epochs of the same sample are independent, and neighbouring samples of the same epoch
    for a, b in ((drawn[0], drawn[1]), (drawn[1], drawn[2]), (drawn[0][:-1], drawn[0][1:])):
        assert chi2_contingency(np.histogram2d(a[:, 0], b[:, 0], bins=(9, 9))[0]).pvalue > 1e-3


def test_digits_and_svhn_are_not_mirrored():
    for name in data.PREPROCESSING:
        if name in ('ImageNet', 'folder'):
            continue
        source = data.Data(name, small_set(), small_set(), (), data.PREPROCESSING['CIFAR10'])
        assert source.batches(True, batch_size=9).flip == (name not in ('digits', 'SVHN'))
        assert (
            not source.batches(False, batch_size=9, pad=4).flip
            and not source.batches(False, batch_size=9, pad=4).pad
        )


def test_order_is_a_uniform_permutation():
    batches = cifar_like(12, batch_size=12)
    first = []
    for epoch in range(1200):
        batches.epoch = epoch
        [order] = batches.order()
        assert sorted(order) == list(range(12))
        first.append(order[0])
    assert chisquare(np.bincount(first, minlength=12)).pvalue > 1e-3


def test_crop_geometry_is_torchvisions():
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    random = np.random.default_rng(0)
    for width, height in (
        (500, 375),
        (64, 64),
        (800, 150),
    ):  # the last often falls back to the center
        ours = np.array([images.crop_window(height, width, random) for _ in range(5000)], float)
        blank = Image.new('RGB', (width, height))
        theirs = np.array(
            [RandomResizedCrop.get_params(blank, (0.08, 1), (3 / 4, 4 / 3)) for _ in range(5000)],
            float,
        )
        for quantity in (
            lambda w: w[:, 2] * w[:, 3],
            lambda w: w[:, 3] / w[:, 2],
            lambda w: w[:, 0] / (height - w[:, 2] + 1),
            lambda w: w[:, 1] / (width - w[:, 3] + 1),
        ):
            a, b = quantity(ours), quantity(theirs)
            edges = np.unique(np.quantile(np.concatenate([a, b]), np.linspace(0, 1, 13)[1:-1]))
            table = [np.bincount(np.digitize(x, edges), minlength=len(edges) + 1) for x in (a, b)]
            table = np.array(table)[:, np.sum(table, 0) > 0]
            assert chi2_contingency(table).pvalue > 1e-3


def test_training_crop_draws_area_aspect_and_mirroring(tmp_path):
    """From the pixels themselves: an image whose colors are coordinates tells what was cut out of it."""
    height, width = 300, 400
    ramp = np.zeros((height, width, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = (
        np.linspace(0, 250, width)[None],
        np.linspace(0, 250, height)[:, None],
    )
    cv2.imwrite(str(tmp_path / 'ramp.png'), ramp[..., ::-1])
    areas, aspects, flips = [], [], []
    for index in range(1500):
        crop = images.training_crop(
            tmp_path / 'ramp.png', 32, np.random.default_rng((1, 1, 1, index))
        ).astype(float)
        w = (crop[16, -1, 0] - crop[16, 0, 0]) / 250 * width * 32 / 31
        h = (crop[-1, 16, 1] - crop[0, 16, 1]) / 250 * height * 32 / 31
        flips.append(w < 0)
        areas.append(abs(w) * h / (height * width))
        aspects.append(np.log(abs(w) / h))
    assert chisquare(np.bincount(flips, minlength=2)).pvalue > 1e-3
    assert 0.07 < min(areas) and max(areas) < 1.02
    # log-uniform aspects; areas are uniform up to where the image's own shape begins to refuse windows
    assert (
        chisquare(
            np.histogram(
                [a for a, s in zip(aspects, areas) if s < 0.5],
                bins=6,
                range=(np.log(3 / 4), np.log(4 / 3)),
            )[0]
        ).pvalue
        > 1e-3
    )
    assert chisquare(np.histogram(areas, bins=5, range=(0.1, 0.5))[0]).pvalue > 1e-3


# --- fidelity --------------------------------------------------------------------------------------------------------


def test_normalization():
    pixels, _ = small_set(5)
    for name in ('CIFAR10', 'ImageNet'):
        facts = data.PREPROCESSING[name]
        expected = (pixels.double() - torch.tensor(facts.mean)) / torch.tensor(facts.std)
        torch.testing.assert_close(
            normalize(pixels, facts), expected.permute(0, 3, 1, 2).float(), rtol=1e-5, atol=1e-6
        )


def test_constants_are_those_of_the_data():
    for name, root in (('digits', '.'), ('FashionMNIST', '/usr/share/datasets/fashion-mnist')):
        if name == 'FashionMNIST' and not os.path.isdir(root):
            continue
        pixels = data.load(name, root).train[0].double()
        facts = data.PREPROCESSING[name]
        assert abs(pixels.mean() - facts.mean[0]) < 0.06 and abs(pixels.std() - facts.std[0]) < 0.06


def test_evaluation_is_the_originals(photographs, tmp_path):
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
        size = (
            int(width * scale + 1e-9),
            int(height * scale + 1e-9),
        )  # shorter side 256, the longer truncated
        resized = cv2.resize(np.ascontiguousarray(rgb), size, interpolation=cv2.INTER_CUBIC)
        top, left = (size[1] - 224) // 2, (size[0] - 224) // 2
        expected = resized[top : top + 224, left : left + 224]
        # also of a large file: no scaled decoding here
        np.testing.assert_array_equal(
            images.prepare(images.read_image(path), data.PREPROCESSING['ImageNet']), expected
        )


def test_scaled_decoding_changes_little(photographs, tmp_path):
    image = cv2.resize(photographs[0], (2560, 1708), interpolation=cv2.INTER_CUBIC)
    for suffix in ('jpg', 'png'):  # only the JPEG is decoded smaller
        cv2.imwrite(str(tmp_path / f'large.{suffix}'), image[..., ::-1])
    assert (tmp_path / 'large.jpg').stat().st_size > images.LARGE_FILE
    differences = []
    for index in range(20):
        crops = [
            images.training_crop(
                tmp_path / f'large.{suffix}', 96, np.random.default_rng(index)
            ).astype(float)
            for suffix in ('jpg', 'png')
        ]
        smooth = [
            cv2.blur(crop, (5, 5)) for crop in crops
        ]  # shrinking by more leaves other aliases in the details
        differences.append(np.abs(smooth[0] - smooth[1]).mean())
    assert max(differences) < 12 and np.median(differences) < 6, differences


def jpeg(image, **kwargs):
    file = io.BytesIO()
    image.save(file, 'JPEG', quality=95, **kwargs)
    return file.getvalue()


def seen(path):
    """What a person sees, by Pillow: upright, on a white page."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode in ('RGBA', 'LA') or 'transparency' in image.info:
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image.convert('RGBA'))
    return np.asarray(image.convert('RGB')).astype(float)


def test_every_kind_of_image_arrives_as_rgb(photographs, tmp_path):
    photo = Image.fromarray(photographs[1]).resize((160, 106))
    rgba = photo.convert('RGBA')
    rgba.putalpha(Image.linear_gradient('L').resize(photo.size))
    palette = photo.quantize(60)
    transparent = palette.copy()
    transparent.info['transparency'] = 3
    kinds = {
        'rgb.png': photo,
        'gray.png': photo.convert('L'),
        'rgba.png': rgba,
        'la.png': rgba.convert('LA'),
        'palette.png': palette,
        'palette-transparent.png': transparent,
        'bilevel.png': photo.convert('1'),
        'rgb.webp': photo,
        'rgba.webp': rgba,
        'rgb.tif': photo,
        'gray.tif': photo.convert('L'),
        'rgb.bmp': photo,
        'rgb.ppm': photo,
    }
    for name, image in kinds.items():
        image.save(tmp_path / name, **({'lossless': True} if name.endswith('webp') else {}))
    (tmp_path / 'gray.jpg').write_bytes(jpeg(photo.convert('L')))
    (tmp_path / 'cmyk.jpg').write_bytes(jpeg(photo.convert('CMYK')))
    (tmp_path / 'progressive.jpg').write_bytes(jpeg(photo, progressive=True))
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        (tmp_path / f'turned{orientation}.jpg').write_bytes(jpeg(photo, exif=exif))
    files = images.image_files([tmp_path])
    assert len(files) == len(kinds) + 11
    for path in files:
        image = images.read_image(path)
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
        expected = seen(path)
        assert image.shape == expected.shape, path
        # decoders of JPEG round differently, and CMYK is converted by other formulas
        limit = 6 if path.name == 'cmyk.jpg' else 2 if path.suffix == '.jpg' else 1
        assert np.abs(image - expected).mean() < limit, (path, np.abs(image - expected).mean())


def test_sixteen_bits(photographs, tmp_path):
    deep = photographs[0].astype(np.uint16) * 257
    cv2.imwrite(str(tmp_path / 'rgb.png'), deep[..., ::-1])
    cv2.imwrite(str(tmp_path / 'gray.png'), deep[..., 0])
    cv2.imwrite(str(tmp_path / 'rgb.tif'), deep[..., ::-1])
    cv2.imwrite(
        str(tmp_path / 'rgba.png'),
        np.dstack([deep[..., ::-1], np.full(deep.shape[:2], 65535, np.uint16)]),
    )
    for name in ('rgb.png', 'rgb.tif', 'rgba.png'):
        np.testing.assert_allclose(
            images.read_image(tmp_path / name).astype(int), photographs[0], atol=1
        )
    np.testing.assert_allclose(
        images.read_image(tmp_path / 'gray.png').astype(int),
        photographs[0][..., :1].repeat(3, 2),
        atol=1,
    )


# --- whitening -------------------------------------------------------------------------------------------------------


def test_zca_whitens(tmp_path):
    source = data.load('digits', '.').whitened(tmp_path)
    x = next(iter(source.batches(True, batch_size=1437)))[0].permute(0, 2, 3, 1).flatten(1).double()
    normalized = source.train[0].flatten(1).double()
    normalized = (normalized - normalized.mean(1, keepdim=True)) / normalized.std(
        1, correction=0, keepdim=True
    )
    eigenvalues, vectors = torch.linalg.eigh(torch.cov(normalized.T, correction=0))
    # in the eigenvectors of the images the variances become eigenvalue / (eigenvalue + 0.1), uncorrelated
    covariance = vectors.T @ torch.cov(x.T, correction=0) @ vectors
    torch.testing.assert_close(
        covariance, torch.diag(eigenvalues / (eigenvalues + 0.1)), rtol=0, atol=1e-4
    )
    # in the pixels' own axes (ZCA, not PCA): the matrix is symmetric
    matrix = source.preprocessing.whitening['matrix']
    torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-4)


def test_zca_cache_is_checked(tmp_path, capsys):
    whitening = data.load('digits', '.').whitened(tmp_path).preprocessing.whitening
    [cache] = tmp_path.iterdir()
    stamp = cache.stat().st_mtime_ns
    assert torch.equal(
        data.load('digits', '.').whitened(tmp_path).preprocessing.whitening['matrix'],
        whitening['matrix'],
    )
    assert cache.stat().st_mtime_ns == stamp and capsys.readouterr().err == ''
    # other training images, other statistics: of the part that is not held out
    part = data.load('digits', '.').holdout(300).whitened(tmp_path).preprocessing.whitening
    assert len(list(tmp_path.iterdir())) == 2 and not torch.equal(
        part['matrix'], whitening['matrix']
    )
    content = torch.load(cache, weights_only=True)
    content['matrix'][3, 4] += 1e-3
    torch.save(content, cache)
    for broken in (cache.read_bytes(), b'nothing', cache.read_bytes()[:2000]):
        cache.write_bytes(broken)
        assert torch.equal(
            data.load('digits', '.').whitened(tmp_path).preprocessing.whitening['matrix'],
            whitening['matrix'],
        )
        assert 'is broken' in capsys.readouterr().err


def test_zca_trains_predicts_and_is_logged(tmp_path, call):
    from tools import predict

    root = tmp_path / 'data'
    root.mkdir()
    train.main(
        [
            '--dataset',
            'digits',
            '--preprocess',
            'zca',
            '--dataroot',
            str(root),
            '--epochs',
            '8',
            '--epoch_step',
            '[6]',
            '--save',
            str(tmp_path / 'run'),
        ]
    )
    assert {line['preprocess'] for line in read_log(tmp_path / 'run')} == {'zca'}
    assert read_log(tmp_path / 'run')[-1]['test_acc'] > 75
    pixels, targets = data.load('digits', '.').test
    for i in range(20):
        cv2.imwrite(str(tmp_path / f'{i}-{targets[i]}.png'), pixels[i].numpy())
    files = sorted(tmp_path.glob('*.png'))
    out = call(predict.main, tmp_path / 'run', *files, '--top', 1).out.splitlines()
    assert sum(line.split(': ')[0][-5] == line.split(': ')[1][0] for line in out) >= 14
    train.main(['--resume', str(tmp_path / 'run'), '--epochs', '9'])
    assert len(read_log(tmp_path / 'run')) == 9


# --- folders ---------------------------------------------------------------------------------------------------------


def test_folder_of_anybodys_images(many_files, tmp_path, call):
    from tools import predict

    train.main(
        [
            '--dataset',
            'folder',
            '--dataroot',
            str(many_files),
            '--image_size',
            '64',
            '--epochs',
            '3',
            '--epoch_step',
            '[3]',
            '--batch_size',
            '15',
            '--width',
            '0.25',
            '--nthread',
            '1',
            '--lr',
            '0.05',
            '--save',
            str(tmp_path / 'run'),
        ]
    )
    last = read_log(tmp_path / 'run')[-1]
    assert (last['num_classes'], last['image_size'], last['preprocess']) == (
        2,
        64,
        'meanstd',
    ) and 'train_broken' not in last
    out = call(predict.main, tmp_path / 'run', many_files / 'val').out.splitlines()
    assert len(out) == 20 and all(' a ' in line and ' b ' in line for line in out)
    result = call(train.main, '--evaluate', tmp_path / 'run', '--nthread', 0)
    assert result.status == 0 and f'"test_acc": {last["test_acc"]}' in result.out


def test_other_classes_are_noticed(many_files, tmp_path, refused):
    train.main([str(word) for word in run_folder(many_files, tmp_path / 'run', '--epochs', 1)])
    for part in ('train', 'val'):
        (many_files / part / 'b').rename(many_files / part / 'c')
    refused(1, ['other classes', 'a, b', 'a, c'], train.main, '--evaluate', tmp_path / 'run')
    refused(
        1,
        ['other classes', 'a, b', 'a, c'],
        train.main,
        '--resume',
        tmp_path / 'run',
        '--epochs',
        3,
    )


def age(root):
    """Let the folders' last change be an hour ago, as is usual."""
    for folder, _, _ in os.walk(root):
        os.utime(folder, (time.time() - 3600,) * 2)


def test_list_of_files_is_cached_and_notices_changes(many_files, monkeypatch):
    walks = []
    walk = os.walk
    monkeypatch.setattr(
        os, 'walk', lambda *args, **kwargs: walks.append(args) or walk(*args, **kwargs)
    )

    def listed():
        walks.clear()
        names, targets = images.list_files(many_files, 'train', ['a', 'b'])
        return [os.fsdecode(name) for name in names], targets.tolist(), bool(walks)

    fresh = listed()
    assert (
        fresh[2] and not (many_files / '.diracnets-train.npz').exists()
    )  # just made: a change might go unnoticed
    age(many_files / 'train')
    assert listed() == fresh and (many_files / '.diracnets-train.npz').exists()
    assert listed() == (*fresh[:2], False)
    assert len(fresh[0]) == 150 and fresh[0][0] == 'a/000.png' and fresh[1] == [0] * 75 + [1] * 75
    (many_files / 'train' / 'a' / '000.png').rename(many_files / 'train' / 'b' / 'new.PNG')
    names, targets, walked = listed()
    assert (
        walked
        and len(names) == 150
        and names[0] == 'a/001.png'
        and names[-1] == 'b/new.PNG'
        and sum(targets) == 76
    )
    age(many_files / 'train')
    listed()
    (many_files / 'train' / 'b' / 'deeper').mkdir()
    (many_files / 'train' / 'b' / '001.png').rename(
        many_files / 'train' / 'b' / 'deeper' / '001.png'
    )
    assert 'b/deeper/001.png' in listed()[0]
    age(many_files / 'train')
    assert listed()[2] and not listed()[2]
    for broken in (b'nothing', b'', (many_files / '.diracnets-train.npz').read_bytes()[:500]):
        (many_files / '.diracnets-train.npz').write_bytes(broken)
        assert listed()[2] and not listed()[2]
    # the same folders as other classes
    assert images.list_files(many_files, 'train', ['b'])[1].tolist() == [0] * 76


def test_read_only_folder_is_cached_elsewhere(many_files, tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.setattr(
        os, 'access', lambda path, mode: mode != os.W_OK
    )  # the tests may run as root, whom nothing stops
    age(many_files)
    images.list_files(many_files, 'val', ['a', 'b'])
    assert (
        not list(many_files.glob('.diracnets*'))
        and len(list((tmp_path / 'cache' / 'diracnets').iterdir())) == 1
    )


def rss(pid):
    with open(f'/proc/{pid}/smaps_rollup') as file:
        return (
            sum(int(line.split()[1]) for line in file if line.startswith('Pss:')) / 1024
        )  # MB, shared pages counted in parts


def test_memory_does_not_grow(many_files):
    batches = folder_batches(many_files, workers=2, batch_size=15)
    sizes = []
    for epoch in range(13):
        epoch_of(batches, epoch)
        workers = [worker.pid for worker in batches.loader._iterator._workers]
        sizes.append(sum(rss(pid) for pid in [os.getpid(), *workers]))
    assert sizes[12] - sizes[2] < 10, sizes  # ten epochs; one alone decodes a megabyte


# --- bad data --------------------------------------------------------------------------------------------------------


def run_folder(root, save, *options):
    return (
        '--dataset',
        'folder',
        '--dataroot',
        root,
        '--image_size',
        64,
        '--width',
        0.25,
        '--batch_size',
        15,
        '--epochs',
        2,
        '--nthread',
        1,
        '--save',
        save,
        *options,
    )


def whole_jpeg(size=(48, 40), thumbnail=False):
    image = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    )
    content = jpeg(image)
    if thumbnail:  # a whole JPEG inside the header
        inner = b'Exif\0\0' + jpeg(image.resize((16, 16)))
        content = (
            content[:2] + b'\xff\xe1' + (len(inner) + 2).to_bytes(2, 'big') + inner + content[2:]
        )
    return content


@pytest.mark.parametrize(
    'kind',
    ['truncated', 'truncated behind a thumbnail', 'text', 'empty', 'truncated png', 'deleted'],
)
def test_one_broken_image_is_named_once_counted_and_replaced(kind, many_files, tmp_path, call):
    bad = many_files / 'train' / 'b' / ('bad.png' if kind == 'truncated png' else 'bad.jpg')
    whole_png = (many_files / 'train' / 'b' / '000.png').read_bytes()
    assert images.decode(np.frombuffer(whole_jpeg(thumbnail=True), np.uint8), 'whole').shape == (
        40,
        48,
        3,
    )
    bad.write_bytes(
        {
            'truncated': whole_jpeg()[:-500],
            'truncated behind a thumbnail': whole_jpeg(thumbnail=True)[:-500],
            'text': b'hello',
            'empty': b'',
            'truncated png': whole_png[:-200],
            'deleted': whole_jpeg(),
        }[kind]
    )
    if kind == 'deleted':
        source = data.load('folder', many_files, image_size=32)
        bad.unlink()
        batches = source.batches(True, batch_size=15)
        inputs, _ = epoch_of(batches, 1)
        assert len(inputs) == 151 and list(batches.broken) == [str(bad)]
        return
    result = call(train.main, *run_folder(many_files, tmp_path / 'run'))
    assert result.status == 0 and result.err == ''
    assert result.out.count(f'broken image: {bad} ') == 1
    first, second = read_log(tmp_path / 'run')
    assert (first['train_broken'], first['test_broken'], first['broken_images']) == (
        1,
        0,
        [str(bad)],
    )
    assert (second['train_broken'], second['broken_images']) == (1, [])


def test_replacement_is_the_same_every_time(many_files):
    (many_files / 'train' / 'a' / '010.png').write_bytes(b'')
    expected = epoch_of(folder_batches(many_files, batch_size=15), 2)
    assert len(expected[0]) == 150
    for workers in (1, 3):
        for actual, wanted in zip(
            epoch_of(folder_batches(many_files, batch_size=15, workers=workers), 2), expected
        ):
            assert torch.equal(actual, wanted)


def test_many_broken_images_end_the_run_with_a_checkpoint(many_files, tmp_path, refused):
    for name in ('001', '002'):
        (many_files / 'train' / 'a' / f'{name}.png').write_text('no image')
    result = refused(
        1, ['2 of 150', '--resume'], train.main, *run_folder(many_files, tmp_path / 'run')
    )
    assert 'broken image' in result.out
    assert [line['train_broken'] for line in read_log(tmp_path / 'run')] == [2]
    for name in ('001', '002'):
        shutil.copy(
            many_files / 'train' / 'a' / '003.png', many_files / 'train' / 'a' / f'{name}.png'
        )
    train.main(['--resume', str(tmp_path / 'run')])
    assert len(read_log(tmp_path / 'run')) == 2


def test_broken_test_image_is_left_out_and_counted(many_files, tmp_path, refused):
    (many_files / 'val' / 'a' / '001.png').write_bytes(b'')
    refused(1, ['1 of 20', '001.png'], train.main, *run_folder(many_files, tmp_path / 'run'))
    assert read_log(tmp_path / 'run')[0]['test_broken'] == 1


def test_data_that_vanish(many_files, tmp_path, refused):
    """A disk that is gone ends the run at once, whatever stood on it."""
    source = data.load('folder', many_files, image_size=32)
    shutil.rmtree(many_files / 'train')
    from lab.errors import UserError

    with pytest.raises(UserError, match='are broken'):
        epoch_of(source.batches(True, batch_size=15), 1)


def test_structure_of_folders(many_files, tmp_path, refused):
    arguments = run_folder(many_files, tmp_path / 'run')
    (many_files / 'train' / 'c').mkdir()
    refused(1, [many_files / 'val', 'no folder c', 'same classes'], train.main, *arguments)
    (many_files / 'val' / 'c').mkdir()
    refused(1, [many_files / 'train' / 'c', 'no images'], train.main, *arguments)
    (many_files / 'val' / 'd').mkdir()
    shutil.rmtree(many_files / 'val' / 'c')
    shutil.rmtree(many_files / 'train' / 'c')
    refused(1, [many_files / 'train', 'no folder d'], train.main, *arguments)
    for part in ('train', 'val'):
        for folder in (many_files / part).iterdir():
            shutil.rmtree(folder)
    refused(1, [many_files / 'train', 'no folders of classes'], train.main, *arguments)
    shutil.rmtree(many_files)
    refused(1, [many_files / 'train', '--dataset digits'], train.main, *arguments)
    assert not (tmp_path / 'run').exists()


def test_options_that_folders_do_not_have(many_files, tmp_path, refused):
    for options in (('--holdout', 10), ('--preprocess', 'zca')):
        refused(2, options[0], train.main, *run_folder(many_files, tmp_path / 'run', *options))


@pytest.fixture
def nobody(tmp_path):
    """A context in which permissions count, also where the tests run as root."""
    if os.geteuid() != 0:
        return contextlib.nullcontext
    for folder in [tmp_path, *tmp_path.parents][:-1]:
        folder.chmod(folder.stat().st_mode | 0o755)

    @contextlib.contextmanager
    def nobody():
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)

    return nobody


def test_permissions(many_files, tmp_path, nobody, call, refused):
    from tools import predict

    out = tmp_path / 'out'
    out.mkdir()
    out.chmod(0o777)
    options = ('--epochs', 1, '--nthread', 0)
    assert (
        call(train.main, *run_folder(many_files, out / 'whole', *options)).status == 0
    )  # and everything is imported
    secret = many_files / 'train' / 'a' / '000.png'
    secret.chmod(0)
    with nobody():
        result = call(train.main, *run_folder(many_files, out / 'run', *options))
        assert (
            result.status == 0
            and f'broken image: {secret} can not be read (Permission denied)' in result.out
        ), result
        refused(1, [secret, 'Permission denied'], predict.main, out / 'run', secret)
    (many_files / 'train' / 'a').chmod(0)
    with nobody():
        refused(
            1,
            [many_files / 'train' / 'a', 'Permission denied'],
            train.main,
            *run_folder(many_files, out / 'other', *options),
        )
    (out / 'run' / 'model.pt7').chmod(0)
    with nobody():
        refused(1, [out / 'run', 'can not be read'], train.main, '--evaluate', out / 'run')
    for name in data.IDX_FILES:
        write_idx(out / name, np.zeros((4, 28, 28) if 'images' in name else 4))
    (out / data.IDX_FILES[2]).chmod(0)
    (many_files / 'train').chmod(0o555)
    with nobody():
        refused(
            1,
            data.IDX_FILES[2],
            train.main,
            '--dataset',
            'FashionMNIST',
            '--dataroot',
            out,
            '--save',
            out / 'fashion',
        )
        refused(
            1,
            ['--save', 'Permission denied'],
            train.main,
            '--dataset',
            'digits',
            '--save',
            many_files / 'train' / 'run',
        )


def test_swapped_idx_files(fashion_mnist, tmp_path, refused):
    def refuse(words):
        refused(
            1,
            words,
            train.main,
            '--dataset',
            'FashionMNIST',
            '--dataroot',
            fashion_mnist,
            '--save',
            tmp_path / 'run',
        )

    files = {name: next(fashion_mnist.glob(name + '*')) for name in data.IDX_FILES}
    a, b = files['train-images-idx3-ubyte'], files['train-labels-idx1-ubyte']
    swap = a.read_bytes(), b.read_bytes()
    a.write_bytes(swap[1])
    b.write_bytes(swap[0])
    refuse(a)
    a.write_bytes(swap[0])
    b.write_bytes(swap[1])
    c = files['t10k-images-idx3-ubyte']
    swap = a.read_bytes(), c.read_bytes()
    a.write_bytes(swap[1])
    c.write_bytes(swap[0])
    refuse([a, '20 images', '50 labels'])
    a.write_bytes(swap[0])
    write_idx(c, np.zeros((20, 27, 28)))
    refuse(c)


def test_nothing_of_a_worker_is_left_behind(many_files, tmp_path):
    """The program ends with its workers, and without a word on stderr."""
    result = python('train.py', *run_folder(many_files, tmp_path / 'run', '--nthread', 2))
    assert result.status == 0 and result.err == '', result.err

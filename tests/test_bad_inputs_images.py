"""Image files that cannot be used: each is named in one line, by predict and by a training."""

import json
import os
import stat
import struct
import subprocess
import sys
import zlib

import cv2
import numpy as np
import pytest
import torch
from data_helpers import jpeg, run_folder
from PIL import Image

import train
from conftest import ROOT, read_log
from diracnet import DiracNet
from lab.data.image_folders import ImageFolder
from lab.training.broken_images import BrokenImages
from tools import predict

# --- the inputs -------------------------------------------------------------------------------


def png_of_size(width, height):
    """A PNG whose header promises more pixels than it has."""

    def chunk(kind, data):
        return (
            struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
        )

    header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(100))
    return (
        b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', pixels) + chunk(b'IEND', b'')
    )


def small_image(mode='RGB'):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 48, 3)).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def jpeg_of_size(width, height, length):
    """The same as a JPEG, padded to `length` bytes: the header of a large file is read first."""
    content = jpeg(small_image())
    frame = content.index(b'\xff\xc0') + 5
    content = content[:frame] + struct.pack('>HH', height, width) + content[frame + 4 :]
    return content.ljust(length, b'\0')


def encoded(suffix, image):
    return cv2.imencode(suffix, image)[1].tobytes()


def flipped(content, place):
    return content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :]


def write(content):
    return lambda path: path.write_bytes(content)


def sparse(length):
    def make(path):
        path.touch()
        os.truncate(path, length)

    return make


def cut_gif(path):
    small_image().quantize(8).save(path, 'GIF')
    os.truncate(path, path.stat().st_size // 2)


PNG = encoded('.png', np.asarray(small_image()))
# name of the file, how to make it, words of the line about it besides its name
INPUTS = [
    ('huge.png', write(png_of_size(100_000, 100_000)), 'OPENCV_IO_MAX_IMAGE_PIXELS'),
    ('huge.jpg', write(jpeg_of_size(65_500, 65_500, 200_000)), 'OPENCV_IO_MAX_IMAGE_PIXELS'),
    ('wide.png', write(png_of_size(2_000_000, 8)), 'not an image'),
    ('no-width.png', write(png_of_size(0, 8)), 'not an image'),
    ('few-pixels.png', write(png_of_size(5000, 5000)), 'not an image'),
    ('flipped.png', write(flipped(PNG, len(PNG) // 2)), 'not an image'),
    ('cut.png', write(PNG[:-20]), 'truncated'),
    ('cut.jpg', write(jpeg(small_image())[:-100]), 'truncated'),
    ('cut.gif', cut_gif, 'truncated'),
    ('floats.tif', write(encoded('.tiff', np.ones((8, 8, 4), np.float32))), 'float32'),
    ('empty.png', write(b''), 'not an image'),
    ('text.png', write(b'no image'), 'not an image'),
    ('pipe.png', os.mkfifo, 'not a regular file'),
    ('socket.png', lambda path: os.mknod(path, stat.S_IFSOCK | 0o600), 'not a regular file'),
    ('device.png', lambda path: path.symlink_to('/dev/zero'), 'not a regular file'),
    ('large.png', sparse(2**31), '2 GiB'),
    ('nowhere.png', lambda path: path.symlink_to('missing'), 'No such file'),
    ('itself.png', lambda path: path.symlink_to(path.name), 'symbolic links'),
    ('red\n\x1b[31m.png', write(b'no image'), r'red\n\x1b[31m.png'),
]


# --- predict ----------------------------------------------------------------------------------


def save_net(path, change=None):
    torch.manual_seed(0)
    net = DiracNet(10, 0.25, 'digits')
    if change:
        with torch.no_grad():
            for tensor in net.parameters():
                change(tensor)
    torch.save(net.state_dict(), path)
    return path


@pytest.fixture(scope='module')
def net(tmp_path_factory):
    return save_net(tmp_path_factory.mktemp('net') / 'net.pth')


@pytest.fixture
def good(tmp_path):
    small_image().save(tmp_path / 'good.png')
    return tmp_path / 'good.png'


@pytest.mark.parametrize('name, make, words', INPUTS, ids=[row[0] for row in INPUTS])
def test_predict(name, make, words, net, good, tmp_path, refused):
    make(tmp_path / name)
    shown = name if name.isprintable() else words
    args = (net, tmp_path / name, good, '--dataset', 'digits')
    result = refused(1, [shown, words], predict.main, *args)
    assert result.out.startswith(f'{good}: ') and result.out.count('\n') == 1


def test_predict_names_that_are_no_images(net, good, tmp_path, refused):
    (tmp_path / 'folder.png').mkdir()
    for path, words in (
        (tmp_path / 'missing.png', 'No such file'),
        (tmp_path / 'folder.png', 'no'),
    ):
        result = refused(1, [path, words], predict.main, net, path, good, '--dataset', 'digits')
        assert result.out.startswith(f'{good}: ')


def test_predict_all_in_a_folder(net, good, tmp_path, call):
    """More images than a batch; links to files are images, and those to folders lead nowhere."""
    for index in range(70):
        small_image().rotate(index).save(tmp_path / f'{index:02}.png')
    for index in (3, 68):
        (tmp_path / f'{index:02}.png').write_text('no image')
    for index in (1, 2):
        (tmp_path / f'loop{index}').symlink_to('..')
        (tmp_path / f'link{index}.png').symlink_to('00.png')
    result = call(predict.main, net, tmp_path, '--json', '--dataset', 'digits')
    assert result.status == 1 and result.err.count('\n') == 2
    files = [json.loads(line)['image'] for line in result.out.splitlines()]
    expected = [f'{i:02}.png' for i in range(70) if i not in (3, 68)]
    expected += ['good.png', 'link1.png', 'link2.png']
    assert files == [str(tmp_path / name) for name in expected]
    single = call(predict.main, net, tmp_path / '69.png', '--json', '--dataset', 'digits')
    last = json.loads(result.out.splitlines()[-4])['probabilities']
    np.testing.assert_allclose(json.loads(single.out)['probabilities'], last, rtol=1e-5)


def test_predict_prints_names_on_one_line(net, tmp_path, call):
    path = tmp_path / 'a\nb\x1b[31m\udcff.png'
    small_image().save(path)
    result = call(predict.main, net, path, '--dataset', 'digits')
    assert result.status == 0 and result.out.count('\n') == 1
    assert r'a\nb\x1b[31m\udcff.png: ' in result.out and '\x1b' not in result.out
    result = call(predict.main, net, path, '--dataset', 'digits', '--json')
    assert json.loads(result.out)['image'] == str(path)


def test_predict_quotes_names_of_classes(net, good, tmp_path, call, monkeypatch):
    classes, load = ['one\n\x1b[31m'] * 10, predict.load

    def with_classes(*args):
        classifier = load(*args)
        classifier.classes = classes
        return classifier

    monkeypatch.setattr(predict, 'load', with_classes)
    result = call(predict.main, net, good, '--dataset', 'digits')
    assert result.out.count('\n') == 1 and result.out.count(r'one\n\x1b[31m ') == 5


@pytest.mark.parametrize('value', [float('nan'), 1e30])
def test_predict_numbers_that_are_not_finite(value, good, tmp_path, refused):
    path = save_net(tmp_path / 'net.pth', lambda tensor: tensor.fill_(value))
    for options in ((), ('--json',)):
        result = refused(1, path, predict.main, path, good, '--dataset', 'digits', *options)
        assert result.out == ''


def test_predict_to_a_full_device(net, good):
    command = [sys.executable, '-m', 'tools.predict', net, good, '--dataset', 'digits']
    with open('/dev/full', 'w') as full:
        result = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 1 and result.stderr.count('\n') == 1, result.stderr
    assert 'No space left' in result.stderr


# --- training ---------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Two classes with all bad inputs among 60 images."""
    random = np.random.default_rng(0)
    for part, n in (('train', 30), ('val', 5)):
        for label in ('a', 'b'):
            (tmp_path / 'data' / part / label).mkdir(parents=True)
            for index in range(n):
                image = random.integers(0, 256, (40, 48, 3)).astype(np.uint8)
                Image.fromarray(image).save(tmp_path / 'data' / part / label / f'{index:02}.png')
    for name, make, _ in INPUTS:
        make(tmp_path / 'data' / 'train' / 'a' / name)
    return tmp_path / 'data'


@pytest.mark.parametrize('workers', [0, 1])
def test_training_names_and_counts_them(workers, folder, tmp_path, call, monkeypatch):
    monkeypatch.setattr(BrokenImages, 'LIMIT', 1)
    monkeypatch.setattr(ImageFolder, 'TRIES', 1000)
    options = ('--epochs', 1, '--nthread', workers)
    result = call(train.main, *run_folder(folder, tmp_path / 'run', *options))
    assert result.status == 0 and result.err == '' and '\x1b' not in result.out, result
    [line] = read_log(tmp_path / 'run')
    assert line['train_broken'] == len(INPUTS) == len(line['broken_images'])
    named = [text for text in result.out.splitlines() if text.startswith('broken image: ')]
    assert len(named) == len(INPUTS)
    for name, _, words in INPUTS:
        shown = name if name.isprintable() else words
        assert len([text for text in named if f'/{shown} ' in text and words in text]) == 1, name

"""Image files that cannot be used: each is named in one line, by predict and by a training."""

import json
import os
import shutil
import struct
import zlib

import cv2
import numpy as np
import pytest
import torch
from data_helpers import epoch_of, folder_batches, jpeg, run_folder
from PIL import Image

import train
from conftest import read_log
from diracnet import DiracNet
from lab.data import image_files
from lab.errors import UserError
from lab.training.broken_images import BrokenImages
from tools import export, predict

# --- the files --------------------------------------------------------------------------------


def png_of_size(width, height):
    """A PNG whose header promises more pixels than it has."""

    def chunk(kind, content):
        checksum = struct.pack('>I', zlib.crc32(kind + content))
        return struct.pack('>I', len(content)) + kind + content + checksum

    header = chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0))
    return b'\x89PNG\r\n\x1a\n' + header + chunk(b'IDAT', zlib.compress(bytes(100))) + PNG[-12:]


def small_image():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 48, 3)).astype(np.uint8)
    return Image.fromarray(pixels)


def jpeg_of_size(width, height, length):
    """The same as a JPEG, padded to `length` bytes: the header of a large file is read first."""
    content = jpeg(small_image())
    frame = content.index(b'\xff\xc0') + 5
    content = content[:frame] + struct.pack('>HH', height, width) + content[frame + 4 :]
    return content.ljust(length, b'\0')


def jpeg_with_thumbnail():
    """A JPEG with a whole JPEG inside its header."""
    content = jpeg(small_image())
    inner = b'Exif\0\0' + jpeg(small_image().resize((16, 16)))
    return content[:2] + b'\xff\xe1' + struct.pack('>H', len(inner) + 2) + inner + content[2:]


def encoded(suffix, image):
    return cv2.imencode(suffix, image)[1].tobytes()


def sparse(path):
    path.touch()
    os.truncate(path, 2**31)


def cut_gif(path):
    small_image().quantize(8).save(path, 'GIF')
    os.truncate(path, path.stat().st_size // 2)


PNG = encoded('.png', np.asarray(small_image()))
# name of the file, its bytes or how to make it, words of the line about it besides its name
INPUTS = [
    ('huge.png', png_of_size(100_000, 100_000), 'OPENCV_IO_MAX_IMAGE_PIXELS'),
    ('huge.jpg', jpeg_of_size(65_500, 65_500, 200_000), 'OPENCV_IO_MAX_IMAGE_PIXELS'),
    ('flipped.png', PNG[:3000] + bytes([PNG[3000] ^ 255]) + PNG[3001:], 'not an image'),
    ('cut.png', PNG[:-20], 'truncated'),
    ('cut.jpg', jpeg(small_image())[:-100], 'truncated'),
    ('cut-after-thumbnail.jpg', jpeg_with_thumbnail()[:-500], 'truncated'),
    ('cut.gif', cut_gif, 'truncated'),
    ('floats.tif', encoded('.tiff', np.ones((8, 8, 4), np.float32)), 'float32'),
    ('empty.png', b'', 'not an image'),
    ('pipe.png', os.mkfifo, 'not a regular file'),
    ('device.png', lambda path: path.symlink_to('/dev/zero'), 'not a regular file'),
    ('large.png', sparse, '2 GiB'),
    ('nowhere.png', lambda path: path.symlink_to('missing'), 'No such file'),
    ('red\n\x1b[31m.png', b'no image', r'red\n\x1b[31m.png'),
]


def make_inputs(folder):
    for name, content, _ in INPUTS:
        if callable(content):
            content(folder / name)
        else:
            (folder / name).write_bytes(content)


def check_lines(lines):
    """Each of the INPUTS is named in one of the lines."""
    assert len(lines) == len(INPUTS)
    for name, _, words in INPUTS:
        shown = name if name.isprintable() else words
        assert len([text for text in lines if f'/{shown} ' in text and words in text]) == 1, name


def test_whole_jpeg_with_a_thumbnail_is_not_broken():
    content = np.frombuffer(jpeg_with_thumbnail(), np.uint8)
    assert image_files.decode(content, 'whole').shape == (40, 48, 3)


# --- predict ----------------------------------------------------------------------------------


@pytest.fixture
def net(tmp_path):
    torch.manual_seed(0)
    torch.save(DiracNet(10, 0.25, 'digits').state_dict(), tmp_path / 'net.pth')
    return tmp_path / 'net.pth'


@pytest.fixture
def good(tmp_path):
    small_image().save(tmp_path / 'good.png')
    return tmp_path / 'good.png'


def test_predict(net, good, tmp_path, call, refused):
    (tmp_path / 'bad').mkdir()
    make_inputs(tmp_path / 'bad')
    result = call(predict.main, net, good, tmp_path / 'bad', '--dataset', 'digits')
    assert result.status == 1 and result.out.startswith(f'{good}: ')
    assert result.out.count('\n') == 1 and '\x1b' not in result.err
    check_lines(result.err.splitlines())
    missing = tmp_path / 'missing.png'
    result = refused(1, missing, predict.main, net, missing, good, '--dataset', 'digits')
    assert result.out.startswith(f'{good}: ')


def test_predict_all_in_a_folder(net, tmp_path, call):
    """More images than a batch; links to files are images, and those to folders lead nowhere."""
    names = [f'{index:02}.png' for index in range(70)]
    for index, name in enumerate(names):
        small_image().rotate(index).save(tmp_path / name)
    (tmp_path / 'loop').symlink_to('..')
    (tmp_path / 'link.png').symlink_to('00.png')
    result = call(predict.main, net, tmp_path, '--json', '--dataset', 'digits')
    lines = [json.loads(line) for line in result.out.splitlines()]
    expected = [str(tmp_path / name) for name in [*names, 'link.png']]
    assert result.status == 0 and [line['image'] for line in lines] == expected
    single = call(predict.main, net, tmp_path / '69.png', '--json', '--dataset', 'digits')
    probabilities = json.loads(single.out)['probabilities']
    np.testing.assert_allclose(lines[69]['probabilities'], probabilities, rtol=1e-5)


def test_predict_prints_names_on_one_line(net, tmp_path, call, monkeypatch):
    path, load = tmp_path / 'a\nb\x1b[31m\udcff.png', predict.load
    small_image().save(path)

    def with_classes(*args):
        classifier = load(*args)
        classifier.classes = ['one\n\x1b[31m'] * 10
        return classifier

    monkeypatch.setattr(predict, 'load', with_classes)
    result = call(predict.main, net, path, '--dataset', 'digits')
    assert result.status == 0 and result.out.count('\n') == 1 and '\x1b' not in result.out
    assert r'a\nb\x1b[31m\udcff.png: ' in result.out and result.out.count(r'one\n\x1b[31m ') == 5


@pytest.mark.parametrize('value', [float('nan'), 1e30])
def test_predict_numbers_that_are_not_finite(value, net, good, refused):
    params = {key: tensor.fill_(value) for key, tensor in torch.load(net).items()}
    torch.save(params, net)
    for options in ((), ('--json',)):
        result = refused(1, net, predict.main, net, good, '--dataset', 'digits', *options)
        assert result.out == ''


# --- training ---------------------------------------------------------------------------------


@pytest.mark.parametrize('workers', [0, 1])
def test_training_names_them_once_and_counts_them(workers, many_files, tmp_path, call, monkeypatch):
    monkeypatch.setattr(BrokenImages, 'LIMIT', 1)
    monkeypatch.setattr('lab.data.batches.TRIES', 1000)
    make_inputs(many_files / 'train' / 'a')
    result = call(train.main, *run_folder(many_files, tmp_path / 'run', '--nthread', workers))
    assert result.status == 0 and result.err == '' and '\x1b' not in result.out, result
    first, second = read_log(tmp_path / 'run')
    assert first['train_broken'] == len(INPUTS) == len(first['broken_images'])
    assert (first['test_broken'], second['train_broken']) == (0, len(INPUTS))
    assert second['broken_images'] == []
    check_lines([line for line in result.out.splitlines() if line.startswith('broken image: ')])


def test_replacement_is_the_same_every_time(many_files):
    (many_files / 'train' / 'a' / '010.png').write_bytes(b'')
    expected = epoch_of(folder_batches(many_files, batch_size=15), 2)
    assert len(expected[0]) == 150
    for workers in (1, 3):
        again = epoch_of(folder_batches(many_files, batch_size=15, workers=workers), 2)
        assert all(map(torch.equal, again, expected))


@pytest.mark.parametrize('part, total', [('train', 150), ('val', 20)])
def test_many_broken_images_end_the_run_with_a_checkpoint(
    part, total, many_files, tmp_path, refused
):
    folder, run = many_files / part / 'a', tmp_path / 'run'
    for name in ('001.png', '002.png'):
        (folder / name).write_text('no image')
    words = [f'2 of {total}', '--resume']
    result = refused(1, words, train.main, *run_folder(many_files, run))
    assert all(str(folder / name) in result.out for name in ('001.png', '002.png'))
    broken = [(line['train_broken'], line['test_broken']) for line in read_log(run)]
    assert broken == ([(2, 0)] if part == 'train' else [])  # the test of an epoch is repeated
    for name in ('001.png', '002.png'):
        shutil.copy(folder / '003.png', folder / name)
    train.main(['--resume', str(run)])
    assert len(read_log(run)) == 2


def test_broken_test_images(many_files, tmp_path, refused, call):
    """Export leaves one out; a test needs one that is whole."""
    train.main(run_folder(many_files, tmp_path / 'run', '--epochs', 1))
    (many_files / 'val' / 'a' / '001.png').write_bytes(b'')
    result = call(export.main, tmp_path / 'run', tmp_path / 'net.pth')
    assert result.status == 0 and '19 test images' in result.out and '001.png' in result.err
    for path in (many_files / 'val').rglob('*.png'):
        path.write_bytes(b'')
    refused(1, ['20 of 20'], train.main, '--evaluate', tmp_path / 'run')


def test_a_batch_without_whole_images(many_files):
    """A disk that is gone, or broken files alone, end the run at once."""
    batches = folder_batches(many_files, batch_size=15)
    shutil.rmtree(many_files / 'train')
    with pytest.raises(UserError, match=f'image files .*{many_files / "train"}'):
        epoch_of(batches, 1)
    for label in 'ab':
        (many_files / 'train' / label).mkdir(parents=True)
        (many_files / 'train' / label / '0.png').write_text('not an image')
    with pytest.raises(UserError, match=r'2 image files .*0\.png is not an image'):
        epoch_of(folder_batches(many_files), 1)

"""Broken files in folders of images: skipped, named and counted."""

import shutil

import numpy as np
import pytest
import torch
from data_helpers import epoch_of, folder_batches, jpeg, run_folder
from PIL import Image

import train
from conftest import read_log
from lab.data import datasets, image_files
from lab.errors import UserError


def whole_jpeg(size=(48, 40), thumbnail=False):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    image = Image.fromarray(pixels)
    content = jpeg(image)
    if thumbnail:  # a whole JPEG inside the header
        inner = b'Exif\0\0' + jpeg(image.resize((16, 16)))
        length = (len(inner) + 2).to_bytes(2, 'big')
        content = content[:2] + b'\xff\xe1' + length + inner + content[2:]
    return content


@pytest.mark.parametrize('kind', ['cut', 'cut after a thumbnail', 'text', 'empty', 'cut png'])
def test_one_broken_image_is_named_once_counted_and_replaced(kind, many_files, tmp_path, call):
    folder = many_files / 'train' / 'b'
    bad = folder / ('bad.png' if kind == 'cut png' else 'bad.jpg')
    contents = {
        'cut': whole_jpeg()[:-500],
        'cut after a thumbnail': whole_jpeg(thumbnail=True)[:-500],
        'text': b'hello',
        'empty': b'',
        'cut png': (folder / '000.png').read_bytes()[:-200],
    }
    bad.write_bytes(contents[kind])
    result = call(train.main, *run_folder(many_files, tmp_path / 'run'))
    assert result.status == 0 and result.err == ''
    assert result.out.count(f'{bad} ') == 1
    first, second = read_log(tmp_path / 'run')
    assert (first['train_broken'], first['test_broken']) == (1, 0)
    assert first['broken_images'] == [str(bad)]
    assert (second['train_broken'], second['broken_images']) == (1, [])


def test_whole_jpeg_with_a_thumbnail_is_not_broken():
    content = np.frombuffer(whole_jpeg(thumbnail=True), np.uint8)
    assert image_files.decode(content, 'whole').shape == (40, 48, 3)


def test_deleted_image_is_counted_and_replaced(many_files):
    bad = many_files / 'train' / 'b' / 'bad.jpg'
    bad.write_bytes(whole_jpeg())
    source = datasets.load('folder', many_files, image_size=32)
    bad.unlink()
    batches = source.batches(True, batch_size=15)
    inputs, _ = epoch_of(batches, 1)
    assert len(inputs) == 151 and list(batches.broken) == [str(bad)]


def test_replacement_is_the_same_every_time(many_files):
    (many_files / 'train' / 'a' / '010.png').write_bytes(b'')
    expected = epoch_of(folder_batches(many_files, batch_size=15), 2)
    assert len(expected[0]) == 150
    for workers in (1, 3):
        found = epoch_of(folder_batches(many_files, batch_size=15, workers=workers), 2)
        for actual, wanted in zip(found, expected):
            assert torch.equal(actual, wanted)


def test_many_broken_images_end_the_run_with_a_checkpoint(many_files, tmp_path, refused):
    folder, run = many_files / 'train' / 'a', tmp_path / 'run'
    bad = [folder / '001.png', folder / '002.png']
    for path in bad:
        path.write_text('no image')
    result = refused(1, ['2 of 150', '--resume'], train.main, *run_folder(many_files, run))
    assert all(str(path) in result.out for path in bad)
    assert [line['train_broken'] for line in read_log(run)] == [2]
    for path in bad:
        shutil.copy(folder / '003.png', path)
    train.main(['--resume', str(run)])
    assert len(read_log(run)) == 2


def test_broken_test_image_is_skipped_and_counted(many_files, tmp_path, refused):
    (many_files / 'val' / 'a' / '001.png').write_bytes(b'')
    refused(1, ['1 of 20', '001.png'], train.main, *run_folder(many_files, tmp_path / 'run'))
    assert read_log(tmp_path / 'run')[0]['test_broken'] == 1


def test_test_images_that_are_all_broken(many_files, tmp_path, refused, call):
    run, images = tmp_path / 'run', sorted((many_files / 'val').rglob('*.png'))
    sound = [path.read_bytes() for path in images]
    for path in images:
        path.write_bytes(b'')
    refused(1, ['20 of 20', '--resume'], train.main, *run_folder(many_files, run, '--epochs', 1))
    refused(1, ['20 of 20'], train.main, '--evaluate', run)
    for path, content in zip(images, sound):
        path.write_bytes(content)
    train.main(['--resume', str(run)])  # the trained epoch was not lost
    assert [line['epoch'] for line in read_log(run)] == [1]


def test_export_without_a_broken_test_image(many_files, tmp_path, call):
    from tools import export

    train.main(run_folder(many_files, tmp_path / 'run', '--epochs', 1))
    (many_files / 'val' / 'a' / '001.png').write_bytes(b'')
    result = call(export.main, tmp_path / 'run', tmp_path / 'net.pth')
    assert result.status == 0 and '19 test images' in result.out and '001.png' in result.err


def test_data_that_vanish(many_files):
    """A disk that is gone ends the run at once."""
    source = datasets.load('folder', many_files, image_size=32)
    shutil.rmtree(many_files / 'train')
    with pytest.raises(UserError, match=str(many_files / 'train')):
        epoch_of(source.batches(True, batch_size=15), 1)


def test_images_that_are_all_broken(many_files, tmp_path, refused):
    """Also if they are few."""
    for file in many_files.glob('*/*/*.png'):
        file.write_text('not an image') if file.name == '000.png' else file.unlink()
    command = run_folder(many_files, tmp_path / 'run', '--nthread', 0)
    refused(1, ['2 image files', 'train', '000.png is not an image'], train.main, *command)

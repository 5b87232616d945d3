"""Folders of images: their list and its cache, training on them, and what is wrong with them."""

import contextlib
import os
import shutil
import time

import cv2
import numpy as np
import pytest
import torch
from data_helpers import epoch_of, folder_batches, jpeg, own_memory, run_folder
from PIL import Image

import train
from conftest import python, read_log, write_idx
from lab.data import datasets, image_files, image_folders
from lab.data.fashion_mnist import IDX_FILES
from lab.errors import UserError


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
                crop = photographs[label == 'b'][top : top + 40, left : left + 48, ::-1]
                cv2.imwrite(str(root / part / label / f'{i:03}.png'), crop)
    return root


def test_train_predict_and_evaluate(many_files, tmp_path, call):
    from tools import predict

    options = ['--epochs', '3', '--epoch_step', '[3]', '--lr', '0.05']
    train.main(run_folder(many_files, tmp_path / 'run', *options))
    last = read_log(tmp_path / 'run')[-1]
    assert (last['num_classes'], last['image_size'], last['preprocess']) == (2, 64, 'meanstd')
    assert 'train_broken' not in last
    out = call(predict.main, tmp_path / 'run', many_files / 'val').out.splitlines()
    assert len(out) == 20 and all(' a ' in line and ' b ' in line for line in out)
    result = call(train.main, '--evaluate', tmp_path / 'run', '--nthread', 0)
    assert result.status == 0 and f'"test_acc": {last["test_acc"]}' in result.out


def test_other_classes_are_refused(many_files, tmp_path, refused):
    train.main(run_folder(many_files, tmp_path / 'run', '--epochs', 1))
    for part in ('train', 'val'):
        (many_files / part / 'b').rename(many_files / part / 'c')
    for command in (
        ('--evaluate', tmp_path / 'run'),
        ('--resume', tmp_path / 'run', '--epochs', 3),
    ):
        refused(1, ['a, b', 'a, c'], train.main, *command)


def test_options_that_folders_do_not_have(many_files, tmp_path, refused):
    for options in (('--holdout', 10), ('--preprocess', 'zca')):
        refused(2, options[0], train.main, *run_folder(many_files, tmp_path / 'run', *options))


# --- the list of files and its cache ----------------------------------------------------------


def age(root):
    """Make the folders an hour old: the list of a folder that has just changed is not cached."""
    for folder, _, _ in os.walk(root):
        os.utime(folder, (time.time() - 3600,) * 2)


@pytest.fixture
def listed(many_files, monkeypatch):
    """listed(): names, targets, and whether the folders were walked."""
    walks, walk = [], os.walk

    def counted(*args, **kwargs):
        walks.append(args)
        return walk(*args, **kwargs)

    def listed():
        with monkeypatch.context() as patch:
            patch.setattr(os, 'walk', counted)
            walks.clear()
            names, targets = image_folders.list_files(many_files, 'train', ['a', 'b'])
        return [os.fsdecode(name) for name in names], targets.tolist(), bool(walks)

    return listed


def test_list_is_cached(many_files, listed):
    cache = many_files / '.diracnets-train.npz'
    fresh = listed()
    assert fresh[2] and not cache.exists()
    names, targets, _ = fresh
    assert len(names) == 150 and names[0] == 'a/000.png' and targets == [0] * 75 + [1] * 75
    age(many_files / 'train')
    assert listed() == fresh and cache.exists()
    assert listed() == (names, targets, False)
    for broken in (b'nothing', b'', cache.read_bytes()[:500]):
        cache.write_bytes(broken)
        assert listed()[2] and not listed()[2]
    # the same folders as other classes
    assert image_folders.list_files(many_files, 'train', ['b'])[1].tolist() == [0] * 75


def test_list_follows_changes(many_files, listed):
    a, b = many_files / 'train' / 'a', many_files / 'train' / 'b'
    age(many_files / 'train')
    listed()
    (a / '000.png').rename(b / 'new.PNG')
    names, targets, walked = listed()
    assert walked and len(names) == 150 and sum(targets) == 76
    assert names[0] == 'a/001.png' and names[-1] == 'b/new.PNG'
    age(many_files / 'train')
    listed()
    (b / 'deeper').mkdir()
    (b / '001.png').rename(b / 'deeper' / '001.png')
    assert 'b/deeper/001.png' in listed()[0]
    age(many_files / 'train')
    assert listed()[2] and not listed()[2]
    shutil.rmtree(b / 'deeper')
    assert 'b/deeper/001.png' not in listed()[0]


def test_order_does_not_depend_on_the_file_system(many_files, listed, monkeypatch):
    for name in ('z', 'y', 'x'):
        (many_files / 'train' / 'a' / name).mkdir()
        shutil.copy(many_files / 'train' / 'a' / '000.png', many_files / 'train' / 'a' / name)
    names = [name for name in listed()[0] if name.count('/') == 2]
    assert names == ['a/x/000.png', 'a/y/000.png', 'a/z/000.png']


def test_list_of_an_older_version_is_not_used(many_files, listed):
    age(many_files / 'train')
    names, targets, _ = listed()
    cache = many_files / '.diracnets-train.npz'
    content = dict(np.load(cache))
    content.update(names=content['names'][:5], targets=content['targets'][:5])
    np.savez(cache, **content)
    assert len(listed()[0]) == 5
    for changed in ({'version': np.array(1)}, {}):
        np.savez(cache, **{key: content[key] for key in content if key != 'version'}, **changed)
        assert listed() == (names, targets, True)
    cache.unlink()
    os.mkfifo(cache)  # nobody writes to it
    assert listed()[0] == names


# --- links ------------------------------------------------------------------------------------


@pytest.mark.parametrize('target', ['..', '../../train', '../..', '../../..', '/', '../b', 'loop'])
def test_links_that_lead_back_are_not_followed(target, many_files, listed):
    expected = listed()[:2]
    (many_files / 'train' / 'a' / 'loop').symlink_to(target)
    assert listed()[:2] == expected


def test_classes_that_lead_back(many_files):
    for part in ('train', 'val'):
        (many_files / part / 'loop').symlink_to('..')
        (many_files / part / 'itself').symlink_to('itself')
    assert image_folders.list_classes(many_files) == ['a', 'b']


def test_links_to_other_folders_are_followed_once(many_files, tmp_path, listed):
    a, pool = many_files / 'train' / 'a', tmp_path / 'pool'
    shutil.move(many_files / 'train' / 'b', pool)
    (many_files / 'train' / 'b').symlink_to(pool)  # a class may be a link
    shutil.copytree(pool, tmp_path / 'more')
    for name in ('first', 'second'):
        (a / name).symlink_to(tmp_path / 'more')
    (tmp_path / 'more' / 'up').symlink_to(many_files)
    names, targets, _ = listed()
    assert targets == [0] * 150 + [1] * 75
    assert [name for name in names if '/first/' in name] == names[75:150]


def test_names_of_one_file_count_once(many_files, listed):
    a, b = many_files / 'train' / 'a', many_files / 'train' / 'b'
    names, targets, _ = listed()
    (a / 'link.png').symlink_to('000.png')
    os.link(a / '000.png', a / 'hard.png')
    os.link(a / '000.png', b / 'hard.png')
    (b / 'link.png').symlink_to('../a/000.png')
    shutil.copy(b / '000.png', b / 'copy.png')  # another file
    assert listed()[:2] == (sorted([*names, 'b/copy.png']), [*targets, 1])


def test_two_classes_of_one_folder(many_files, tmp_path, refused):
    for part in ('train', 'val'):
        shutil.rmtree(many_files / part / 'b')
        (many_files / part / 'b').symlink_to('a')
    words = [many_files / 'train' / 'b', 'no images']
    refused(1, words, train.main, *run_folder(many_files, tmp_path / 'run'))


def test_read_only_folder_is_cached_elsewhere(many_files, tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    # the tests may run as root, who may write everywhere
    monkeypatch.setattr(os, 'access', lambda path, mode: mode != os.W_OK)
    age(many_files)
    image_folders.list_files(many_files, 'val', ['a', 'b'])
    assert not list(many_files.glob('.diracnets*'))
    assert len(list((tmp_path / 'cache' / 'diracnets').iterdir())) == 1


def test_structure_of_folders(many_files, tmp_path, refused):
    train_folder, val_folder = many_files / 'train', many_files / 'val'

    def refuse(*words):
        refused(1, words, train.main, *run_folder(many_files, tmp_path / 'run'))

    (train_folder / 'c').mkdir()
    refuse(f'{val_folder} has no folder c', train_folder)
    (val_folder / 'c').mkdir()
    refuse(train_folder / 'c', '.jpg')
    (val_folder / 'd').mkdir()
    shutil.rmtree(val_folder / 'c')
    shutil.rmtree(train_folder / 'c')
    refuse(f'{train_folder} has no folder d', val_folder)
    for part in (train_folder, val_folder):
        for folder in part.iterdir():
            shutil.rmtree(folder)
    refuse(train_folder, 'train/CLASS', '--dataroot')
    shutil.rmtree(many_files)
    refuse(train_folder, 'No such file', '--dataset digits')
    assert not (tmp_path / 'run').exists()


# --- broken files -----------------------------------------------------------------------------


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


def test_data_that_vanish(many_files):
    """A disk that is gone ends the run at once."""
    source = datasets.load('folder', many_files, image_size=32)
    shutil.rmtree(many_files / 'train')
    with pytest.raises(UserError, match=str(many_files / 'train')):
        epoch_of(source.batches(True, batch_size=15), 1)


# --- permissions ------------------------------------------------------------------------------


@pytest.fixture
def unprivileged(tmp_path):
    """A context in which permissions count, even if the tests run as root."""
    if os.geteuid() != 0:
        return contextlib.nullcontext
    for folder in [tmp_path, *tmp_path.parents][:-1]:
        folder.chmod(folder.stat().st_mode | 0o755)

    @contextlib.contextmanager
    def unprivileged():
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)

    return unprivileged


def test_permissions(many_files, tmp_path, unprivileged, call, refused):
    from tools import predict

    out, folder = tmp_path / 'out', many_files / 'train' / 'a'
    denied, secret = 'Permission denied', folder / '000.png'
    out.mkdir()
    out.chmod(0o777)

    def command(name):
        return run_folder(many_files, out / name, '--epochs', 1, '--nthread', 0)

    # This run also imports everything, before permissions are dropped.
    assert call(train.main, *command('whole')).status == 0
    secret.chmod(0)
    with unprivileged():
        result = call(train.main, *command('run'))
        assert result.status == 0 and result.out.count(f'{secret} ') == 1, result
        assert denied in result.out
        refused(1, [secret, denied], predict.main, out / 'run', secret)
    folder.chmod(0)
    with unprivileged():
        refused(1, [folder, denied], train.main, *command('other'))
    (out / 'run' / 'model.pt7').chmod(0)
    with unprivileged():
        refused(1, [out / 'run', denied], train.main, '--evaluate', out / 'run')
    for name in IDX_FILES:
        write_idx(out / name, np.zeros((4, 28, 28) if 'images' in name else 4))
    (out / IDX_FILES[2]).chmod(0)
    (many_files / 'train').chmod(0o555)
    fashion = ('--dataset', 'FashionMNIST', '--dataroot', out, '--save', out / 'fashion')
    digits = ('--dataset', 'digits', '--save', many_files / 'train' / 'run')
    with unprivileged():
        refused(1, IDX_FILES[2], train.main, *fashion)
        refused(1, ['--save', denied], train.main, *digits)


# --- worker processes -------------------------------------------------------------------------


def test_memory_does_not_grow(many_files):
    batches = folder_batches(many_files, workers=2, batch_size=15)
    sizes = []
    for epoch in range(13):
        epoch_of(batches, epoch)
        workers = [worker.pid for worker in batches.loader._iterator._workers]
        sizes.append(sum(own_memory(pid) for pid in [os.getpid(), *workers]))
    # Ten epochs; a single one decodes a megabyte.
    assert sizes[2] > 0 and sizes[12] - sizes[2] < 10, sizes


def test_program_ends_with_its_workers_in_silence(many_files, tmp_path):
    result = python('train.py', *run_folder(many_files, tmp_path / 'run', '--nthread', 2))
    assert result.status == 0 and result.err == '', result.err

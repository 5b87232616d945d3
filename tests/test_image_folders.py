"""Folders of images: their list and its cache, training on them, and what is wrong with them."""

import contextlib
import os
import shutil
import time

import numpy as np
import pytest
from data_helpers import epoch_of, folder_batches, own_memory, run_folder

import train
from conftest import python, read_log, write_idx
from lab.data import image_folders
from lab.data.fashion_mnist import IDX_FILES


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
    for changed in (
        {'version': np.array(1)},
        {'names': content['names'][:5], 'targets': content['targets'][:5]},
        {'targets': np.zeros_like(content['targets'])},
        {'targets': np.array('x')},
        {'checksum': np.array('x')},
    ):
        np.savez(cache, **{**content, **changed})
        assert listed() == (names, targets, True)
    np.savez(cache, **{key: content[key] for key in content if key != 'version'})
    assert listed() == (names, targets, True)
    cache.write_bytes(cache.read_bytes()[:-40])
    assert listed() == (names, targets, True)
    cache.unlink()
    os.mkfifo(cache)  # nobody writes to it
    assert listed()[0] == names


# --- links ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'target',
    ['..', '../../train', '../..', '../../..', '/', '../b', 'loop', '../../val', '../../val/b'],
)
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

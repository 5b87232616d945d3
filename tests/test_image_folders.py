"""Folders of images: their list, training on them, and what is wrong with them."""

import contextlib
import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from data_helpers import epoch_of, folder_batches, own_memory, run_folder

import train
from conftest import python, read_log, write_idx
from lab.data import datasets, image_folders
from lab.data.readers import IDX_FILES


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
        refused(1, ['other classes', 'b instead of c'], train.main, *command)


def test_options_that_image_files_do_not_have(many_files, tmp_path, refused):
    for options in (('--cutout', 10), ('--preprocess', 'zca')):
        command = run_folder(many_files, tmp_path / 'run', *options)
        refused(2, [options[0], '--form cifar'], train.main, *command)


def test_without_mirror_images(many_files):
    """The same crops, none of them mirrored."""
    data = datasets.load('folder', many_files, image_size=64)
    mirrored, plain = (
        epoch_of(replace(data, mirrored=flip).batches(True, batch_size=50), 1)[0]
        for flip in (True, False)
    )
    same, flipped = (
        torch.stack([(a == b).all() for a, b in zip(mirrored, other)])
        for other in (plain, plain.flip(3))
    )
    assert (same | flipped).all() and 50 < same.sum() < 100


# --- the list of files ------------------------------------------------------------------------


@pytest.fixture
def listed(many_files):
    """listed(): the names and targets of the training files."""

    def listed(root=many_files):
        paths, targets = datasets.load('folder', root).train
        return [os.path.relpath(os.fsdecode(p), root / 'train') for p in paths], targets.tolist()

    return listed


def test_list(many_files, listed):
    names, targets = listed()
    assert names[0] == 'a/000.png' and len(names) == 150 and targets == [0] * 75 + [1] * 75
    for name in ('z', 'y', 'x'):
        (many_files / 'train' / 'a' / name).mkdir()
        shutil.copy(many_files / 'train' / 'a' / '000.png', many_files / 'train' / 'a' / name)
    (many_files / 'train' / 'b' / '000.png').rename(many_files / 'train' / 'b' / 'new.JFIF')
    names = listed()[0]
    assert names[75:78] == ['a/x/000.png', 'a/y/000.png', 'a/z/000.png']
    assert names[-1] == 'b/new.JFIF'


def test_odd_names(many_files, tmp_path, listed, call):
    """Spaces, umlauts, 200 characters, bytes that are not UTF-8, a nested folder."""
    folder = many_files / 'train' / 'a'
    odd = [
        ' a b .png',
        'Äöü ß.PNG',
        f'{"x" * 196}.png',
        os.fsdecode(b'\xff\xfe.png'),
        'new\nline.png',
    ]
    (folder / 'in here').mkdir()
    for name in odd:
        shutil.copy(folder / '000.png', folder / name)
        shutil.copy(folder / '000.png', folder / 'in here' / name)
    names = listed()[0]
    assert {f'a/{name}' for name in odd} | {f'a/in here/{name}' for name in odd} <= set(names)
    root = many_files.rename(tmp_path / f'{"Bilder ü " * 15}')
    command = run_folder(root, tmp_path / 'run', '--epochs', 1, '--nthread', 0)
    assert call(train.main, *command).status == 0
    (root / 'train' / 'a' / odd[-1]).write_text('not an image')
    result = call(train.main, *run_folder(root, tmp_path / 'other', '--epochs', 1, '--nthread', 0))
    assert 'new\\nline.png is not an image' in result.out and not result.err


def test_leftovers_of_macos_are_no_images(many_files, listed):
    expected = listed()
    for part in ('train', 'val'):
        for folder in (many_files / part / '__MACOSX' / 'a', many_files / part / 'a' / '.thumbs'):
            folder.mkdir(parents=True)
            (folder / '0.png').write_bytes(b'\0\5\x16\7')
        (many_files / part / 'b' / '._000.png').write_bytes(b'\0\5\x16\7')
    assert listed() == expected
    assert datasets.load('folder', many_files, form='imagenet').notes == ()


def test_other_suffixes_are_counted(many_files, tmp_path, call):
    for name in ('1.heic', '2.HEIC', 'list'):
        (many_files / 'train' / 'a' / name).write_text('')
    (many_files / 'val' / 'b' / '3.heic').write_text('')
    command = run_folder(many_files, tmp_path / 'run', '--epochs', 1, '--nthread', 0)
    lines = call(train.main, *command).out.splitlines()
    [line] = [line for line in lines if 'ignored' in line]
    assert line.startswith('4 files') and '2 .heic in a, 1 without a suffix in a' in line


@pytest.mark.parametrize('name', image_folders.TEST_FOLDERS)
def test_names_of_the_test_folder(name, many_files):
    (many_files / 'val').rename(many_files / name)
    data = datasets.load('folder', many_files, form='imagenet')
    assert (len(data.train), len(data.test)) == (150, 20)
    assert [f' {name}/' in note for note in data.notes] == ([] if name == 'val' else [True])
    if name != 'test':
        (many_files / 'test').mkdir()  # a second one does not count
        assert len(datasets.load('folder', many_files).test) == 20
    for folder in list(many_files.iterdir()):
        folder.rename(many_files / folder.name.capitalize())
    assert len(datasets.load('folder', many_files).test) == 20


@pytest.mark.parametrize('form', ['imagenet', 'cifar'])
@pytest.mark.parametrize('amount', ['30', '20%'])
def test_folder_without_a_split(form, amount, many_files, tmp_path, call, refused):
    """It is tested on held-out images, also by the programs that read the run."""
    from tools.report.__main__ import main as report

    flat = (many_files / 'train').rename(tmp_path / 'flat')
    depth = {'cifar': 10, 'imagenet': 18}[form]
    options = ('--form', form, '--depth', depth, '--epochs', 1, '--nthread', 0)
    command = run_folder(flat, tmp_path / 'run', *options)
    refused(1, ['flat', 'val/', '--holdout'], train.main, *command)
    assert call(train.main, *command, '--holdout', amount).status == 0
    result = call(train.main, '--evaluate', tmp_path / 'run', '--nthread', 0)
    stats = json.loads(result.out.removeprefix('json_stats: '))
    assert stats['n'] == 30 and stats['test_acc'] == read_log(tmp_path / 'run')[-1]['test_acc']
    page = tmp_path / 'report.html'
    call(report, tmp_path / 'run', '--out', page)
    assert 'on flat' in page.read_text() and 'of 30 held-out images' in page.read_text()


@pytest.mark.parametrize('form', ['imagenet', 'cifar'])
def test_holdout_and_per_class(form, many_files, tmp_path):
    """Held-out images are the same at each call, from all classes, and none is trained on."""
    data = datasets.load('folder', many_files, form=form, image_size=64)

    def samples(part):
        """Something that identifies each sample."""
        return [image if form == 'imagenet' else image.numpy().tobytes() for image in part[0]]

    held = data.holdout(50)
    assert samples(held.test) == samples(data.holdout(50).test)
    assert sorted(samples(held.test) + samples(held.train)) == sorted(samples(data.train))
    assert 15 < sum(held.test[1].tolist()) < 35
    assert len(data.holdout('10%').test[1]) == 15
    few = held.per_class(7)
    assert few.train[1].tolist() == [0] * 7 + [1] * 7
    assert samples(few.train)[:7] == samples(held.train)[:7]
    inputs, _ = epoch_of(held.batches(False, batch_size=20), 1)
    again, _ = epoch_of(held.batches(False, batch_size=20), 2)
    assert torch.equal(inputs, again)  # not augmented


@pytest.mark.parametrize(
    'options, words',
    [
        (['--holdout', '100%'], '100%'),
        (['--holdout', '0%'], '0%'),
        (['--holdout', 'half'], 'half'),
        (['--holdout', '150'], ['150', '149']),
        (['--holdout', '149'], 'without'),
        (['--per_class', '76'], ['76', '75']),
        (['--form', 'vgg'], 'vgg'),
        (['--form', 'cifar', '--image_size', '7'], '7'),
        (['--form', 'cifar', '--image_size', '97'], ['97', '96']),
        (['--image_size', '63'], ['63', '64']),
        (['--form', 'cifar', '--depth', '18'], ['18', '16']),
        (['--depth', '16'], ['16', 'form cifar']),
        (['--recipe', 'fast'], '--form cifar'),
    ],
)
def test_bad_options(options, words, many_files, tmp_path, refused):
    refused(2, words, train.main, *run_folder(many_files, tmp_path / 'run', *options))


@pytest.mark.parametrize('dataset, form', [('digits', 'imagenet'), ('ImageNet', 'cifar')])
def test_form_of_other_data_sets(dataset, form, tmp_path, refused):
    command = ('--dataset', dataset, '--form', form, '--save', tmp_path / 'run')
    refused(2, ['--form', dataset], train.main, *command)


def test_one_class(many_files, tmp_path, refused):
    for part in ('train', 'val'):
        shutil.rmtree(many_files / part / 'b')
    refused(1, ['one class', 'a'], train.main, *run_folder(many_files, tmp_path / 'run'))


# --- names of classes -------------------------------------------------------------------------


def rename_classes(root, names):
    for part in ('train', 'val'):
        for old, new in zip('ab', names):
            (root / part / old).rename(root / part / new)


def test_wordnet_ids(many_files, tmp_path, call):
    from tools import predict

    rename_classes(many_files, ('n01440764', 'n13133613'))
    options = ('--form', 'cifar', '--depth', 10, '--epochs', 1)
    train.main(run_folder(many_files, tmp_path / 'run', *options))
    out = call(predict.main, tmp_path / 'run', many_files / 'val').out
    assert out.count('tench') == out.count('ear') == 20 and 'n01440764' not in out.replace(
        str(many_files / 'val' / 'n01440764'), ''
    )


def test_classes_txt(many_files, tmp_path, call, refused):
    from tools import predict

    names = many_files / 'classes.txt'
    names.write_text('\ufeffb\tweiße Blüte\n\nz\tunused\n', 'utf-8')
    options = ('--form', 'cifar', '--depth', 10, '--epochs', 1)
    assert call(train.main, *run_folder(many_files, tmp_path / 'run', *options)).status == 0
    out = call(predict.main, tmp_path / 'run', many_files / 'val').out
    assert out.count(' a ') == out.count('weiße Blüte') == 20
    names.write_text('b white flower\n')
    words = [names, 'line 1', 'b white flower']
    refused(1, words, train.main, *run_folder(many_files, tmp_path / 'other', *options))


# --- links ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'target',
    ['..', '../../train', '../..', '../../..', '/', '../b', 'loop', '../../val', '../../val/b'],
)
def test_links_that_lead_back_are_not_followed(target, many_files, listed):
    expected = listed()
    (many_files / 'train' / 'a' / 'loop').symlink_to(target)
    assert listed() == expected


def test_classes_that_lead_back(many_files):
    for part in ('train', 'val'):
        (many_files / part / 'loop').symlink_to('..')
        (many_files / part / 'itself').symlink_to('itself')
    assert image_folders.list_classes(*image_folders.find_splits(many_files)) == ['a', 'b']


def test_links_to_other_folders_are_followed_once(many_files, tmp_path, listed):
    a, pool = many_files / 'train' / 'a', tmp_path / 'pool'
    shutil.move(many_files / 'train' / 'b', pool)
    (many_files / 'train' / 'b').symlink_to(pool)  # a class may be a link
    shutil.copytree(pool, tmp_path / 'more')
    for name in ('first', 'second'):
        (a / name).symlink_to(tmp_path / 'more')
    (tmp_path / 'more' / 'up').symlink_to(many_files)
    names, targets = listed()
    assert targets == [0] * 150 + [1] * 75
    assert [name for name in names if '/first/' in name] == names[75:150]


def test_two_classes_of_one_folder(many_files, tmp_path, refused):
    for part in ('train', 'val'):
        shutil.rmtree(many_files / part / 'b')
        (many_files / part / 'b').symlink_to('a')
    words = [many_files / 'train' / 'b', 'same folder']
    refused(1, words, train.main, *run_folder(many_files, tmp_path / 'run'))


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

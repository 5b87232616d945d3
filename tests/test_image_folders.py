"""Folders of images: the list of their files, their classes, and training on them."""

import contextlib
import os
import shutil
from dataclasses import replace

import pytest
import torch
from data_helpers import epoch_of, run_folder

import train
from conftest import python, read_log
from lab.data import datasets, image_folders
from lab.data.names import imagenet_names
from lab.errors import UserError
from tools import predict
from tools.report.__main__ import main as report


def test_train_predict_and_evaluate(many_files, tmp_path, call, refused):
    options = ['--epochs', '3', '--epoch_step', '[3]', '--lr', '0.05']
    train.main(run_folder(many_files, tmp_path / 'run', *options))
    last = read_log(tmp_path / 'run')[-1]
    assert (last['num_classes'], last['image_size'], last['preprocess']) == (2, 64, 'meanstd')
    assert 'train_broken' not in last
    out = call(predict.main, tmp_path / 'run', many_files / 'val').out.splitlines()
    assert len(out) == 20 and all(' a ' in line and ' b ' in line for line in out)
    result = call(train.main, '--evaluate', tmp_path / 'run', '--nthread', 0)
    assert result.status == 0 and f'"test_acc": {last["test_acc"]}' in result.out
    for part in ('train', 'val'):
        (many_files / part / 'b').rename(many_files / part / 'c')
    words = ['other classes', 'b instead of c']
    refused(1, words, train.main, '--evaluate', tmp_path / 'run', '--nthread', 0)
    refused(1, words, train.main, '--resume', tmp_path / 'run', '--epochs', 4)


@pytest.mark.parametrize(
    'options, words',
    [
        (['--cutout', '10'], ['--cutout', '--form cifar']),
        (['--preprocess', 'zca'], ['--preprocess', '--form cifar']),
        (['--holdout', '100%'], '--holdout'),
        (['--holdout', '0%'], '--holdout'),
        (['--holdout', 'half'], 'half'),
        (['--holdout', '150'], ['150', '149']),
        (['--per_class', '76'], ['76', '75']),
        (['--form', 'vgg'], 'vgg'),
        (['--form', 'cifar', '--image_size', '7'], '7'),
        (['--form', 'cifar', '--image_size', '97'], ['97', '96']),
        (['--image_size', '63'], ['63', '64']),
        (['--form', 'cifar', '--depth', '18'], ['18', '16']),
        (['--depth', '16'], '16'),
        (['--recipe', 'fast'], '--form cifar'),
        (['--dataset', 'digits', '--form', 'imagenet'], ['--form', 'digits']),
        (['--dataset', 'ImageNet', '--form', 'cifar'], ['--form', 'ImageNet']),
    ],
)
def test_bad_options(options, words, many_files, tmp_path, refused):
    refused(2, words, train.main, *run_folder(many_files, tmp_path / 'run', *options))


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


def test_program_ends_with_its_workers_in_silence(many_files, tmp_path):
    result = python('train.py', *run_folder(many_files, tmp_path / 'run', '--nthread', 2))
    assert result.status == 0 and result.err == '', result.err


# --- the list of files ------------------------------------------------------------------------


def listed(root):
    """The names and targets of the training files."""
    _, (paths, targets), _ = image_folders.list_images(root / 'train')
    return [os.path.relpath(os.fsdecode(p), root / 'train') for p in paths], targets.tolist()


def test_list(many_files):
    folder = many_files / 'train' / 'a'
    names, targets = listed(many_files)
    assert names[0] == 'a/000.png' and len(names) == 150 and targets == [0] * 75 + [1] * 75
    for name in ('z', 'y', 'x'):
        (folder / name).mkdir()
        shutil.copy(folder / '000.png', folder / name)
    (folder.with_name('b') / '000.png').rename(folder.with_name('b') / 'new.JFIF')
    names, _ = listed(many_files)
    assert names[75:78] == ['a/x/000.png', 'a/y/000.png', 'a/z/000.png']
    assert names[-1] == 'b/new.JFIF'


def test_odd_names(many_files, tmp_path, call):
    """Spaces, umlauts, 200 characters, bytes that are not UTF-8, a nested folder."""
    folder = many_files / 'train' / 'a'
    odd = [' a b .png', 'Äöü ß.PNG', f'{"x" * 196}.png', os.fsdecode(b'\xff\xfe.png'), 'new\nl.png']
    (folder / 'in here').mkdir()
    for name in odd:
        shutil.copy(folder / '000.png', folder / name)
        shutil.copy(folder / '000.png', folder / 'in here' / name)
    names, _ = listed(many_files)
    assert {f'a/{name}' for name in odd} | {f'a/in here/{name}' for name in odd} <= set(names)
    root = many_files.rename(tmp_path / f'{"Bilder ü " * 15}')
    (root / 'train' / 'a' / odd[-1]).write_text('not an image')
    result = call(train.main, *run_folder(root, tmp_path / 'run', '--epochs', 1, '--nthread', 0))
    assert result.status == 0 and 'new\\nl.png is not an image' in result.out and not result.err


def test_leftovers_of_macos_are_no_images_and_other_files_are_counted(many_files):
    expected = listed(many_files)
    for part in ('train', 'val'):
        for folder in (many_files / part / '__MACOSX' / 'a', many_files / part / 'a' / '.thumbs'):
            folder.mkdir(parents=True)
            (folder / '0.png').write_bytes(b'\0\5\x16\7')
        (many_files / part / 'b' / '._000.png').write_bytes(b'\0\5\x16\7')
    assert listed(many_files) == expected
    assert datasets.load('folder', many_files, form='imagenet').notes == ()
    for name in ('train/a/1.heic', 'train/a/2.HEIC', 'train/a/list', 'val/b/3.heic'):
        (many_files / name).write_text('')
    [note] = datasets.load('folder', many_files, form='imagenet').notes
    assert note.startswith('4 files') and '2 .heic in a, 1 without a suffix in a' in note


@pytest.mark.parametrize('name', image_folders.TEST_FOLDERS)
def test_names_of_the_test_folder(name, many_files):
    (many_files / 'val').rename(many_files / name)
    data = datasets.load('folder', many_files, form='imagenet')
    assert (len(data.train[1]), len(data.test[1])) == (150, 20)
    assert [f' {name}/' in note for note in data.notes] == ([] if name == 'val' else [True])
    if name != 'test':
        (many_files / 'test').mkdir()  # a second one does not count
    for folder in list(many_files.iterdir()):
        folder.rename(many_files / folder.name.capitalize())
    assert len(datasets.load('folder', many_files).test[1]) == 20


@pytest.mark.parametrize('form, amount', [('imagenet', '30'), ('cifar', '20%')])
def test_folder_without_a_split(form, amount, many_files, tmp_path, call, refused):
    """It is tested on held-out images, also by the programs that read the run."""
    flat = (many_files / 'train').rename(tmp_path / 'flat')
    depth = {'cifar': 10, 'imagenet': 18}[form]
    options = ('--form', form, '--depth', depth, '--epochs', 1, '--nthread', 0)
    command = run_folder(flat, tmp_path / 'run', *options)
    refused(1, ['flat', 'val/', '--holdout'], train.main, *command)
    assert call(train.main, *command, '--holdout', amount).status == 0
    result = call(train.main, '--evaluate', tmp_path / 'run', '--nthread', 0)
    assert f'"test_acc": {read_log(tmp_path / "run")[-1]["test_acc"]}' in result.out
    page = tmp_path / 'report.html'
    call(report, tmp_path / 'run', '--out', page)
    assert 'on flat' in page.read_text() and 'of 30 held-out images' in page.read_text()


@pytest.mark.parametrize('form', ['imagenet', 'cifar'])
def test_holdout_and_per_class(form, many_files):
    """Held-out images are the same at each call, from all classes, and none is trained on."""
    data = datasets.load('folder', many_files, form=form, image_size=64)

    def samples(part):
        return [image if form == 'imagenet' else image.numpy().tobytes() for image in part[0]]

    held = data.holdout(50)
    assert samples(held.test) == samples(data.holdout(50).test)
    assert sorted(samples(held.test) + samples(held.train)) == sorted(samples(data.train))
    assert 15 < sum(held.test[1]) < 35 and len(data.holdout('10%').test[1]) == 15
    few = held.per_class(7)
    assert few.train[1].tolist() == [0] * 7 + [1] * 7
    assert samples(few.train)[:7] == samples(held.train)[:7]
    first, again = (epoch_of(held.batches(False, batch_size=20), epoch)[0] for epoch in (1, 2))
    assert torch.equal(first, again)  # not augmented


# --- names of classes -------------------------------------------------------------------------


@pytest.mark.parametrize(
    'folders, content, words',
    [
        (('n01440764', 'n13133613'), None, ('tench', 'ear')),
        (('a', 'b'), '\ufeffb\tweiße Blüte\n\nz\tunused\n', ('a', 'weiße Blüte')),
    ],
)
def test_names_of_classes(folders, content, words, many_files, tmp_path, call):
    for part in ('train', 'val'):
        for old, new in zip('ab', folders):
            (many_files / part / old).rename(many_files / part / new)
    if content:
        (many_files / 'classes.txt').write_text(content, 'utf-8')
    options = ('--form', 'cifar', '--depth', 10, '--epochs', 1)
    train.main(run_folder(many_files, tmp_path / 'run', *options))
    out = call(predict.main, tmp_path / 'run', many_files / 'val').out
    assert [out.count(f' {name} ') for name in words] == [20, 20]


def test_broken_classes_txt(many_files):
    for content in (b'b white flower\n', b'\xff\xfe'):
        (many_files / 'classes.txt').write_bytes(content)
        with pytest.raises(UserError, match='classes.txt'):
            datasets.load('folder', many_files)


# --- links and the structure ------------------------------------------------------------------


@pytest.mark.parametrize(
    'target', ['..', '../../train', '../..', '../../..', '/', '../b', 'loop', 'missing']
)
def test_links_that_lead_back_are_not_followed(target, many_files):
    expected = listed(many_files)
    for place in ('a/loop', 'loop'):
        (many_files / 'train' / place).symlink_to(target)
    assert listed(many_files) == expected


def test_links_to_other_folders_are_followed_once(many_files, tmp_path):
    a, pool = many_files / 'train' / 'a', tmp_path / 'pool'
    shutil.move(many_files / 'train' / 'b', pool)
    (many_files / 'train' / 'b').symlink_to(pool)  # a class may be a link
    shutil.copytree(pool, tmp_path / 'more')
    for name in ('first', 'second'):
        (a / name).symlink_to(tmp_path / 'more')
    (tmp_path / 'more' / 'up').symlink_to(many_files)
    names, targets = listed(many_files)
    assert targets == [0] * 150 + [1] * 75
    assert [name for name in names if '/first/' in name] == names[75:150]


@pytest.mark.parametrize(
    'change, folders, words',
    [
        ('copy', ['val/c'], ['train', 'no folder c', 'val']),
        ('make', ['train/c'], ['train/c', '.jpg']),
        ('empty', ['train/a', 'train/b'], ['train/a', '.jpg']),
        ('remove', ['val'], ['val/', '--holdout']),
        ('remove', ['train/b', 'val/b'], ['train', 'two or more']),
        ('remove', ['train/a', 'train/b'], ['train', 'train/CLASS', '--dataroot']),
        ('remove', [''], ['train', '--dataroot']),
    ],
)
def test_structure_of_folders(change, folders, words, many_files, tmp_path, refused):
    for folder in folders:
        if change == 'copy':
            shutil.copytree(many_files / 'val' / 'a', many_files / folder)
        if change in ('remove', 'empty'):
            shutil.rmtree(many_files / folder)
        if change in ('make', 'empty'):
            (many_files / folder).mkdir()
    refused(1, [many_files.name, *words], train.main, *run_folder(many_files, tmp_path / 'run'))
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
    out, folder, denied = tmp_path / 'out', many_files / 'train' / 'a', 'Permission denied'
    secret = folder / '000.png'
    out.mkdir()
    out.chmod(0o777)

    def command(name):
        return run_folder(many_files, out / name, '--epochs', 1, '--nthread', 0)

    # This imports everything, before permissions are dropped.
    imagenet_names()
    assert call(train.main, *command('whole')).status == 0
    secret.chmod(0)
    with unprivileged():
        result = call(train.main, *command('run'))
        assert result.status == 0 and result.out.count(f'{secret} ') == 1 and denied in result.out
        refused(1, [secret, denied], predict.main, out / 'run', secret)
    for path in (folder, *(out / 'run').glob('*.pt7')):
        path.chmod(0)
    folder.parent.chmod(0o555)
    digits = ('--dataset', 'digits', '--save', folder.parent / 'run')
    with unprivileged():
        refused(1, [folder, denied], train.main, *command('other'))
        refused(1, [out / 'run', denied], train.main, '--evaluate', out / 'run')
        refused(1, ['--save', denied], train.main, *digits)

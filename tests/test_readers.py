"""Small data sets: what is known about them, and files that are missing or broken."""

import os
import socket

import numpy as np
import pytest

import diracparams
import train
from conftest import write_idx
from lab.data import datasets
from lab.data.readers import IDX_FILES
from lab.errors import OptionError

DEBIAN = '/usr/share/datasets/fashion-mnist'


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """As on a machine without a network, and without waiting for one."""

    def refuse(*args, **kwargs):
        raise socket.gaierror(-2, 'Name or service not known')

    monkeypatch.setattr(socket, 'getaddrinfo', refuse)


@pytest.fixture
def refuse(refused, tmp_path):
    """refuse(words, dataset, root): training on it ends with status 1 and these words, and makes no
    folder."""

    def refuse(words, dataset, root):
        command = ('--dataset', dataset, '--dataroot', root, '--save', tmp_path / 'run')
        refused(1, words, train.main, *command)
        assert not (tmp_path / 'run').exists()

    return refuse


def test_table_has_the_data_sets_of_diracnet(tmp_path):
    assert list(datasets.DATA_SETS) == list(diracparams.DATASETS)
    for name, (_, channels, _) in diracparams.DATASETS.items():
        assert datasets.PREPROCESSING[name].channels == channels
    mirrored = {name for name, known in datasets.DATA_SETS.items() if known.mirrored}
    assert mirrored == {'FashionMNIST', 'CIFAR10', 'CIFAR100'}  # no digits
    with pytest.raises(OptionError, match='MNIST9'):
        datasets.load('MNIST9', tmp_path)


@pytest.mark.parametrize('name', ['digits', 'FashionMNIST'])
def test_constants_are_those_of_the_data(name):
    if name == 'FashionMNIST' and not os.path.isdir(DEBIAN):
        pytest.skip('needs the Debian package dataset-fashion-mnist')
    pixels = datasets.load(name, DEBIAN).train[0].double()
    known = datasets.PREPROCESSING[name]
    assert abs(pixels.mean() - known.mean[0]) < 0.06 and abs(pixels.std() - known.std[0]) < 0.06


@pytest.mark.parametrize(
    'dataset, file_name',
    [
        ('CIFAR10', 'cifar-10-batches-py'),
        ('CIFAR100', 'cifar-100-python'),
        ('FashionMNIST', 'train-images-idx3-ubyte'),
        ('SVHN', 'train_32x32.mat'),
        ('ImageNet', 'train/CLASS'),
    ],
)
def test_missing_data(dataset, file_name, tmp_path, refuse):
    refuse([file_name, tmp_path / 'data', '--dataroot'], dataset, tmp_path / 'data')


def test_imagenetpath(tmp_path, refused):
    command = ('--dataset', 'ImageNet', '--imagenetpath', tmp_path / 'here')
    refused(1, tmp_path / 'here', train.main, *command)
    refused(1, tmp_path / 'root', train.main, *command, '--dataroot', tmp_path / 'root')


def test_broken_cifar_and_svhn(cifar, svhn, refuse):
    root = cifar('CIFAR10')
    os.truncate(root / 'cifar-10-batches-py' / 'data_batch_3', 1000)
    refuse(['CIFAR10', root, 'MD5'], 'CIFAR10', root)
    (svhn / 'test_32x32.mat').write_bytes(b'MATLAB 5.0')
    refuse(['SVHN', svhn, 'MD5'], 'SVHN', svhn)


IMAGES, LABELS = IDX_FILES[2:]
FAULTS = {
    'missing': ('', LABELS, lambda path: path.unlink()),
    'too few labels': ('', LABELS, lambda path: write_idx(path, np.zeros(7))),
    'too many classes': ('', LABELS, lambda path: write_idx(path, np.full(20, 11))),
    'another size': ('', IMAGES, lambda path: write_idx(path, np.zeros((20, 27, 28)))),
    'other data': ('', IMAGES, lambda path: write_idx(path, np.zeros(20))),
    'truncated gzip': ('.gz', IMAGES, lambda path: os.truncate(path, path.stat().st_size // 2)),
    'no gzip': ('.gz', IMAGES, lambda path: path.write_bytes(b'\x1f\x8bnothing')),
}


@pytest.mark.parametrize(
    'fashion_mnist, name, spoil', FAULTS.values(), ids=FAULTS, indirect=['fashion_mnist']
)
def test_broken_fashion_mnist(fashion_mnist, name, spoil, refuse):
    [path] = fashion_mnist.glob(f'{name}*')
    spoil(path)
    refuse(name, 'FashionMNIST', fashion_mnist)

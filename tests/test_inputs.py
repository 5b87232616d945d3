"""lab/training/inputs.py: data sets that are missing or broken end a training in one line."""

import gzip
import shutil
import socket

import numpy as np
import pytest

import train
from conftest import write_idx


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """As on a machine without a network, and without waiting for one."""

    def refuse(*args, **kwargs):
        raise socket.gaierror(-2, 'Name or service not known')

    monkeypatch.setattr(socket, 'getaddrinfo', refuse)


@pytest.fixture
def refuse(refused, tmp_path):
    """refuse(words, dataset, root, *options): training on it ends with status 1 and these words,
    and makes no folder."""

    def refuse(words, dataset, root, *options):
        command = ('--dataset', dataset, '--dataroot', root, *options)
        refused(1, words, train.main, *command, '--save', tmp_path / 'run')
        assert not (tmp_path / 'run').exists()

    return refuse


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
    refuse([file_name, tmp_path / 'data', '--dataset digits'], dataset, tmp_path / 'data')


def test_imagenetpath(tmp_path, refused):
    command = ('--dataset', 'ImageNet', '--imagenetpath', tmp_path / 'here')
    refused(1, tmp_path / 'here', train.main, *command)
    refused(1, tmp_path / 'root', train.main, *command, '--dataroot', tmp_path / 'root')


def test_broken_cifar(cifar, refuse):
    root = cifar('CIFAR10')
    path = root / 'cifar-10-batches-py' / 'data_batch_3'
    path.write_bytes(path.read_bytes()[:-100])
    refuse([path, 'MD5'], 'CIFAR10', root)
    path.unlink()
    refuse(['CIFAR10', root], 'CIFAR10', root)


def test_broken_svhn(svhn, refuse):
    path = svhn / 'test_32x32.mat'
    path.write_bytes(b'MATLAB 5.0')
    refuse([path, 'MD5'], 'SVHN', svhn)


def test_broken_fashion_mnist(fashion_mnist, refuse):
    [labels] = fashion_mnist.glob('t10k-labels*')
    whole = labels.read_bytes()
    labels.write_bytes(whole[:-3])
    refuse(labels, 'FashionMNIST', fashion_mnist)
    write_idx(labels, np.zeros(7))
    refuse(['7 labels', '20'], 'FashionMNIST', fashion_mnist)
    write_idx(labels, np.full(20, 11))
    refuse('Fashion-MNIST', 'FashionMNIST', fashion_mnist)
    labels.unlink()
    refuse('t10k-labels-idx1-ubyte', 'FashionMNIST', fashion_mnist)


@pytest.mark.parametrize('fashion_mnist', ['.gz'], indirect=True)
@pytest.mark.parametrize('fault', ['truncated', 'another content', 'not gzip'])
def test_broken_gzip(fault, fashion_mnist, refuse):
    [images] = fashion_mnist.glob('train-images*')
    content = images.read_bytes()
    broken = {
        'truncated': content[: len(content) // 2],
        'another content': gzip.compress(b'abc'),
        'not gzip': b'\x1f\x8bnothing',
    }
    images.write_bytes(broken[fault])
    refuse(images, 'FashionMNIST', fashion_mnist)


def test_folder_without_images(image_folder, tmp_path, refuse):
    shutil.rmtree(image_folder / 'val')
    refuse('val/', 'ImageNet', image_folder)
    (tmp_path / 'empty').mkdir()
    refuse(tmp_path / 'empty', 'ImageNet', tmp_path / 'empty')


@pytest.mark.parametrize('workers', [0, 1])
def test_unreadable_image_in_training(workers, image_folder, tmp_path, refused):
    bad = image_folder / 'train' / 'flower' / '0.jpg'
    bad.write_text('not an image')
    command = ['--dataset', 'ImageNet', '--dataroot', image_folder, '--save', tmp_path / 'run']
    options = ['--epochs', 1, '--batch_size', 4, '--nthread', workers]
    refused(1, bad, train.main, *command, *options)

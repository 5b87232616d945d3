"""A user's mistakes end in one line on stderr and exit status 1 or 2, never in a traceback."""

import gzip
import shutil
import socket

import cv2
import numpy as np
import pytest
import torch

from lab.runs import checkpoint
import train
from conftest import Malicious, python, write_idx
from diracnet import define_diracnet
from tools import export, predict


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """As on a machine without a network, and without waiting for one."""

    def refuse(*args, **kwargs):
        raise socket.gaierror(-2, 'Name or service not known')

    monkeypatch.setattr(socket, 'getaddrinfo', refuse)


@pytest.mark.parametrize(
    'arguments, words',
    [
        (['--dept', 34], '--dept'),
        (['--dep', 34], '--dep'),
        (['--depth', 'x'], 'x'),
        (['--depth', 0], '--depth'),
        (['--dataset', 'MNIST'], ['MNIST', 'digits']),
        (['--model', 'vgg'], ['vgg', 'diracnet']),
        (['--lr', 'nan'], ['--lr', 'nan']),
        (['--lr', '-1'], '--lr'),
        (['--width', '0'], '--width'),
        (['--epochs', '0'], '--epochs'),
        (['--batch_size', '1.5'], '1.5'),
        (['--epoch_step', '60'], ['60', 'JSON']),
        (['--epoch_step', '[60,'], 'JSON'),
        (['--epoch_step', '[60,30]'], 'rising'),
        (['--dtype', 'int'], 'int'),
        (['extra'], 'extra'),
        (['--dataset', 'digits', '--depth', 20], ['20', '6n + 4']),
        (['--dataset', 'digits', '--randomcrop_pad', 8], '--randomcrop_pad 8'),
        (['--dataset', 'digits', '--holdout', 1437], '--holdout 1437'),
        (['--dataset', 'digits', '--device', 'gpu'], 'gpu'),
        (['--dataset', 'digits', '--device', 'cpu', '--cuda'], '--cuda'),
        (['--dataset', 'digits', '--device', 'cpu', '--gpu_id', 0], '--gpu_id'),
        (['--dataset', 'digits', '--device', 'cpu', '--ngpu', 0], '--ngpu'),
        (['--dataset', 'digits', '--checkpoint_minutes', -1], '--checkpoint_minutes'),
        (['--dataset', 'digits', '--sync_bn', '--compile'], ['--sync_bn', '--compile']),
        (['--dataset', 'digits', '--device', 'cuda:99'], 'cuda:99'),
    ],
)
def test_bad_options(arguments, words, refused, tmp_path):
    refused(2, words, train.main, *arguments, '--save', tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_as_a_process():
    result = python('train.py', '--batchsize', 3)
    assert result.status == 2 and result.out == ''
    assert (
        result.err
        == 'train.py: unrecognized arguments: --batchsize 3 (see python train.py --help)\n'
    )
    result = python('-m', 'tools.predict', 'nowhere', 'nothing.png')
    assert result.status == 1 and result.err.count('\n') == 1 and 'nowhere' in result.err


@pytest.mark.parametrize('dataset', ['CIFAR10', 'CIFAR100', 'FashionMNIST', 'SVHN', 'ImageNet'])
def test_missing_data(dataset, tmp_path, refused):
    words = {
        'CIFAR10': 'cifar-10-batches-py',
        'CIFAR100': 'cifar-100-python',
        'FashionMNIST': 'train-images-idx3-ubyte',
        'SVHN': 'train_32x32.mat',
        'ImageNet': 'train/CLASS',
    }[dataset]
    refused(
        1,
        [words, tmp_path / 'data', '--dataset digits'],
        train.main,
        '--dataset',
        dataset,
        '--dataroot',
        tmp_path / 'data',
        '--save',
        tmp_path / 'run',
    )
    assert not (tmp_path / 'run').exists()


def test_imagenetpath(tmp_path, refused):
    refused(
        1,
        tmp_path / 'here',
        train.main,
        '--dataset',
        'ImageNet',
        '--imagenetpath',
        tmp_path / 'here',
    )
    refused(
        1,
        tmp_path / 'root',
        train.main,
        '--dataset',
        'ImageNet',
        '--imagenetpath',
        tmp_path / 'here',
        '--dataroot',
        tmp_path / 'root',
    )


def test_broken_cifar(cifar, tmp_path, refused):
    root = cifar('CIFAR10')
    path = root / 'cifar-10-batches-py' / 'data_batch_3'
    path.write_bytes(path.read_bytes()[:-100])
    refused(
        1,
        [path, 'MD5', 'put the folder'],
        train.main,
        '--dataroot',
        root,
        '--save',
        tmp_path / 'run',
    )
    path.unlink()
    refused(
        1,
        ['CIFAR10 is not whole', root],
        train.main,
        '--dataroot',
        root,
        '--save',
        tmp_path / 'run',
    )


def test_broken_svhn(svhn, tmp_path, refused):
    path = svhn / 'test_32x32.mat'
    path.write_bytes(b'MATLAB 5.0')
    refused(
        1,
        [path, 'MD5'],
        train.main,
        '--dataset',
        'SVHN',
        '--dataroot',
        svhn,
        '--save',
        tmp_path / 'run',
    )


def test_broken_fashion_mnist(fashion_mnist, tmp_path, refused):
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

    [labels] = fashion_mnist.glob('t10k-labels*')
    whole = labels.read_bytes()
    labels.write_bytes(whole[:-3])
    refuse(labels)
    write_idx(labels, np.zeros(7))
    refuse(['7 labels', '20'])
    write_idx(labels, np.full(20, 11))
    refuse('Fashion-MNIST')
    labels.unlink()
    refuse('t10k-labels-idx1-ubyte')


def test_folder_without_images(image_folder, tmp_path, refused):
    shutil.rmtree(image_folder / 'val')
    refused(
        1,
        image_folder / 'val',
        train.main,
        '--dataset',
        'ImageNet',
        '--dataroot',
        image_folder,
        '--save',
        tmp_path / 'run',
    )
    (tmp_path / 'empty').mkdir()
    refused(
        1, tmp_path / 'empty', train.main, '--dataset', 'ImageNet', '--dataroot', tmp_path / 'empty'
    )


def test_unreadable_image_in_training(image_folder, tmp_path, refused):
    bad = image_folder / 'train' / 'flower' / '0.jpg'
    bad.write_text('not an image')
    for workers in (0, 1):
        refused(
            1,
            bad,
            train.main,
            '--dataset',
            'ImageNet',
            '--dataroot',
            image_folder,
            '--nthread',
            workers,
            '--epochs',
            1,
            '--batch_size',
            4,
            '--save',
            tmp_path / f'run{workers}',
        )


def test_existing_run_is_never_overwritten(digits_run, refused):
    before = {file.name: file.read_bytes() for file in digits_run.iterdir()}
    refused(2, [digits_run, '--resume'], train.main, '--dataset', 'digits', '--save', digits_run)
    refused(2, '--depth', train.main, '--resume', digits_run, '--depth', 34, '--epochs', 20)
    refused(
        2, ['--lr', '0.5', '0.2'], train.main, '--resume', digits_run, '--lr', 0.5, '--epochs', 20
    )
    refused(2, ['8 epochs', '--epochs'], train.main, '--resume', digits_run)
    assert before == {file.name: file.read_bytes() for file in digits_run.iterdir()}


def test_folder_that_can_not_be_made(tmp_path, refused):
    (tmp_path / 'file').write_text('')
    refused(
        1, tmp_path / 'file', train.main, '--dataset', 'digits', '--save', tmp_path / 'file' / 'run'
    )


def everything_that_loads(path, tmp_path):
    return [
        (train.main, '--evaluate', path),
        (train.main, '--resume', path),
        (predict.main, path, __file__),
        (export.main, path, tmp_path / 'out.pth'),
    ]


def test_bad_checkpoints(digits_run, tmp_path, refused):
    whole = (digits_run / 'model.pt7').read_bytes()
    trap = tmp_path / 'trap'
    files = {
        'truncated.pt7': (whole[: len(whole) // 2], 'truncated'),
        'cut-early.pt7': (whole[:10], 'truncated'),
        'empty.pt7': (b'', 'empty.pt7'),
        'random.pt7': (np.random.default_rng(0).bytes(5000), 'no checkpoint'),
        'text.pt7': (b'hello world', 'no checkpoint'),
    }
    for name, (content, words) in files.items():
        (tmp_path / name).write_bytes(content)
    torch.save({'params': Malicious(trap)}, tmp_path / 'code.pt7')
    torch.save(Malicious(trap), tmp_path / 'old-code.pt7', _use_new_zipfile_serialization=False)
    torch.save([1, 2], tmp_path / 'list.pt7')
    torch.save({'params': {}}, tmp_path / 'nothing.pt7')
    torch.save({'a': torch.zeros(3)}, tmp_path / 'other.pt7')
    files.update(
        {
            'code.pt7': (None, 'run code'),
            'old-code.pt7': (None, 'run code'),
            'list.pt7': (None, 'list'),
            'nothing.pt7': (None, 'no checkpoint'),
            'other.pt7': (None, 'other.pt7'),
            'missing.pt7': (None, 'does not exist'),
        }
    )
    for name, (_, words) in files.items():
        path = tmp_path / name
        for main, *arguments in everything_that_loads(path, tmp_path):
            refused(1, [path, words], main, *arguments)
    assert not trap.exists() and not (tmp_path / 'out.pth').exists()
    # the trap is a real one: a loader that runs code makes the folder
    torch.load(tmp_path / 'code.pt7', weights_only=False)
    assert trap.exists()


def test_checkpoint_of_another_architecture(digits_run, tmp_path, refused):
    content = torch.load(digits_run / 'model.pt7', weights_only=True)
    key = 'group1.block1.conv'
    content['params'][key] = torch.zeros(32, 16, 3, 3)
    torch.save(content, tmp_path / 'model.pt7')
    words = [key, '(32, 16, 3, 3)', '(32, 32, 3, 3)']
    refused(1, words, train.main, '--evaluate', tmp_path / 'model.pt7')
    refused(
        1,
        words,
        train.main,
        '--resume',
        tmp_path / 'model.pt7',
        '--epochs',
        20,
        '--save',
        tmp_path / 'run',
    )
    refused(1, words, predict.main, tmp_path / 'model.pt7', __file__)
    for option, value in (
        ('--depth', 34),
        ('--width', 2),
        ('--dataset', 'CIFAR10'),
        ('--model', 'plain'),
    ):
        refused(2, [option, value], train.main, '--evaluate', digits_run, option, value)
        refused(2, [option, value], train.main, '--resume', digits_run, option, value)


def test_predict(digits_run, tmp_path, refused):
    text, empty, folder, good = (
        tmp_path / name for name in ('text.png', 'empty.jpg', 'folder', 'good.png')
    )
    text.write_text('not an image')
    empty.write_bytes(b'')
    folder.mkdir()
    cv2.imwrite(str(good), np.zeros((8, 8), np.uint8))
    (tmp_path / 'cut.png').write_bytes(good.read_bytes()[:30])
    for bad in (text, empty, folder, tmp_path / 'missing.png', tmp_path / 'cut.png'):
        result = refused(1, bad, predict.main, digits_run, good, bad)
        assert result.out == ''
    refused(2, 'IMAGE', predict.main, digits_run)
    refused(2, '--top', predict.main, digits_run, good, '--top', 0)
    refused(2, '--jsn', predict.main, digits_run, good, '--jsn')
    f, params = define_diracnet(10, 1, 'CIFAR10')
    torch.save({key: tensor.detach() for key, tensor in params.items()}, tmp_path / 'facts.pth')
    refused(1, '--dataset', predict.main, tmp_path / 'facts.pth', good)
    refused(1, '--dataset', predict.main, tmp_path / 'facts.pth', good, '--dataset', 'digits')


def test_export(digits_run, tmp_path, refused):
    refused(2, 'out.bin', export.main, digits_run, tmp_path / 'out.bin')
    (tmp_path / 'out.pth').write_text('mine')
    refused(2, ['out.pth', '--force'], export.main, digits_run, tmp_path / 'out.pth')
    assert (tmp_path / 'out.pth').read_text() == 'mine'
    refused(1, 'can not be written', export.main, digits_run, tmp_path / 'out.pth' / 'deeper.pth')


def test_gzip_that_is_none(fashion_mnist, tmp_path, refused):
    [images] = fashion_mnist.glob('train-images*')
    if images.suffix != '.gz':
        pytest.skip('about the gzipped ones')
    content = images.read_bytes()
    for broken in (content[: len(content) // 2], gzip.compress(b'abc'), b'\x1f\x8bnothing'):
        images.write_bytes(broken)
        refused(
            1,
            images,
            train.main,
            '--dataset',
            'FashionMNIST',
            '--dataroot',
            fashion_mnist,
            '--save',
            tmp_path / 'run',
        )


def test_load_error_names_are_one_line(tmp_path):
    from lab.errors import UserError

    with pytest.raises(UserError) as error:
        checkpoint.load(tmp_path / 'none')
    assert '\n' not in str(error.value)

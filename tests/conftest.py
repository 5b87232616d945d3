"""Shared by the tests: calling the programs as a user does, and small data sets in the real formats."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

if (
    'PYTEST_XDIST_WORKER' in os.environ
):  # tests run beside each other: a thread each, in the processes that they start, too
    os.environ.setdefault('OMP_NUM_THREADS', '1')

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
DEVICES = ['cpu', *(['cuda'] if torch.cuda.is_available() else [])]


@pytest.fixture
def call(capfd):
    """call(main, *args): a program's exit status, stdout and stderr, in this process (a traceback fails the test)."""
    from lab.errors import run

    def call(main, *args):
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit:
            run(lambda: main([str(arg) for arg in args]), 'program')
        captured = capfd.readouterr()
        return SimpleNamespace(status=exit.value.code or 0, out=captured.out, err=captured.err)

    return call


@pytest.fixture
def refused(call):
    """refused(status, words, main, *args): the program ends with that status and one line on stderr, which has the words."""

    def refused(status, words, main, *args):
        result = call(main, *args)
        lines = [line for line in result.err.splitlines() if line]
        assert result.status == status, result
        assert len(lines) == 1 and 'Traceback' not in result.err, result.err
        for word in words if isinstance(words, (list, tuple)) else [words]:
            assert str(word) in lines[0], lines[0]
        return result

    return refused


def start(*args, **kwargs):
    """python ARGS in the repository's root, as a real process."""
    return subprocess.Popen(
        [sys.executable, *map(str, args)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


def python(*args, **kwargs):
    process = start(*args, **kwargs)
    out, err = process.communicate(timeout=500)
    return SimpleNamespace(status=process.returncode, out=out, err=err)


def read_log(folder):
    lines = (Path(folder) / 'log.txt').read_text().splitlines()
    assert all(line.startswith('json_stats: ') for line in lines)
    return [json.loads(line.removeprefix('json_stats: ')) for line in lines]


def same(left, right):
    """Bitwise equality of two checkpoints' tensors, the optimizer's included."""
    left, right = (torch.load(folder / 'model.pt7', weights_only=True) for folder in (left, right))
    momenta = [
        [state['momentum_buffer'] for state in content['optimizer']['state'].values()]
        for content in (left, right)
    ]
    assert len(momenta[0]) == len(momenta[1]) > 0
    return (
        left['epoch'] == right['epoch']
        and list(left['params']) == list(right['params'])
        and all(torch.equal(left['params'][key], right['params'][key]) for key in left['params'])
        and all(map(torch.equal, *momenta))
    )


def without_times(folder):
    return [
        {
            key: value
            for key, value in line.items()
            if not key.endswith('_time') and key not in ('save', 'resume')
        }
        for line in read_log(folder)
    ]


@pytest.fixture(scope='session')
def digits_run(tmp_path_factory):
    """The folder of a short real run on digits."""
    folder = tmp_path_factory.mktemp('runs') / 'digits'
    result = python(
        'train.py', '--dataset', 'digits', '--epochs', 8, '--epoch_step', '[6]', '--save', folder
    )
    assert result.status == 0, result.err
    return folder


@pytest.fixture(scope='session')
def digit_files(tmp_path_factory):
    """The first 40 test digits as PNG files, named by their class."""
    import cv2

    from lab.data import datasets as data

    folder = tmp_path_factory.mktemp('digits')
    images, targets = data.load('digits', '.').test
    for i in range(40):
        cv2.imwrite(str(folder / f'{i:02}-{targets[i]}.png'), images[i].numpy())
    return folder


@pytest.fixture(scope='session')
def photographs():
    """scikit-learn's two photographs, RGB uint8 (427, 640, 3)."""
    from sklearn.datasets import load_sample_images

    return load_sample_images().images


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """cifar(name): a folder with a small CIFAR10 or CIFAR100 in torchvision's real format. As its files can't have the MD5 sums of the
    real ones, torchvision is told theirs."""
    from torchvision import datasets

    def make(name, n=20):
        reader = getattr(datasets, name)
        folder = tmp_path / 'data' / reader.base_folder
        folder.mkdir(parents=True)
        random = np.random.default_rng(0)

        def write(file_name, content):
            path = folder / file_name
            path.write_bytes(pickle.dumps(content, protocol=2))
            return hashlib.md5(path.read_bytes()).hexdigest()

        def batch(file_name):
            labels = random.integers(0, 10 if name == 'CIFAR10' else 100, n).tolist()
            data = random.integers(0, 256, (n, 3072)).astype(np.uint8)
            key = 'labels' if name == 'CIFAR10' else 'fine_labels'
            return [
                file_name,
                write(
                    file_name,
                    {'data': data, key: labels, 'filenames': [f'{i}.png' for i in range(n)]},
                ),
            ]

        for part in ('train_list', 'test_list'):
            monkeypatch.setattr(
                reader, part, [batch(file_name) for file_name, _ in getattr(reader, part)]
            )
        names = [f'class{i}' for i in range(10 if name == 'CIFAR10' else 100)]
        monkeypatch.setattr(
            reader,
            'meta',
            {**reader.meta, 'md5': write(reader.meta['filename'], {reader.meta['key']: names})},
        )
        return folder.parent

    return make


@pytest.fixture
def svhn(tmp_path, monkeypatch):
    """A folder with a small SVHN in its real format, MATLAB files."""
    from scipy.io import savemat
    from torchvision.datasets import SVHN

    folder = tmp_path / 'svhn'
    folder.mkdir()
    random = np.random.default_rng(0)
    split_list = {}
    for part, (url, file_name, _) in SVHN.split_list.items():
        savemat(
            folder / file_name,
            {
                'X': random.integers(0, 256, (32, 32, 3, 30)).astype(np.uint8),
                'y': np.arange(30)[:, None] % 10 + 1,
            },
        )
        split_list[part] = [
            url,
            file_name,
            hashlib.md5((folder / file_name).read_bytes()).hexdigest(),
        ]
    monkeypatch.setattr(SVHN, 'split_list', split_list)
    return folder


def write_idx(path, array):
    import gzip

    header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, '>i4').tobytes()
    with (gzip.open if path.suffix == '.gz' else open)(path, 'wb') as file:
        file.write(header + array.astype(np.uint8).tobytes())


@pytest.fixture(params=['', '.gz'])
def fashion_mnist(tmp_path, request):
    """A folder with a small Fashion-MNIST in its real format, plain and gzipped IDX files."""
    folder = tmp_path / 'fashion'
    folder.mkdir()
    random = np.random.default_rng(0)
    for part, n in (('train', 50), ('t10k', 20)):
        write_idx(
            folder / f'{part}-images-idx3-ubyte{request.param}',
            random.integers(0, 256, (n, 28, 28)),
        )
        write_idx(folder / f'{part}-labels-idx1-ubyte{request.param}', np.arange(n) % 10)
    return folder


@pytest.fixture
def image_folder(tmp_path, photographs):
    """train/CLASS and val/CLASS with JPEGs cut from the photographs."""
    import cv2

    folder = tmp_path / 'images'
    random = np.random.default_rng(0)
    for part, n in (('train', 4), ('val', 3)):
        for label, photograph in zip(('flower', 'temple'), reversed(photographs)):
            (folder / part / label).mkdir(parents=True)
            for i in range(n):
                top, left = random.integers(0, 120), random.integers(0, 140)
                cv2.imwrite(
                    str(folder / part / label / f'{i}.jpg'),
                    photograph[top : top + 300, left : left + 480, ::-1],
                )
    return folder


class Malicious:
    """Unpickling this with a loader that runs code makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)

"""Shared by the tests: the programs, called as a user does, and small data sets in real formats."""

import gzip
import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

if 'PYTEST_XDIST_WORKER' in os.environ:
    # Tests run in parallel: one thread each, in the processes that they start too.
    os.environ.setdefault('OMP_NUM_THREADS', '1')

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
DEVICES = ['cpu', *(['cuda'] if torch.cuda.is_available() else [])]

# A short run with random crops: 23 batches to train on and 6 to test on in each of 4 epochs.
SHORT_RUN = (
    *('--dataset', 'digits', '--depth', '10', '--epochs', '4', '--epoch_step', '[2,3]'),
    *('--randomcrop_pad', '1', '--seed', '3'),
)


# --- devices ---------------------------------------------------------------------------------


def pytest_addoption(parser):
    parser.addoption('--device', help='cpu or cuda, for tests that are marked for every device')


def pytest_generate_tests(metafunc):
    if 'device' in metafunc.fixturenames:
        chosen = metafunc.config.getoption('device')
        devices = [chosen] if chosen else DEVICES
        metafunc.parametrize('device', [pytest.param(d, marks=pytest.mark.device) for d in devices])


@pytest.fixture(autouse=torch.cuda.is_available())
def full_precision():
    """On a GPU, without TF32, and the same numbers at each repetition."""
    from lab import cuda

    cuda.set_up_for_equal_numbers()


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.name == 'test.py':  # each of its tests runs on all devices
            item.add_marker('device')


# --- calling the programs --------------------------------------------------------------------


@pytest.fixture
def call(capfd):
    """call(main, *args): a program's exit status, stdout and stderr, in this process.

    A traceback fails the test.
    """
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
    """refused(status, words, main, *args): the program ends with that status and with one line on
    stderr that has the words."""

    def refused(status, words, main, *args):
        result = call(main, *args)
        lines = [line for line in result.err.splitlines() if line]
        assert result.status == status, result
        assert len(lines) == 1 and 'Traceback' not in result.err, result.err
        for word in words if isinstance(words, (list, tuple)) else [words]:
            assert str(word) in lines[0], lines[0]
        return result

    return refused


def evaluate(call, *arguments):
    """What train.py --evaluate ARGUMENTS prints, as a dict."""
    import train

    result = call(train.main, '--evaluate', *arguments)
    assert result.status == 0 and result.err == '', result.err
    return json.loads(result.out.removeprefix('json_stats: '))


def start(*args, **kwargs):
    """A running process: python ARGS in the repository's root."""
    return subprocess.Popen(
        [sys.executable, *map(str, args)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


def python(*args, **kwargs):
    """Exit status, stdout and stderr of python ARGS in the repository's root."""
    process = start(*args, **kwargs)
    out, err = process.communicate(timeout=500)
    return SimpleNamespace(status=process.returncode, out=out, err=err)


def train_digits(folder, options=''):
    """Train on digits with `options`, a part of a command line; returns the lines of the log."""
    import train

    train.main(['--dataset', 'digits', *options.split(), '--save', str(folder)])
    return read_log(folder)


@pytest.fixture
def stop_at(monkeypatch):
    """stop_at(n, number): this process gets that signal in the n-th batch from now on, of training
    or test. stop_at(n, act=act): it calls act() instead."""
    from lab.training.passes import Meters

    add, left = Meters.add, {'n': 0}

    def counting_add(self, *args):
        add(self, *args)
        left['n'] -= 1
        if left['n'] == 0:
            left['act']()

    monkeypatch.setattr(Meters, 'add', counting_add)

    def stop_at(n, number=signal.SIGTERM, act=None):
        left.update(n=n, act=act or (lambda: os.kill(os.getpid(), number)))

    return stop_at


# --- runs ------------------------------------------------------------------------------------


def read_log(folder):
    """The lines of a run's log.txt as dicts."""
    lines = (Path(folder) / 'log.txt').read_text().splitlines()
    assert all(line.startswith('json_stats: ') for line in lines)
    return [json.loads(line.removeprefix('json_stats: ')) for line in lines]


def same(left, right):
    """Whether the checkpoints in two folders are bitwise equal, with the optimizer's momenta."""
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
    """The lines of a run's log without what differs between two equal runs."""
    return [
        {
            key: value
            for key, value in line.items()
            if not key.endswith(('_time', '_per_second')) and key not in ('save', 'resume')
        }
        for line in read_log(folder)
    ]


@pytest.fixture(scope='session')
def digits_run(tmp_path_factory):
    """The folder of a short real run on digits."""
    folder = tmp_path_factory.mktemp('runs') / 'digits'
    command = '--dataset digits --epochs 8 --epoch_step [6] --save'
    result = python('train.py', *command.split(), folder)
    assert result.status == 0, result.err
    return folder


@pytest.fixture(scope='session')
def short_run(tmp_path_factory):
    """The folder of SHORT_RUN, undisturbed."""
    import train

    folder = tmp_path_factory.mktemp('short') / 'run'
    train.main([*SHORT_RUN, '--save', str(folder)])
    return folder


@pytest.fixture
def stopped(short_run, tmp_path, stop_at):
    """A folder in which SHORT_RUN was stopped in its third epoch. Its previous checkpoint is from
    the end of the second."""
    import train

    stop_at(29 * 2 + 9)
    with pytest.raises(SystemExit):
        train.main([*SHORT_RUN, '--save', str(tmp_path / 'stopped')])
    return tmp_path / 'stopped'


# --- data ------------------------------------------------------------------------------------


@pytest.fixture(scope='session')
def digit_files(tmp_path_factory):
    """The first 40 test digits as PNG files, named by their class."""
    import cv2

    from lab.data import datasets

    folder = tmp_path_factory.mktemp('digits')
    images, targets = datasets.load('digits', '.').test
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
    """cifar(name): a folder with a small CIFAR10 or CIFAR100 in torchvision's real format.

    Its files cannot have the MD5 sums of the real ones, so torchvision's sums are replaced.
    """
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
            content = {'data': data, key: labels, 'filenames': [f'{i}.png' for i in range(n)]}
            return [file_name, write(file_name, content)]

        for part in ('train_list', 'test_list'):
            batches = [batch(file_name) for file_name, _ in getattr(reader, part)]
            monkeypatch.setattr(reader, part, batches)
        names = [f'class{i}' for i in range(10 if name == 'CIFAR10' else 100)]
        md5 = write(reader.meta['filename'], {reader.meta['key']: names})
        monkeypatch.setattr(reader, 'meta', {**reader.meta, 'md5': md5})
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
        images = random.integers(0, 256, (32, 32, 3, 30)).astype(np.uint8)
        savemat(folder / file_name, {'X': images, 'y': np.arange(30)[:, None] % 10 + 1})
        md5 = hashlib.md5((folder / file_name).read_bytes()).hexdigest()
        split_list[part] = [url, file_name, md5]
    monkeypatch.setattr(SVHN, 'split_list', split_list)
    return folder


def write_idx(path, array):
    """Write an array of bytes in the IDX format, gzipped if the path ends with .gz."""
    header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, '>i4').tobytes()
    with (gzip.open if path.suffix == '.gz' else open)(path, 'wb') as file:
        file.write(header + array.astype(np.uint8).tobytes())


@pytest.fixture(params=['', '.gz'])
def fashion_mnist(tmp_path, request):
    """A folder with a small Fashion-MNIST in its real format: IDX files, plain or gzipped."""
    folder = tmp_path / 'fashion'
    folder.mkdir()
    random = np.random.default_rng(0)
    for part, n in (('train', 50), ('t10k', 20)):
        images = random.integers(0, 256, (n, 28, 28))
        write_idx(folder / f'{part}-images-idx3-ubyte{request.param}', images)
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
    """A loader that runs code makes a folder when it unpickles this."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def deadline():
    """An exception instead of waiting for ever."""

    def expired(*_):
        raise TimeoutError

    signal.signal(signal.SIGALRM, expired)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


@pytest.fixture
def many_files(tmp_path, photographs):
    """A folder of 150 training and 20 test images of two classes, small PNGs."""
    import cv2

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

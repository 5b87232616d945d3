"""lab/errors.py: a user's mistake ends in one line on stderr and exit status 1 or 2, in every
program. The errors of one module are tested with that module."""

import os
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch

from conftest import ROOT, python
from diracnet import define_diracnet
from lab.errors import LONGEST, UserError, one_line, printable
from lab.runs import checkpoint
from tools import export, predict


def test_as_a_process():
    result = python('train.py', '--batchsize', 3)
    assert result.status == 2 and result.out == ''
    message = 'unrecognized arguments: --batchsize 3 (see python train.py --help)'
    assert result.err == f'train.py: {message}\n'
    result = python('-m', 'tools.predict', 'nowhere', 'nothing.png')
    assert result.status == 1 and result.err.count('\n') == 1 and 'nowhere' in result.err


def test_messages_have_one_line(tmp_path):
    with pytest.raises(UserError) as error:
        checkpoint.load(tmp_path / 'none')
    assert '\n' not in str(error.value)


def test_lines_have_a_limit_and_no_control_characters():
    assert one_line('a\n  b') == 'a b'
    assert one_line('red \x1b[31m') == 'red \\x1b[31m'
    assert printable('a\nb\u202e') == 'a\\nb\\u202e'
    line = one_line(f'the thing {"x" * 10**6} the remedy')
    assert line.startswith('the thing x') and line.endswith('x the remedy')
    assert len(line) < LONGEST + 10


def test_a_training_whose_output_cannot_be_written(tmp_path):
    options = '--dataset digits --depth 10 --width 0.25 --epochs 1 --device cpu --save'
    command = [sys.executable, 'train.py', *options.split(), str(tmp_path / 'run')]
    with open('/dev/full', 'w') as full:
        result = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 1 and 'No space left' in result.stderr
    assert (tmp_path / 'run' / 'model.pt7').exists()


def test_names_that_the_terminal_cannot_show(tmp_path):
    program = 'from lab.errors import run; run(lambda: print("\u00e4"), "program")'
    environment = {**os.environ, 'PYTHONIOENCODING': 'ascii'}
    command = [sys.executable, '-c', program]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout == '\\xe4\n'


@pytest.mark.parametrize('flags', [[], ['-u']])
def test_output_that_cannot_be_written(flags):
    """A full disk is one line; a reader that has ended is none."""
    program = 'from lab.errors import run; run(lambda: print("text"), "program")'
    command = [sys.executable, *flags, '-c', program]
    with open('/dev/full', 'w') as full:
        result = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 1 and result.stderr.count('\n') == 1
    assert 'No space left' in result.stderr
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert result.returncode == 1 and result.stderr == ''


@pytest.fixture
def good_image(tmp_path):
    cv2.imwrite(str(tmp_path / 'good.png'), np.zeros((8, 8), np.uint8))
    return tmp_path / 'good.png'


def test_predict(digits_run, good_image, tmp_path, refused):
    names = ('text.png', 'empty.jpg', 'cut.png', 'folder', 'missing.png')
    text, empty, cut, folder, missing = (tmp_path / name for name in names)
    text.write_text('not an image')
    empty.write_bytes(b'')
    cut.write_bytes(good_image.read_bytes()[:30])
    folder.mkdir()
    for bad in (text, empty, cut, folder, missing):
        result = refused(1, bad, predict.main, digits_run, good_image, bad)
        assert str(bad) not in result.out
    refused(2, 'IMAGE', predict.main, digits_run)
    refused(2, '--top', predict.main, digits_run, good_image, '--top', 0)
    refused(2, '--jsn', predict.main, digits_run, good_image, '--jsn')


def test_predict_without_facts(good_image, tmp_path, refused):
    """A state dict alone does not say how to turn an image file into an input."""
    params = define_diracnet(10, 1, 'CIFAR10')[1]
    path = tmp_path / 'bare.pth'
    torch.save({key: tensor.detach() for key, tensor in params.items()}, path)
    refused(1, '--dataset', predict.main, path, good_image)
    refused(1, '--dataset', predict.main, path, good_image, '--dataset', 'digits')


def test_export(digits_run, tmp_path, refused):
    refused(2, 'out.bin', export.main, digits_run, tmp_path / 'out.bin')
    path = tmp_path / 'out.pth'
    path.write_text('mine')
    refused(2, ['out.pth', '--force'], export.main, digits_run, path)
    assert path.read_text() == 'mine'
    refused(1, path / 'deeper.pth', export.main, digits_run, path / 'deeper.pth')

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
from lab.errors import LONGEST, one_line, printable
from tools import predict


def test_as_a_process():
    result = python('train.py', '--batchsize', 3)
    assert result.status == 2 and result.out == ''
    message = 'unrecognized arguments: --batchsize 3 (see python train.py --help)'
    assert result.err == f'train.py: {message}\n'


def test_lines_have_a_limit_and_no_control_characters():
    assert one_line('a\n  b') == 'a b'
    assert one_line('red \x1b[31m') == 'red \\x1b[31m'
    assert printable('a\nb\u202e') == 'a\\nb\\u202e'
    line = one_line(f'the thing {"x" * 10**6} the remedy')
    assert line.startswith('the thing x') and line.endswith('x the remedy')
    assert len(line) < LONGEST + 10


PROGRAM = """
import signal, sys
from lab.errors import UserError, run

def main():
    print('\u00e4')
    if 'fail' in sys.argv:
        raise UserError('a thing\\nhas no \u00e4')
    if 'interrupt' in sys.argv:
        signal.raise_signal(signal.SIGINT)

run(main, 'program')
"""


def run_program(*arguments, **kwargs):
    """PROGRAM on a terminal that knows ASCII alone."""
    return subprocess.run(
        [sys.executable, '-c', PROGRAM, *arguments],
        cwd=ROOT,
        env={**os.environ, 'PYTHONIOENCODING': 'ascii'},
        text=True,
        **{'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, **kwargs},
    )


@pytest.mark.parametrize(
    'how, status, error',
    [
        ('', 0, ''),
        ('fail', 1, 'program: a thing has no \\xe4\n'),
        ('interrupt', 130, 'program: interrupted\n'),
    ],
)
def test_ends(how, status, error):
    result = run_program(how)
    assert (result.returncode, result.stdout, result.stderr) == (status, '\\xe4\n', error)


@pytest.mark.parametrize('unbuffered', ['', '1'])
def test_output_that_cannot_be_written(unbuffered, monkeypatch):
    """A full disk is one line; a reader that has ended is none."""
    monkeypatch.setenv('PYTHONUNBUFFERED', unbuffered)
    with open('/dev/full', 'w') as full:
        result = run_program(stdout=full)
    assert result.returncode == 1 and result.stderr.count('\n') == 1
    assert 'No space left' in result.stderr
    read, write = os.pipe()
    os.close(read)
    result = run_program(stdout=write)
    os.close(write)
    assert result.returncode == 1 and result.stderr == ''


def test_predict(digits_run, tmp_path, refused):
    good, bare = tmp_path / 'good.png', tmp_path / 'bare.pth'
    cv2.imwrite(str(good), np.zeros((8, 8), np.uint8))
    (tmp_path / 'empty').mkdir()
    refused(1, tmp_path / 'empty', predict.main, digits_run, good, tmp_path / 'empty')
    refused(2, 'IMAGE', predict.main, digits_run)
    refused(2, '--top', predict.main, digits_run, good, '--top', 0)
    refused(2, '--jsn', predict.main, digits_run, good, '--jsn')
    # A state dict alone does not say how to turn an image file into an input.
    params = define_diracnet(10, 1, 'CIFAR10')[1]
    torch.save({key: tensor.detach() for key, tensor in params.items()}, bare)
    refused(1, '--dataset', predict.main, bare, good)
    refused(1, '--dataset', predict.main, bare, good, '--dataset', 'digits')

"""Normalization, and whitening with its cache."""

import cv2
import pytest
import torch
from data_helpers import small_set

import train
from conftest import read_log
from lab.data import datasets
from lab.data.preprocessing import normalize


def digits_whitening(root):
    return datasets.load('digits', '.').whitened(root).preprocessing.whitening


@pytest.mark.parametrize('name', ['CIFAR10', 'ImageNet'])
def test_normalization(name):
    pixels, _ = small_set(5)
    known = datasets.PREPROCESSING[name]
    expected = (pixels.double() - torch.tensor(known.mean)) / torch.tensor(known.std)
    expected = expected.permute(0, 3, 1, 2).float()
    torch.testing.assert_close(normalize(pixels, known), expected, rtol=1e-5, atol=1e-6)


def test_zca_whitens(tmp_path):
    data = datasets.load('digits', '.').whitened(tmp_path)
    x = next(iter(data.batches(True, batch_size=1437)))[0].permute(0, 2, 3, 1).flatten(1).double()
    flat = data.train[0].flatten(1).double()
    normalized = (flat - flat.mean(1, keepdim=True)) / flat.std(1, correction=0, keepdim=True)
    eigenvalues, vectors = torch.linalg.eigh(torch.cov(normalized.T, correction=0))
    # along the eigenvectors of the images, variances become eigenvalue / (eigenvalue + 0.1)
    covariance = vectors.T @ torch.cov(x.T, correction=0) @ vectors
    expected = torch.diag(eigenvalues / (eigenvalues + 0.1))
    torch.testing.assert_close(covariance, expected, rtol=0, atol=1e-4)
    # in the pixels' own axes (ZCA, not PCA): the matrix is symmetric
    matrix = data.preprocessing.whitening['matrix']
    torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-4)


def test_zca_cache_is_checked(tmp_path, capsys):
    whitening = digits_whitening(tmp_path)
    [cache] = tmp_path.iterdir()
    stamp = cache.stat().st_mtime_ns
    assert torch.equal(digits_whitening(tmp_path)['matrix'], whitening['matrix'])
    assert cache.stat().st_mtime_ns == stamp and capsys.readouterr().err == ''
    # other training images (the part that is not held out) have other statistics
    part = datasets.load('digits', '.').holdout(300).whitened(tmp_path).preprocessing.whitening
    assert len(list(tmp_path.iterdir())) == 2
    assert not torch.equal(part['matrix'], whitening['matrix'])
    whole = cache.read_bytes()
    flipped = whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:]
    for broken in (flipped, b'nothing', whole[:2000]):
        cache.write_bytes(broken)
        assert torch.equal(digits_whitening(tmp_path)['matrix'], whitening['matrix'])
        assert str(cache) in capsys.readouterr().err


def test_zca_cache_that_cannot_be_written_is_reported(tmp_path, monkeypatch, capsys):
    def full_disk(path, content):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('lab.data.preprocessing.write_atomically', full_disk)
    assert set(digits_whitening(tmp_path)) == {'mean', 'matrix'}
    error = capsys.readouterr().err
    assert str(tmp_path) in error and 'No space left' in error and len(error.splitlines()) == 1


def test_zca_trains_predicts_and_is_logged(tmp_path, call):
    from tools import predict

    root, run = tmp_path / 'data', tmp_path / 'run'
    root.mkdir()
    command = '--dataset digits --preprocess zca --epochs 8 --epoch_step [6]'
    train.main([*command.split(), '--dataroot', str(root), '--save', str(run)])
    assert {line['preprocess'] for line in read_log(run)} == {'zca'}
    assert read_log(run)[-1]['test_acc'] > 75
    pixels, targets = datasets.load('digits', '.').test
    for i in range(20):
        cv2.imwrite(str(tmp_path / f'{i}-{targets[i]}.png'), pixels[i].numpy())
    files = sorted(tmp_path.glob('*.png'))
    out = call(predict.main, run, *files, '--top', 1).out.splitlines()
    assert sum(line.split(': ')[0][-5] == line.split(': ')[1][0] for line in out) >= 14
    train.main(['--resume', str(run), '--epochs', '9'])
    assert len(read_log(run)) == 9

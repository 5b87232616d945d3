"""The table of data sets."""

import os

import pytest
from data_helpers import small_set

import diracparams
from lab.data import datasets
from lab.errors import OptionError


def test_table_has_the_data_sets_of_diracnet():
    assert list(datasets.SOURCES) == list(diracparams.DATASETS)
    for name, (_, channels, _) in diracparams.DATASETS.items():
        assert datasets.PREPROCESSING[name].channels == channels


def test_unknown_name_is_refused(tmp_path):
    with pytest.raises(OptionError, match='MNIST9'):
        datasets.load('MNIST9', tmp_path)


def test_digits_and_svhn_are_not_mirrored():
    mirrored = {name for name, row in datasets.SOURCES.items() if row.mirrored}
    assert mirrored == {'FashionMNIST', 'CIFAR10', 'CIFAR100'}
    assert not datasets.load('digits', '.').mirrored
    facts = datasets.PREPROCESSING['CIFAR10']
    for flip in (True, False):
        source = datasets.Data('CIFAR10', small_set(), small_set(), (), facts, mirrored=flip)
        train, test = (source.batches(mode, batch_size=9, pad=4) for mode in (True, False))
        assert train.flip == flip and train.pad == 4
        assert not test.flip and not test.pad


@pytest.mark.parametrize('name', ['digits', 'FashionMNIST'])
def test_constants_are_those_of_the_data(name):
    root = '/usr/share/datasets/fashion-mnist'
    if name == 'FashionMNIST' and not os.path.isdir(root):
        pytest.skip('needs the Debian package dataset-fashion-mnist')
    pixels = datasets.load(name, root).train[0].double()
    facts = datasets.PREPROCESSING[name]
    assert abs(pixels.mean() - facts.mean[0]) < 0.06 and abs(pixels.std() - facts.std[0]) < 0.06

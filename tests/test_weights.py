"""The trained networks in weights/: their files, their cards, and the ways to load them."""

import hashlib
import re

import cv2
import pytest
import torch

import diracparams
from conftest import ROOT
from diracnet import DiracNet, Network, diracnet
from diracparams import TRAINED
from lab.data import datasets
from lab.data.preprocessing import Preprocessing, normalize
from lab.errors import UserError
from lab.folded import compute_logits, top1
from tools import predict

WEIGHTS = ROOT / 'weights'
DATAROOTS = {'digits': '.', 'FashionMNIST': '/usr/share/datasets/fashion-mnist'}

each_network = pytest.mark.parametrize('dataset', TRAINED)


def card(dataset):
    """The table in a network's card, as a dict."""
    text = (WEIGHTS / f'{TRAINED[dataset].split("-")[0]}.md').read_text()
    return dict(re.findall(r'^\| (.+?) \| (.+?) \|$', text, re.MULTILINE)[1:])


@each_network
def test_files(dataset):
    name = TRAINED[dataset]
    content = (WEIGHTS / name).read_bytes()
    assert hashlib.sha256(content).hexdigest()[:8] == re.search(r'-(\w{8})\.pth', name)[1]
    assert card(dataset)['file'] == f'`{name}`'


@each_network
def test_accuracy(dataset):
    """That of the card, folded and not, with the preprocessing in the file."""
    try:
        images, targets = datasets.load(dataset, DATAROOTS[dataset], download=False).test
    except UserError as error:
        pytest.skip(str(error))
    said = float(re.match(r'([\d.]+) %', card(dataset)['test accuracy'])[1])
    for folded in (False, True):
        net = diracnet(dataset=dataset, pretrained=True, folded=folded).eval()
        assert type(net) is (DiracNet if folded else Network) and len(net.classes) == 10
        inputs = normalize(images, Preprocessing.from_dict(net.preprocessing))
        assert top1(compute_logits(net, inputs), targets) == pytest.approx(said, abs=0.011)


def test_predict_by_name(tmp_path, call):
    data = datasets.load('digits', '.')
    images, targets = data.test
    for index in range(10):
        cv2.imwrite(str(tmp_path / f'{index}.png'), images[index].numpy())
    result = call(predict.main, 'digits', tmp_path, '--top', '1')
    predicted = [line.split(': ')[1].split()[0] for line in result.out.splitlines()]
    expected = [data.classes[target] for target in targets[:10].tolist()]
    assert sum(a == b for a, b in zip(predicted, expected)) >= 9


def test_a_file_of_that_name_comes_first(tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'digits').write_text('mine')
    cv2.imwrite('one.png', torch.zeros(8, 8, 1, dtype=torch.uint8).numpy())
    refused(1, 'digits', predict.main, 'digits', 'one.png')


@pytest.mark.parametrize(
    'arguments',
    [
        {'dataset': 'CIFAR10', 'pretrained': True},
        {'dataset': 'digits', 'pretrained': True, 'depth': 10},
        {'dataset': 'digits', 'pretrained': True, 'num_classes': 3},
        {'dataset': 'digits'},
    ],
)
def test_wrong_arguments(arguments):
    with pytest.raises(ValueError):
        diracnet(**arguments)


def test_a_checkout_without_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(diracparams, '__file__', str(tmp_path / 'diracparams.py'))
    with pytest.raises(RuntimeError, match=TRAINED['digits']):
        diracnet(dataset='digits', pretrained=True)

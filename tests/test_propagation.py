"""How signals travel: the measurements, on networks whose answer is known."""

import csv

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.model_selection import LeaveOneOut, cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from test_signal_maths import outputs

from conftest import read_log
from lab.data import datasets
from lab.models.registry import define
from lab.runs.checkpoint import Checkpoint
from tools import propagation
from tools.study.__main__ import main as study_main

STUDY = """
title: A try
dataset: digits
seeds: [1]
keep: [1]
options: {depth: 10, width: 0.5}
recipes:
  digits: {epochs: 2, epoch_step: [2], lr: 0.1, weight_decay: 0.0005, batch_size: 200}
runs:
  - {model: diracnet}
table: [model]
figure: {signal: true}
"""


def fresh(model, depth, **scales):
    """The checkpoint of an untrained network."""
    torch.manual_seed(1)
    network = {'model': model, 'depth': depth, 'width': 1, 'dataset': 'digits'}
    _, params = define(**network, **scales)
    params = {key: tensor.detach() for key, tensor in params.items()}
    return Checkpoint('', params, network=network)


@pytest.fixture(scope='module')
def batch():
    return next(iter(datasets.load('digits', '.').batches(True, batch_size=100)))


def test_kept_is_numpys_correlation():
    stem, values = torch.randn(50, 3, 2, 2), torch.randn(50, 4, 2, 2)
    values[:, 0] = 1 - 2 * stem[:, 0]
    values[:, 1] = 7.0  # does not vary
    expected = np.corrcoef(stem[:, 2].flatten(), values[:, 2].flatten())[0, 1] ** 2
    assert propagation.kept(values, stem) == pytest.approx((1 + 0 + expected) / 3, abs=1e-5)
    larger = F.interpolate(stem, scale_factor=2)  # max-pooling gives stem again
    assert propagation.kept(stem, larger) == pytest.approx(1)


def test_nearest_neighbours_are_scikit_learns():
    images, targets = next(iter(datasets.load('digits', '.').batches(True, batch_size=60)))
    model = KNeighborsClassifier(1)
    hits = cross_val_score(model, images.flatten(1).numpy(), targets.numpy(), cv=LeaveOneOut())
    assert 0 < hits.mean() < 1
    for offset in (0, 1000):  # a common offset does not matter
        accuracy = propagation.neighbour_accuracy(images + offset, targets)
        assert accuracy == pytest.approx(hits.mean())


def test_some_layers_of_many_are_measured():
    assert list(propagation.measured_layers(97)) == list(range(1, 98))
    layers = propagation.measured_layers(997)
    assert len(layers) < 100 and layers[:5] == [1, 2, 3, 4, 5] and layers[-1] == 997


def expected_identity_share(params, name):
    """Of a fresh block: row i of its Dirac weight is e_i + 0.1 w / |w|, or 0.1 w / |w| beyond the
    number of inputs; batch norm multiplies it by its weight."""
    weight = params[name]
    energy = params[f'{name.removesuffix("conv")}bn.weight'].double() ** 2
    learned = 0.1 * F.normalize(weight.double().flatten(1), dim=1).view_as(weight)
    n = min(weight.shape[:2])
    diagonal = learned[:, :, 1, 1].diagonal()[:n]
    on = (energy[:n] * (1 + diagonal) ** 2).sum()
    off = (energy * (learned**2).sum((1, 2, 3))).sum() - (energy[:n] * diagonal**2).sum()
    return (on / (on + off)).item()


@pytest.mark.parametrize('model', ['diracnet', 'plain', 'diracnet-v1', 'plain-ncrelu'])
def test_measures_of_a_fresh_network(model, batch):
    checkpoint = fresh(model, 10)
    rows = propagation.measure(checkpoint, *batch)
    blocks = [f'group{g}.block{b}.conv' for g in range(3) for b in range(2)]
    assert [row['name'] for row in rows] == ['conv', *blocks]
    for row in rows[1:]:
        if model == 'diracnet':
            expected = expected_identity_share(checkpoint.params, row['name'])
            assert row['identity'] == pytest.approx(expected, rel=1e-4)
            assert (row['alpha'], row['beta']) == (1, pytest.approx(0.1))
        elif model == 'diracnet-v1':
            assert row['identity'] > 0.999
            assert (row['alpha'], row['beta']) == (5, pytest.approx(1e-3))
        else:
            assert row['identity'] < 0.05
            assert 'alpha' not in row
    for row in rows:
        assert row['gradient'] > 0
    f, _ = define(**checkpoint.network)
    for row, output in zip(rows, outputs(f, checkpoint.params, batch[0]), strict=True):
        is_version_1 = model in ('diracnet-v1', 'plain-ncrelu')
        expected = 1 if is_version_1 else (output > 0).double().mean().item()
        assert row['active'] == pytest.approx(expected)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_measures_of_other_types(dtype, batch):
    """They are those of the same values in float32, the type of the images."""
    rows = []
    for types in ([dtype], [dtype, torch.float32]):
        checkpoint = fresh('diracnet', 10)
        for one in types:
            checkpoint.params = {key: t.to(one) for key, t in checkpoint.params.items()}
        rows.append(propagation.measure(checkpoint, *batch))
    assert rows[0] == rows[1]


def test_gradients_are_those_of_the_outputs(batch):
    """That of the last batch norm, by its own formula, from the softmax of the logits."""
    checkpoint, (images, targets) = fresh('diracnet', 10), batch
    f, _ = define(**checkpoint.network)
    last = outputs(f, checkpoint.params, images)[-1]
    weight, bias = checkpoint.params['fc.weight'], checkpoint.params['fc.bias']
    logits = F.linear(last.relu().mean((2, 3)), weight, bias)
    grad = (logits.softmax(1) - F.one_hot(targets, 10)) / len(targets) @ weight
    expected = (grad[:, :, None, None] / last[0, 0].numel() * (last > 0)).norm()
    measured = propagation.measure(checkpoint, images, targets)[-1]['gradient']
    assert measured == pytest.approx(expected.item(), rel=1e-4)


def test_untrained_chains_that_differ_in_their_initialization(tmp_path, call):
    """The CSV names them by the options in which they differ."""
    scales = ('', '--bn_init shifted', '--bn_init 1,0.25 --beta 0.05', '--model plain')
    texts = [f'--dataset digits --depth 10 {scale}' for scale in scales]
    given = [word for text in texts for word in ('--untrained', text)]
    result = call(propagation.main, *given, '--out', tmp_path / 'x.png')
    assert result.status == 0, result.err
    rows = read_csv(tmp_path / 'x.csv')
    assert len(rows) == 4 * 7 and {row['epoch'] for row in rows} == {'0'}
    betas = {row['run']: float(row['beta'] or 0) for row in rows}
    assert betas == pytest.approx(
        {
            'diracnet-10, paper': 0.1,
            'diracnet-10, shifted': 10**-0.5,
            'diracnet-10, 1.0,0.25, beta 0.05': 0.05,
            'plain-10, paper': 0,
        },
        rel=1e-3,
    )
    assert all((tmp_path / f'x.{suffix}').stat().st_size > 5000 for suffix in ('png', 'svg'))


DIGITS = '--dataset digits --depth 10'


@pytest.mark.parametrize(
    'texts, status, word',
    [
        ([], 2, '--untrained'),
        ([DIGITS, DIGITS], 1, 'diracnet-10'),
        ([DIGITS, '--dataset FashionMNIST'], 1, 'FashionMNIST'),
        (["--save 'x"], 2, "--save 'x"),
        (['--dataset digits --model resnet'], 2, 'resnet'),
        (['--dataset digits --depth 11'], 2, '11'),
        ([f'{DIGITS} --beta 0'], 2, '--beta'),
        ([f'{DIGITS} --help'], 2, '--help'),
        ([f'{DIGITS} --recompute --compile'], 2, '--recompute'),
    ],
)
def test_what_is_no_chain(texts, status, word, tmp_path, refused):
    given = [argument for text in texts for argument in ('--untrained', text)]
    refused(status, word, propagation.main, *given, '--out', tmp_path / 'y.png')
    assert not list(tmp_path.glob('y*'))


def read_csv(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def test_a_study_of_signals(tmp_path, call, refused):
    (tmp_path / 'tiny.yaml').write_text(STUDY)
    out = tmp_path / 'out'
    result = call(study_main, tmp_path / 'tiny.yaml', '--out', out)
    assert result.status == 0, result.err
    run = out / 'diracnet' / 'seed1'
    assert len(read_log(run)) == 2
    assert [path.name for path in run.glob('epoch*')] == ['epoch1.pt7']
    assert torch.load(run / 'epoch1.pt7', weights_only=True)['epoch'] == 1
    assert all((out / f'figure.{suffix}').stat().st_size > 5000 for suffix in ('png', 'svg'))
    rows = read_csv(out / 'figure.csv')
    assert len(rows) == 3 * 7
    assert {row['epoch'] for row in rows} == {'0', '1', '2'}
    betas = {row['beta'] for row in rows if row['layer'] == '3'}
    assert len(betas) == 3  # they change in training

    # Only the logs are there, as in the repository: nothing is trained or drawn.
    for path in run.glob('*.pt7'):
        path.unlink()
    (out / 'figure.png').unlink()
    result = call(study_main, tmp_path / 'tiny.yaml', '--out', out)
    assert result.status == 0 and 'figure.png' in result.err
    assert not (out / 'figure.png').exists() and not list(run.glob('*.pt7'))
    refused(1, str(run), propagation.main, run, '--out', tmp_path / 'x.png')

"""How signals travel: the measurements, on networks whose answer is known."""

import csv

import pytest
import torch
import torch.nn.functional as F

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


def fresh(model, depth):
    """The checkpoint of an untrained network."""
    torch.manual_seed(1)
    network = {'model': model, 'depth': depth, 'width': 1, 'dataset': 'digits'}
    _, params = define(**network)
    params = {key: tensor.detach() for key, tensor in params.items()}
    return Checkpoint('', params, network=network)


@pytest.fixture(scope='module')
def batch():
    return next(iter(datasets.load('digits', '.').batches(True, batch_size=100)))


def test_correlations_are_numpys():
    one, other = torch.randn(50, 3, 2, 2), torch.randn(50, 3, 2, 2)
    other[:, 0] = 2 * one[:, 0] + 1
    other[:, 1, 0, 0] = 7.0  # does not vary
    found = propagation.correlations(one, other).view(3, 2, 2)
    assert torch.allclose(found[0], torch.ones((), dtype=torch.double))
    assert found[1, 0, 0].isnan()
    expected = torch.corrcoef(torch.stack([one[:, 2, 1, 0], other[:, 2, 1, 0]]))[0, 1]
    assert found[2, 1, 0].item() == pytest.approx(expected.item(), abs=1e-5)


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
    found = fresh(model, 10)
    rows = propagation.measure(found, *batch)
    blocks = [f'group{g}.block{b}.conv' for g in range(3) for b in range(2)]
    assert [row['name'] for row in rows] == ['conv', *blocks]
    for row in rows[1:]:
        if model == 'diracnet':
            expected = expected_identity_share(found.params, row['name'])
            assert row['identity'] == pytest.approx(expected, rel=1e-4)
            assert (row['alpha'], row['beta']) == (1, pytest.approx(0.1))
        elif model == 'diracnet-v1':
            assert row['identity'] > 0.999
            assert (row['alpha'], row['beta']) == (5, pytest.approx(1e-3))
        else:
            assert row['identity'] < 0.05
            assert 'alpha' not in row
    for row in rows:
        assert 0 < row['responding'] <= 1
        assert row['gradient'] > 0
        assert sum(row['correlation']) <= 1 + 1e-5


def test_gradients_are_those_of_the_outputs(batch):
    """That of the last batch norm, by its own formula, from the softmax of the logits."""
    found, (images, targets) = fresh('diracnet', 10), batch
    f, _ = define(**found.network)
    params = {key: tensor.clone() for key, tensor in found.params.items()}
    last = propagation.layer_outputs(f, params, images)[-1]
    weight, bias = params['fc.weight'], params['fc.bias']
    logits = F.linear(last.relu().mean((2, 3)), weight, bias)
    grad = (logits.softmax(1) - F.one_hot(targets, 10)) / len(targets) @ weight
    expected = (grad[:, :, None, None] / last[0, 0].numel() * (last > 0)).norm()
    measured = propagation.measure(found, images, targets)[-1]['gradient']
    assert measured == pytest.approx(expected.item(), rel=1e-4)


def test_dirac_weights_carry_a_signal_deeper(batch):
    dirac = propagation.measure(fresh('diracnet', 64), *batch)[-1]['responding']
    plain = propagation.measure(fresh('plain', 64), *batch)[-1]['responding']
    assert plain < 0.05 < 0.2 < dirac


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
    with open(out / 'figure.csv') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 7
    assert {row['epoch'] for row in rows} == {'0', '1', '2'}
    assert {row['alpha'] for row in rows if row['epoch'] == '0'} == {'', '1'}
    betas = {row['beta'] for row in rows if row['layer'] == '3'}
    assert len(betas) == 3  # they change in training

    # Only the logs are there, as in the repository: nothing is trained or drawn.
    figure = (out / 'figure.png').read_bytes()
    for path in run.glob('*.pt7'):
        path.unlink()
    result = call(study_main, tmp_path / 'tiny.yaml', '--out', out)
    assert result.status == 0
    assert 'figure.png' in result.err
    assert (out / 'figure.png').read_bytes() == figure
    refused(1, str(run), propagation.main, run, '--out', tmp_path / 'x.png')

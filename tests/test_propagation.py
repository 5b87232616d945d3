"""How signals travel: what is measured, on networks whose answer is known."""

import csv

import pytest
import torch
import torch.nn.functional as F

from lab.data import datasets as data
from lab.models import registry as resnet
from lab.runs.checkpoint import Checkpoint
from conftest import read_log
from tools import propagation, study

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
    torch.manual_seed(1)
    network = {'model': model, 'depth': depth, 'width': 1, 'dataset': 'digits'}
    return Checkpoint(
        '',
        {key: tensor.detach() for key, tensor in resnet.define(**network)[1].items()},
        False,
        network,
    )


@pytest.fixture(scope='module')
def batch():
    return next(iter(data.load('digits', '.').batches(True, batch_size=100)))


def test_correlations_are_numpys():
    one, other = torch.randn(50, 3, 2, 2), torch.randn(50, 3, 2, 2)
    other[:, 0] = 2 * one[:, 0] + 1
    other[:, 1, 0, 0] = 7.0  # doesn't vary
    found = propagation.correlations(one, other).view(3, 2, 2)
    assert torch.allclose(found[0], torch.ones((), dtype=torch.double)) and found[1, 0, 0].isnan()
    expected = torch.corrcoef(torch.stack([one[:, 2, 1, 0], other[:, 2, 1, 0]]))[0, 1]
    assert found[2, 1, 0].item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize('model', ['diracnet', 'plain', 'diracnet-v1', 'plain-ncrelu'])
def test_measures_of_a_fresh_network(model, batch):
    found = fresh(model, 10)
    rows = propagation.measure(found, *batch)
    assert [row['name'] for row in rows] == [
        'conv',
        *(f'group{g}.block{b}.conv' for g in range(3) for b in range(2)),
    ]
    for row in rows[1:]:
        weight = found.params[row['name']]
        if model == 'diracnet':
            # Row i is e_i + 0.1 w / |w|; rows beyond the number of inputs have no identity, and BN scales each by its weight.
            scale = found.params[row['name'][:-4] + 'bn.weight'].double() ** 2
            unit = 0.1 * F.normalize(weight.double().flatten(1), dim=1).view_as(weight)
            n = min(weight.shape[:2])
            central = unit[:, :, 1, 1].diagonal()[:n]
            on = scale[:n] * (1 + central) ** 2
            off = (scale * (unit**2).sum((1, 2, 3))).sum() - (scale[:n] * central**2).sum()
            assert row['identity'] == pytest.approx((on.sum() / (on.sum() + off)).item(), rel=1e-4)
            assert (row['alpha'], row['beta']) == (1, pytest.approx(0.1))
        elif model == 'diracnet-v1':
            assert row['identity'] > 0.999 and (row['alpha'], row['beta']) == (
                5,
                pytest.approx(1e-3),
            )
        else:
            assert row['identity'] < 0.05 and 'alpha' not in row
    assert all(
        0 < row['responding'] <= 1 and row['gradient'] > 0 and sum(row['correlation']) <= 1 + 1e-5
        for row in rows
    )


def test_gradients_are_those_of_the_outputs(batch):
    """The last batch norm's by its own formula, from the logits' softmax."""
    found, (images, targets) = fresh('diracnet', 10), batch
    f, _ = resnet.define(**found.network)
    outputs = propagation.layer_outputs(
        f, {key: tensor.clone() for key, tensor in found.params.items()}, images
    )
    logits = F.linear(
        outputs[-1].relu().mean((2, 3)), found.params['fc.weight'], found.params['fc.bias']
    )
    grad = (logits.softmax(1) - F.one_hot(targets, 10)) / len(targets) @ found.params['fc.weight']
    size = outputs[-1][0, 0].numel()
    expected = (grad[:, :, None, None] / size * (outputs[-1] > 0)).norm()
    assert propagation.measure(found, images, targets)[-1]['gradient'] == pytest.approx(
        expected.item(), rel=1e-4
    )


def test_dirac_weights_carry_a_signal_deeper(batch):
    last = {
        model: propagation.measure(fresh(model, 64), *batch)[-1] for model in ('diracnet', 'plain')
    }
    assert last['plain']['responding'] < 0.05 < 0.2 < last['diracnet']['responding']


def test_a_study_of_signals(tmp_path, call, refused):
    (tmp_path / 'tiny.yaml').write_text(STUDY)
    out = tmp_path / 'out'
    result = call(study.main, tmp_path / 'tiny.yaml', '--out', out)
    assert result.status == 0, result.err
    run = out / 'diracnet' / 'seed1'
    assert len(read_log(run)) == 2 and sorted(path.name for path in run.glob('epoch*')) == [
        'epoch1.pt7'
    ]
    assert torch.load(run / 'epoch1.pt7', weights_only=True)['epoch'] == 1
    assert all((out / f'figure.{suffix}').stat().st_size > 5000 for suffix in ('png', 'svg'))
    with open(out / 'figure.csv') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 7 and {row['epoch'] for row in rows} == {'0', '1', '2'}
    assert {row['alpha'] for row in rows if row['epoch'] == '0'} == {'', '1'}
    scales = [row['beta'] for row in rows if row['layer'] == '3']
    assert len(set(scales)) == 3  # they develop
    # Logs alone, as they are committed: nothing is trained, and the figure stays.
    drawn = (out / 'figure.png').read_bytes()
    for path in out.glob('*/seed1/*.pt7'):
        path.unlink()
    result = call(study.main, tmp_path / 'tiny.yaml', '--out', out)
    assert (
        result.status == 0
        and 'checkpoints' in result.err
        and (out / 'figure.png').read_bytes() == drawn
    )
    refused(
        1,
        'does not exist',
        propagation.main,
        out / 'diracnet' / 'seed1',
        '--out',
        tmp_path / 'x.png',
    )

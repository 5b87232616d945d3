"""What a recipe's options do: smoothing, averages, cutout, flips in tests; and stops with all."""

import os
import signal

import numpy as np
import pytest
import torch
from data_helpers import epoch_of, small_set

import train
from conftest import evaluate, python, read_log, same, train_digits, without_times
from diracnet import Network, define_diracnet
from lab.data import datasets
from lab.folded import compute_logits
from lab.runs import checkpoint
from lab.training import recalibration
from lab.training.options import complete
from lab.training.passes import ProgressBar
from tools import export, predict

SHORT = '--depth 10 --width 0.5 --epochs 2'
ALL = (
    f'{SHORT} --schedule cosine --warmup ramp:0.5e --label_smoothing 0.1 --clip 1 --ema 0.9 '
    '--cutout 3 --tta flip --randomcrop_pad 1 --recalibrate_bn'
)
ONE_BATCH = 64 * 8 * 8  # pixels, for the recalibration


# --- the loss --------------------------------------------------------------------------------


class Fixed(torch.nn.Module):
    """A network with these logits for images, and others for their mirror images."""

    def __init__(self, logits, mirrored):
        super().__init__()
        self.logits, self.mirrored = logits, mirrored

    def forward(self, inputs):
        return self.logits if inputs[0, 0, 0, 0] == 0 else self.mirrored


def test_loss():
    random = np.random.default_rng(0)
    logits, mirrored = random.normal(size=(2, 6, 4))
    targets = random.integers(0, 4, 6)
    inputs = torch.arange(8.0).expand(6, 1, 2, 8)
    given = {'dataset': 'digits', 'label_smoothing': 0.3, 'tta': 'flip', 'dtype': 'double'}
    options = complete(given)
    net = Fixed(*map(torch.from_numpy, (logits, mirrored)))

    def loss(logits, smoothing):
        wanted = np.full((6, 4), smoothing / 4)
        wanted[np.arange(6), targets] += 1 - smoothing
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        return -(wanted * log_p).sum(1).mean()

    found, outputs = train.loss_and_logits(net, inputs, torch.from_numpy(targets), options)
    assert found.item() == pytest.approx(loss(logits, 0.3)) and outputs is net.logits
    found, outputs = train.loss_and_logits(net.eval(), inputs, torch.from_numpy(targets), options)
    mean = (logits + mirrored) / 2
    assert found.item() == pytest.approx(loss(mean, 0))
    np.testing.assert_allclose(outputs.numpy(), mean)


# --- moving averages -------------------------------------------------------------------------


@pytest.fixture(scope='module')
def full_run(tmp_path_factory):
    """With all of these options."""
    folder = tmp_path_factory.mktemp('full') / 'run'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recalibration, 'PIXELS', ONE_BATCH)
        train_digits(folder, ALL)
    return folder


def test_averages(tmp_path, monkeypatch):
    """Each step moves them by a tenth of the way to the parameters; the first takes these."""
    expected, step = [], torch.optim.SGD.step

    def averaging_step(self, *args, **kwargs):
        step(self, *args, **kwargs)
        new = [p.detach().double() for group in self.param_groups for p in group['params']]
        old = expected or new
        expected[:] = [0.9 * average + 0.1 * tensor for average, tensor in zip(old, new)]

    monkeypatch.setattr(torch.optim.SGD, 'step', averaging_step)
    train_digits(tmp_path / 'run', f'{SHORT} --ema 0.9')
    named = Network(*define_diracnet(10, 0.5, 'digits')).named_parameters()
    names = [name for name, _ in sorted(named, key=lambda item: item[1].ndim == 1)]
    averages = checkpoint.load(tmp_path / 'run').ema
    assert len(names) == len(expected)
    for name, tensor in zip(names, expected):
        torch.testing.assert_close(averages[name].double(), tensor, rtol=1e-3, atol=1e-5)


def test_averages_have_statistics_of_their_own(tmp_path):
    """Averages over a hundred steps, in which the weights change much, test well."""
    options = '--depth 10 --width 0.5 --epochs 12 --ema 0.99 --bn_momentum cumulative'
    train_digits(tmp_path / 'run', options)
    assert read_log(tmp_path / 'run')[-1]['ema_test_acc'] > 90


def test_evaluate_predict_and_export_take_either(full_run, digit_files, tmp_path, call):
    last = read_log(full_run)[-1]
    assert last['ema_test_acc'] != last['test_acc']
    for flags, weights, accuracy in (
        ((), 'raw', last['test_acc']),
        (('--ema',), 'averaged', last['ema_test_acc']),
    ):
        line = evaluate(call, full_run, *flags)
        assert (line['weights'], line['test_acc'], line['tta']) == (weights, accuracy, 'flip')
        out = tmp_path / f'{weights}.pth'
        assert f'{weights} weights' in call(export.main, full_run, out, *flags).out
        found = predict.load(predict.parse_arguments([str(full_run), '.', *flags]))
        images = torch.randn(3, 1, 8, 8)
        expected = compute_logits(checkpoint.load(out).fold(), images)
        np.testing.assert_allclose(compute_logits(found.net, images), expected, atol=1e-6)
        result = call(predict.main, full_run, digit_files, '--json', *flags)
        assert result.status == 0 and ('raw' in result.err) == (not flags)


def test_no_averages(digits_run, tmp_path, refused):
    refused(1, '--ema', train.main, '--evaluate', digits_run, '--ema')
    refused(1, '--ema', predict.main, digits_run, __file__, '--ema')
    refused(1, '--ema', export.main, digits_run, tmp_path / 'out.pth', '--ema')


# --- a run that is stopped -------------------------------------------------------------------

# An epoch has 23 batches to train on; then twice 23 to recalibrate and 6 to test on.
STOPS = {
    23: 'after the last step',
    24: 'in the recalibration',
    49: 'in the test',
    60: 'in the recalibration of the averages',
    81: 'in the last batch of their test',
    91: 'in the next epoch',
}


def count_batches(patch, left, number):
    """Send this process a signal after so many batches of any kind."""

    def update(bar, n):
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), number)

    patch.setattr(ProgressBar, 'update', update)
    patch.setattr(recalibration, 'PIXELS', ONE_BATCH)


@pytest.mark.parametrize('batch', STOPS)
def test_a_stopped_run_resumes_exactly(batch, full_run, tmp_path, call, monkeypatch):
    folder = tmp_path / 'run'
    count_batches(monkeypatch, batch, signal.SIGTERM)
    result = call(train.main, '--dataset', 'digits', *ALL.split(), '--save', folder)
    assert result.status == 143 and result.err == ''
    check_resumed(folder, full_run, (1, 10) if batch == 91 else (0, 23))


KILLED = """
import signal, sys
import train
from pytest import MonkeyPatch
sys.path.insert(0, 'tests')
from test_recipe import count_batches

count_batches(MonkeyPatch(), 30, signal.SIGKILL)
train.main(sys.argv[1:])
"""


def test_a_killed_run_resumes_exactly(full_run, tmp_path, monkeypatch):
    """Killed in the recalibration, before a test."""
    folder = tmp_path / 'run'
    killed = python('-c', KILLED, '--dataset', 'digits', *ALL.split(), '--save', folder)
    assert killed.status == -signal.SIGKILL, killed.err
    monkeypatch.setattr(recalibration, 'PIXELS', ONE_BATCH)
    check_resumed(folder, full_run, (0, 23))


def check_resumed(folder, full_run, position):
    """Compare a run that stopped at this position with an undisturbed one, after the end."""
    found = checkpoint.load(folder)
    assert (found.epoch, found.progress['step']) == position
    train.main(['--resume', str(folder)])
    assert same(full_run, folder)
    assert without_times(full_run) == without_times(folder)
    one, other = (checkpoint.load(path).ema for path in (full_run, folder))
    assert all(torch.equal(one[key], other[key]) for key in one)


# --- cutout ----------------------------------------------------------------------------------


def cut_batches(train=True, cutout=5):
    images = small_set(200, 12)
    data = datasets.Data('SVHN', images, images, (), datasets.PREPROCESSING['SVHN'])
    return data.batches(train, batch_size=64, seed=3, cutout=cutout)


def test_cutout():
    inputs, indices = epoch_of(cut_batches(), 5)
    whole, same_indices = epoch_of(cut_batches(cutout=0), 5)
    assert torch.equal(indices, same_indices) and (whole != 0).all()
    corners = set()
    for cut, image in zip(inputs, whole):
        mask = cut == 0
        assert torch.equal(cut[~mask], image[~mask])
        rows, columns = (mask[0].any(axis).nonzero().flatten().tolist() for axis in (1, 0))
        for places in (rows, columns):  # 5 pixels, or fewer at the border
            assert 3 <= len(places) <= 5 and (len(places) == 5 or {0, 11} & set(places))
        square = torch.zeros_like(mask)
        square[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
        assert torch.equal(mask, square)
        corners.add((rows[0], columns[0]))
    assert len(corners) > 50  # of 100
    assert not torch.equal(epoch_of(cut_batches(), 6)[0], inputs)
    assert (epoch_of(cut_batches(train=False), 5)[0] != 0).all()

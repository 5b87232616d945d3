"""What a recipe's options do: schedules, smoothing, clipping, averages, cutout, flips in tests."""

import json

import numpy as np
import pytest
import torch
from data_helpers import epoch_of, small_set

import train
from conftest import read_log, same, train_digits, without_times
from lab.data import datasets
from lab.folded import compute_logits
from lab.runs import checkpoint
from lab.runs.recorder import Recorder
from lab.training.optimizers import learning_rate
from lab.training.options import complete
from tools import export, predict

SHORT = '--depth 10 --width 0.5 --epochs 2'
ALL = (
    f'{SHORT} --schedule cosine --warmup ramp:10 --label_smoothing 0.1 --clip 1 --ema 0.9 '
    '--cutout 3 --tta flip'
)


# --- the learning rate -----------------------------------------------------------------------


def rates(epoch_steps, **given):
    options = complete({'dataset': 'digits', 'lr': 0.4, **given})
    steps = range(options['epochs'] * epoch_steps)
    return [learning_rate(options, step, epoch_steps) for step in steps]


def rates_of_torch(make_scheduler, n):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.4)
    scheduler, found = make_scheduler(optimizer), []
    for _ in range(n):
        found.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        scheduler.step()
    return found


def test_schedules():
    """Those of torch with the same names."""
    scheduler = torch.optim.lr_scheduler
    found = rates(5, epochs=4, schedule='cosine')
    expected = rates_of_torch(lambda sgd: scheduler.CosineAnnealingLR(sgd, T_max=20), 20)
    assert found == pytest.approx(expected)
    found = rates(5, epochs=4, schedule='linear', warmup='ramp:6')
    expected = rates_of_torch(lambda sgd: scheduler.LinearLR(sgd, 1 / 6, 1, total_iters=5), 6)
    expected += rates_of_torch(lambda sgd: scheduler.LinearLR(sgd, 1, 0, total_iters=14), 14)
    assert found == pytest.approx(expected)


def test_warmup_and_steps():
    found = rates(5, epochs=4, epoch_step=[3], warmup='ramp:2')
    assert found == pytest.approx([0.2] + 9 * [0.4] + 10 * [0.08])
    found = rates(5, epochs=4, epoch_step=[3], warmup=2)
    assert found == pytest.approx(2 * [0.004] + 8 * [0.4] + 10 * [0.08])


# --- loss and gradients ----------------------------------------------------------------------


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

    found, outputs = train.forward(net, inputs, torch.from_numpy(targets), options)
    assert found.item() == pytest.approx(loss(logits, 0.3)) and outputs is net.logits
    found, outputs = train.forward(net.eval(), inputs, torch.from_numpy(targets), options)
    mean = (logits + mirrored) / 2
    assert found.item() == pytest.approx(loss(mean, 0))
    np.testing.assert_allclose(outputs.numpy(), mean)


@pytest.fixture
def steps(monkeypatch):
    """What SGD saw and made in each step: (norm of all gradients, parameters in double)."""
    found, step = [], torch.optim.SGD.step

    def recording_step(self, *args, **kwargs):
        parameters = [p for group in self.param_groups for p in group['params']]
        norm = torch.cat([p.grad.flatten() for p in parameters]).norm().item()
        result = step(self, *args, **kwargs)
        found.append((norm, [p.detach().double().numpy().copy() for p in parameters]))
        return result

    monkeypatch.setattr(torch.optim.SGD, 'step', recording_step)
    return found


def test_clip(tmp_path, steps):
    train_digits(tmp_path / 'free', SHORT)
    norms = [norm for norm, _ in steps]
    limit = float(np.median(norms))
    steps.clear()
    train_digits(tmp_path / 'clipped', f'{SHORT} --clip {limit}')
    clipped = np.array([norm for norm, _ in steps])
    assert clipped.max() <= 1.0001 * limit and (clipped < 0.99 * limit).any()
    assert clipped[0] == pytest.approx(min(norms[0], limit), rel=1e-4)


# --- moving averages -------------------------------------------------------------------------


@pytest.fixture(scope='module')
def averaged_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp('averaged') / 'run'
    train_digits(folder, ALL)
    return folder


def test_averages(tmp_path, steps):
    train_digits(tmp_path / 'run', f'{SHORT} --ema 0.9')
    content = torch.load(tmp_path / 'run' / 'model.pt7', weights_only=True)
    _, expected = steps[0]
    for _, parameters in steps[1:]:
        expected = [0.9 * old + 0.1 * new for old, new in zip(expected, parameters)]
    by_content = dict(zip((p.astype(np.float32).tobytes() for p in steps[-1][1]), expected))
    learned = 0
    for key, tensor in content['params'].items():
        wanted = by_content.get(tensor.numpy().tobytes())
        if wanted is not None:
            np.testing.assert_allclose(content['ema'][key].numpy(), wanted, rtol=1e-3, atol=1e-5)
            learned += 1
    assert learned == len(expected)


def test_averages_have_statistics_of_their_own(tmp_path):
    """Averages over a hundred steps, in which the weights change much, test well."""
    options = '--depth 10 --width 0.5 --epochs 12 --ema 0.99 --bn_momentum cumulative'
    train_digits(tmp_path / 'run', options)
    assert read_log(tmp_path / 'run')[-1]['ema_test_acc'] > 90


def test_evaluate_predict_and_export_take_either(averaged_run, digit_files, tmp_path, call):
    last = read_log(averaged_run)[-1]
    assert last['ema_test_acc'] != last['test_acc']
    for flags, weights, accuracy in (
        ((), 'raw', last['test_acc']),
        (('--ema',), 'averaged', last['ema_test_acc']),
    ):
        result = call(train.main, '--evaluate', averaged_run, *flags)
        line = json.loads(result.out.removeprefix('json_stats: '))
        assert (line['weights'], line['test_acc'], line['tta']) == (weights, accuracy, 'flip')
        out = tmp_path / f'{weights}.pth'
        assert f'{weights} weights' in call(export.main, averaged_run, out, *flags).out
        found = predict.load(predict.parse_arguments([str(averaged_run), '.', *flags]))
        images = torch.randn(3, 1, 8, 8)
        expected = compute_logits(checkpoint.load(out).fold(), images)
        np.testing.assert_allclose(compute_logits(found.net, images), expected, atol=1e-6)
        result = call(predict.main, averaged_run, digit_files, '--json', *flags)
        assert result.status == 0 and ('raw' in result.err) == (not flags)


def test_no_averages(digits_run, tmp_path, refused):
    words = ['model.pt7', '--ema']
    refused(1, words, train.main, '--evaluate', digits_run, '--ema')
    refused(1, words, predict.main, digits_run, __file__, '--ema')
    refused(1, words, export.main, digits_run, tmp_path / 'out.pth', '--ema')


def test_a_stopped_run_resumes_exactly(averaged_run, tmp_path, monkeypatch):
    """With all of these options, from the middle of an epoch."""
    cut, calls, save_if_due = tmp_path / 'run', [], Recorder.save_if_due

    def stop(self, epoch, measure_progress):
        calls.append(epoch)
        if len(calls) == 45:
            self.stop.signal = 15
        save_if_due(self, epoch, measure_progress)

    monkeypatch.setattr(Recorder, 'save_if_due', stop)
    with pytest.raises(SystemExit):
        train_digits(cut, ALL)
    found = checkpoint.load(cut)
    assert found.epoch == 1 and found.progress['step'] < 23
    train.main(['--resume', str(cut)])
    assert same(averaged_run, cut)
    assert without_times(averaged_run) == without_times(cut)
    one, other = (checkpoint.load(folder).ema for folder in (averaged_run, cut))
    assert all(torch.equal(one[key], other[key]) for key in one)


# --- cutout ----------------------------------------------------------------------------------


def cut_batches(train=True, **kwargs):
    images, targets = small_set(200, 12)
    source = datasets.Data(
        'SVHN', (images, targets), (images, targets), (), datasets.PREPROCESSING['SVHN']
    )
    return source.batches(train, **{'batch_size': 64, 'seed': 3, 'cutout': 5, **kwargs})


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
    by_index = {int(index): image for image, index in zip(inputs, indices)}
    others, indices = epoch_of(cut_batches(batch_size=7, shard=(1, 2)), 5)
    assert all(torch.equal(image, by_index[int(i)]) for image, i in zip(others, indices))
    assert not torch.equal(epoch_of(cut_batches(), 6)[0], inputs)
    assert (epoch_of(cut_batches(train=False), 5)[0] != 0).all()


def test_cutout_of_image_files(image_folder, tmp_path, refused):
    arguments = ['--dataset', 'folder', '--dataroot', image_folder, '--image_size', 64]
    refused(2, '--cutout', train.main, *arguments, '--cutout', 4, '--save', tmp_path / 'run')

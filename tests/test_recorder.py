"""lab/runs/recorder.py: losses that are not finite, and numbers for TensorBoard."""

import shutil

import pytest

import train
from conftest import read_log, train_digits
from lab.runs import checkpoint


def test_loss_that_is_not_finite(tmp_path, refused):
    """The learning rate rises to 1e30 in the third epoch; the run stops with a good checkpoint."""
    folder = tmp_path / 'run'
    options = (
        '--dataset digits --depth 10 --lr 1e-3 --lr_decay_ratio 1e33 --epoch_step [3] --epochs 6 '
        '--checkpoint_minutes 0.001'
    )
    words = ['the loss is', 'of epoch 3', folder / 'model.pt7', 'epoch 2']
    result = refused(1, words, train.main, *options.split(), '--save', folder)
    loaded = checkpoint.load(folder)
    assert loaded.position in result.err
    assert all(tensor.isfinite().all() for tensor in loaded.params.values())
    assert [line['epoch'] for line in read_log(folder)] == [1, 2]

    again = tmp_path / 'again'
    shutil.copytree(folder, again)  # it resumes to the same end
    refused(1, ['the loss is', 'of epoch 3', again], train.main, '--resume', again)


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / 'run'
    options = '--depth 10 --tensorboard --resume auto'
    train_digits(folder, f'{options} --epochs 2')
    log = train_digits(folder, f'{options} --epochs 3')
    events = EventAccumulator(str(folder)).Reload()
    for tag, key in (('loss/train', 'train_loss'), ('acc/test', 'test_acc')):
        expected = [(line['epoch'], pytest.approx(line[key])) for line in log]
        assert [(event.step, event.value) for event in events.Scalars(tag)] == expected

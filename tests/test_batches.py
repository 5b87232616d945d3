"""Order and augmentation: the same pixels every time, and the distributions they come from."""

import numpy as np
import pytest
import torch
from data_helpers import epoch_of, folder_batches, small_set
from scipy.stats import chi2_contingency, chisquare
from torch.utils._python_dispatch import TorchDispatchMode

from lab.data import datasets


def cifar_like(n=300, **kwargs):
    data = datasets.Data(
        'CIFAR10', small_set(n), small_set(50), (), datasets.PREPROCESSING['CIFAR10'], mirrored=True
    )
    return data.batches(True, **{'batch_size': 64, 'seed': 3, 'pad': 4, **kwargs})


# --- the same pixels --------------------------------------------------------------------------


def test_pixels_of_a_folder_do_not_depend_on_workers_or_history(image_folder):
    expected = {epoch: epoch_of(folder_batches(image_folder), epoch) for epoch in (1, 2)}
    assert not torch.equal(expected[1][0], expected[2][0])
    for workers in (0, 1, 4):
        batches = folder_batches(image_folder, workers=workers)
        for epoch in (2, 1, 2):  # in any order, as after a resume
            for actual, wanted in zip(epoch_of(batches, epoch), expected[epoch]):
                assert torch.equal(actual, wanted)
    other_seed = epoch_of(folder_batches(image_folder, seed=4), 1)
    assert not torch.equal(other_seed[0], expected[1][0])


@pytest.mark.parametrize('world', [2, 3])
def test_each_process_has_its_share_of_every_batch_of_a_folder(world, image_folder):
    inputs, targets = epoch_of(folder_batches(image_folder), 1)
    shards = [folder_batches(image_folder, shard=(rank, world)) for rank in range(world)]
    for shard in shards:
        shard.epoch = 1
    position = 0
    for parts in zip(*shards):
        batch = slice(position, position + 5)
        for rank, (x, y) in enumerate(parts):
            assert torch.equal(x, inputs[batch][rank::world])
            assert torch.equal(y, targets[batch][rank::world])
        position += 5
    assert position >= 8


def test_pixels_in_memory_do_not_depend_on_history_or_batch_size(device):
    inputs, targets = epoch_of(cifar_like(device=device), 5)
    assert inputs.shape == (300, 3, 32, 32) and sorted(targets.tolist()) == list(range(300))
    again = cifar_like(device=device)
    epoch_of(again, 4)
    for actual, wanted in zip(epoch_of(again, 5), (inputs, targets)):
        assert torch.equal(actual, wanted)
    # the augmentation is a function of the sample, whatever the batch size or the order
    by_index = {int(y): x for x, y in zip(inputs, targets)}
    for x, y in zip(*epoch_of(cifar_like(device=device, batch_size=7), 5)):
        assert torch.equal(by_index[int(y)], x)
    next_epoch = zip(*epoch_of(cifar_like(device=device), 6))
    assert sum(not torch.equal(by_index[int(y)], x) for x, y in next_epoch) > 280
    batch, _ = next(iter(cifar_like(device=device)))
    assert batch.is_contiguous(memory_format=torch.channels_last) and batch.device.type == device


class Cpu(TorchDispatchMode):
    """Lists the operations that make a tensor on the CPU."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **kwargs or {})
        if isinstance(result, torch.Tensor) and result.device.type == 'cpu':
            self.operations.append(operation)
        return result


def test_batches_on_a_device_need_no_tensor_of_the_cpu():
    """Copying one would wait for a GPU. The meta device has no values, only shapes."""
    batches = iter(cifar_like(device='meta', cutout=8))
    next(batches)
    Cpu.operations = []
    with Cpu():
        shapes = [inputs.shape for inputs, _ in batches]
    assert shapes == 3 * [(64, 3, 32, 32)] + [(44, 3, 32, 32)] and not Cpu.operations


# --- the distributions ------------------------------------------------------------------------


def denormalized(inputs):
    """The bytes of normalized images, (N, H, W, C)."""
    known = datasets.PREPROCESSING['CIFAR10']
    pixels = inputs.permute(0, 2, 3, 1) * torch.tensor(known.std) + torch.tensor(known.mean)
    return pixels.round().to(torch.uint8).numpy()


def test_crop_is_a_window_of_the_reflected_image():
    """Every sample is exactly one of the windows of NumPy's padded image, mirrored or not."""
    batches = cifar_like(40)
    inputs, targets = epoch_of(batches, 2)
    for image, index in zip(denormalized(inputs), targets.tolist()):
        padded = np.pad(batches.images[index].numpy(), ((4, 4), (4, 4), (0, 0)), mode='reflect')
        matches = 0
        for top, left in np.ndindex(9, 9):
            window = padded[top : top + 32, left : left + 32]
            matches += np.array_equal(window, image) + np.array_equal(window[:, ::-1], image)
        assert matches == 1


def windows_of(epoch, n=2000):
    """(top, left, mirrored) of every sample, read off images whose colors are coordinates."""
    batches = cifar_like(n)
    batches.images[..., 0], batches.images[..., 1] = torch.arange(32)[:, None], torch.arange(32)
    inputs, targets = epoch_of(batches, epoch)
    rows, columns = denormalized(inputs)[:, 12, :, :2].transpose(2, 0, 1).astype(int)
    mirrored = columns[:, 12] > columns[:, 13]
    top = rows[:, 12] - 12 + 4
    left = np.where(mirrored, columns[:, 19], columns[:, 12]) - 12 + 4
    return np.stack([top, left, mirrored], 1)[np.argsort(targets.numpy())]


def independent(a, b, bins):
    return chi2_contingency(np.histogram2d(a, b, bins=bins)[0]).pvalue > 1e-3


def test_crops_and_mirroring_are_uniform_and_independent():
    drawn = [windows_of(epoch) for epoch in (1, 2, 3)]
    top, left, mirrored = np.concatenate(drawn).T
    assert chisquare(np.bincount(top * 9 + left, minlength=81)).pvalue > 1e-3
    assert chisquare(np.bincount(mirrored, minlength=2)).pvalue > 1e-3
    assert independent(top, mirrored, (9, 2)) and independent(left, mirrored, (9, 2))
    # epochs of the same sample, and neighboring samples of the same epoch
    for a, b in ((drawn[0], drawn[1]), (drawn[1], drawn[2]), (drawn[0][:-1], drawn[0][1:])):
        assert independent(a[:, 0], b[:, 0], (9, 9))


def test_order_is_a_uniform_permutation():
    batches = cifar_like(12, batch_size=12)
    first = []
    for epoch in range(1200):
        batches.epoch = epoch
        [order] = batches.order()
        assert sorted(order) == list(range(12))
        first.append(order[0])
    assert chisquare(np.bincount(first, minlength=12)).pvalue > 1e-3

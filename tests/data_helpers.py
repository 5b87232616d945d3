"""Shared by the tests of lab/data: images, batches and commands."""

import io

import numpy as np
import torch

from lab.data import datasets


def small_set(n=300, size=32, channels=3, seed=0):
    """Random images, and their indices as targets."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (n, size, size, channels)).astype(np.uint8)
    return torch.from_numpy(pixels), torch.arange(n)


def epoch_of(batches, epoch):
    """All images and targets of an epoch, on the CPU."""
    batches.epoch = epoch
    inputs, targets = (torch.cat(parts) for parts in zip(*batches))
    return inputs.cpu(), targets.cpu()


def folder_batches(root, train=True, size=64, **kwargs):
    data = datasets.load('folder', root, image_size=size)
    return data.batches(train, **{'batch_size': 5, 'seed': 3, **kwargs})


def run_folder(root, save, *options):
    """A short training on a folder of images; later options replace earlier ones."""
    command = '--dataset folder --image_size 64 --width 0.25 --batch_size 15 --epochs 2 --nthread 1'
    return [*command.split(), '--dataroot', str(root), '--save', str(save), *map(str, options)]


def jpeg(image, **kwargs):
    """The bytes of a Pillow image as a JPEG."""
    file = io.BytesIO()
    image.save(file, 'JPEG', quality=95, **kwargs)
    return file.getvalue()

"""A trained network, folded and unfolded, with its data set."""

import os
import sys
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from lab.data import datasets
from lab.data.image_files import prepare, read_image
from lab.data.names import readable
from lab.data.preprocessing import Preprocessing, normalize
from lab.errors import UserError, one_line, printable
from lab.runs.checkpoint import Checkpoint

FILE_IMAGES = 500  # sample_images reads at most this many image files


@dataclass
class FoldedNetwork:
    """A checkpoint's network, folded and unfolded, and the data set that it was trained on.

    Both networks are float32 modules on the CPU, in evaluation mode. If the data set was not
    found, `data` is None and `missing` is the reason.
    """

    checkpoint: Checkpoint
    folded: torch.nn.Module
    unfolded: torch.nn.Module
    dataset: str
    preprocessing: Preprocessing
    classes: list  # names, or None
    data: datasets.Data = None
    missing: str = ''

    @property
    def input_shape(self):
        """(C, H, W) of the network's input."""
        size = self.preprocessing.image_size
        return self.preprocessing.channels, size, size

    @property
    def facts(self):
        """What an exported file says about its network: a dict of values that JSON can hold."""
        return {
            'network': {**self.checkpoint.network, 'dataset': self.dataset},
            'classes': readable(self.classes, self.checkpoint.network['num_classes']),
            'preprocessing': self.preprocessing.as_dict(),
        }

    def sample_images(self, train, n, span=None):
        """At most n images, evenly spaced over the training or the test set, not augmented.

        Args:
            span: (begin, end) of the part of the set to sample; None samples all of it.

        Returns:
            Normalized images (N, C, H, W) and their classes (N,). For a folder of image files,
            N is at most FILE_IMAGES.
        """
        part = self.data.train if train else self.data.test
        images, targets = part
        begin, end = span or (0, len(targets))
        n = min(n, end - begin)
        if not torch.is_tensor(images):
            n = min(n, FILE_IMAGES)
        chosen = np.linspace(begin, end - 1, n).astype(int)
        pixels, chosen = read_pixels(part, chosen, self.preprocessing)
        images = torch.from_numpy(pixels)
        inputs = normalize(images, self.preprocessing).contiguous()
        return inputs, torch.as_tensor(np.asarray(targets)[chosen])

    def reference(self, inputs, targets):
        """What to compare a converted network with, on images (N, C, H, W) of classes (N,)."""
        return Reference(inputs, targets, compute_logits(self.unfolded, inputs))


def read_pixels(part, chosen, preprocessing):
    """uint8 (N, H, W, C) of the images with the indices `chosen`, and those indices; without broken
    files, which are named on stderr."""
    images, _ = part
    if torch.is_tensor(images):
        return images.numpy()[chosen], chosen
    found = {}
    for index in chosen:
        path = os.fsdecode(images[index])
        try:
            found[index] = prepare(read_image(path), preprocessing)
        except UserError as error:
            print(f'left out: {one_line(str(error))}', file=sys.stderr)
    if not found:
        raise UserError(f'none of the images can be read, such as {printable(path)}')
    return np.stack(list(found.values())), np.array(list(found))


# --- loading ---------------------------------------------------------------------------------


def load_folded(checkpoint, dataset=None, dataroot=None):
    """The FoldedNetwork of a checkpoint.

    Args:
        dataset: name of the data set, for a checkpoint that does not record it.
        dataroot: folder of the data set; None for the folder that the training used.

    Raises:
        UserError: the network does not fold, its preprocessing is unknown, or the data set does
            not fit the network.
    """
    folded = checkpoint.fold().float()
    preprocessing = preprocessing_of(checkpoint, dataset, folded.architecture)
    check_channels(checkpoint.path, folded.architecture.in_channels, preprocessing)
    network = FoldedNetwork(
        checkpoint,
        folded,
        checkpoint.module().float(),
        _dataset_name(checkpoint, dataset),
        preprocessing,
        checkpoint.classes,
    )
    try:
        network.data = load_data(checkpoint, network.dataset, preprocessing, dataroot)
    except UserError as error:
        network.missing = str(error)
        return network
    check_classes(checkpoint, network.dataset, network.data)
    network.classes = list(network.classes or network.data.classes)
    return network


def load_data(checkpoint, dataset, preprocessing, dataroot=None):
    """The Data that a checkpoint was trained and tested on, or that of another `dataset` or
    `dataroot`.

    Raises:
        UserError: it is missing or broken.
    """
    data = datasets.load(
        dataset,
        dataroot or checkpoint.options.get('dataroot', './data'),
        download=False,
        form=checkpoint.network['form'],
        image_size=preprocessing.image_size,
    )
    return data.tested_on(checkpoint.options.get('holdout'))


def images_tested(checkpoint):
    """What kind of images `load_data` tests on, in a word."""
    return 'held-out' if checkpoint.options.get('holdout') else 'test'


def _dataset_name(checkpoint, given):
    """The data set that the checkpoint records, else the given one, else ImageNet."""
    # In a checkpoint without preprocessing, the data set was only inferred from shapes.
    if checkpoint.preprocessing:
        return checkpoint.network['dataset']
    return given or 'ImageNet'


def preprocessing_of(found, dataset=None, architecture=None):
    """The Preprocessing of a network's images: the stored one, or that of its data set.

    Args:
        found: a Checkpoint or an OnnxNetwork.
        dataset: name of the data set, for a file that does not store its preprocessing.
        architecture: a diracparams.Architecture; one for ImageNet needs no `dataset`.

    Raises:
        UserError: the preprocessing is unknown.
    """
    if found.preprocessing:
        return Preprocessing.from_dict(found.preprocessing)
    if dataset:
        return datasets.PREPROCESSING[dataset]
    if architecture and architecture.form == 'imagenet' and architecture.in_channels == 3:
        return datasets.PREPROCESSING['ImageNet']
    raise UserError(
        f'{found.path} does not say how its images were prepared: name its data set with --dataset'
    )


def check_channels(path, in_channels, preprocessing):
    """Raise UserError if the prepared images do not have the channels that the network expects."""
    if in_channels != preprocessing.channels:
        raise UserError(
            f'{path} expects images with {in_channels} channels, not {preprocessing.channels}: '
            'name the data set that it was trained on with --dataset'
        )


def check_classes(checkpoint, dataset, data):
    """Raise UserError if the data do not have as many classes as the network."""
    n_outputs, n_classes = checkpoint.network['num_classes'], len(data.classes)
    if n_outputs != n_classes:
        raise UserError(
            f'{checkpoint.path} has {n_outputs} classes, but the {dataset} found here has '
            f'{n_classes}: name another data set with --dataset or --dataroot'
        )


# --- comparing -------------------------------------------------------------------------------


class Reference(NamedTuple):
    """Images, and the logits to compare a converted network's logits with."""

    inputs: torch.Tensor  # (N, C, H, W), normalized
    targets: torch.Tensor  # (N,), or None for noise
    logits: np.ndarray  # (N, num_classes), those of the unfolded network


@torch.inference_mode()
def compute_logits(net, inputs, batch_size=250):
    """Logits of a module or an OnnxNetwork as an array (N, num_classes).

    Raises:
        UserError: a logit is not finite.
    """
    logits = torch.cat([net(part) for part in inputs.split(batch_size)])
    if not logits.isfinite().all():
        raise UserError('the network computes logits that are not finite: its weights overflow')
    return logits.numpy()


def top1(logits, targets):
    """Accuracy in percent."""
    return 100 * float((logits.argmax(1) == targets.numpy()).mean())

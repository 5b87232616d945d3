"""A trained network, folded and unfolded, with its data set."""

import os
import sys
from dataclasses import dataclass, replace

import numpy as np
import torch

from lab.data import datasets
from lab.data.image_files import prepare, read_image
from lab.data.names import readable
from lab.data.preprocessing import Preprocessing, normalize
from lab.errors import UserError, one_line, printable
from lab.models.registry import misfit
from lab.runs.checkpoint import Checkpoint

FILE_IMAGES = 500  # sample_pixels reads at most this many image files


@dataclass
class FoldedNetwork:
    """A checkpoint's network, folded and unfolded, and the data set that it was trained on.

    Both networks are float32 modules on the CPU, in evaluation mode. If the data set was not
    found, `data` is None and `missing` is the reason.
    """

    checkpoint: Checkpoint
    folded: torch.nn.Module
    unfolded: torch.nn.Module
    data: datasets.Data = None
    missing: str = ''

    @property
    def dataset(self):
        """The name of its data set."""
        return self.checkpoint.network['dataset']

    @property
    def preprocessing(self):
        return Preprocessing.from_dict(self.checkpoint.preprocessing)

    @property
    def input_shape(self):
        """(C, H, W) of the network's input."""
        size = self.preprocessing.image_size
        return self.preprocessing.channels, size, size

    @property
    def metadata(self):
        """What an exported file says about its network: a dict of values that JSON can hold."""
        classes = self.checkpoint.classes or (list(self.data.classes) if self.data else None)
        return {
            'network': self.checkpoint.network,
            'classes': readable(classes, self.checkpoint.network['num_classes']),
            'preprocessing': self.preprocessing.as_dict(),
        }

    def sample_images(self, train, n):
        """At most n images, evenly spaced over the training or the test set, not augmented.

        Returns:
            Normalized images (N, C, H, W) and their classes (N,). For a folder of image files,
            N is at most FILE_IMAGES.
        """
        part = self.data.train if train else self.data.test
        pixels, targets = sample_pixels(part, self.preprocessing, n)
        inputs = normalize(torch.from_numpy(pixels), self.preprocessing).contiguous()
        return inputs, torch.from_numpy(targets)


def sample_pixels(part, preprocessing, n=None):
    """At most n images, evenly spaced over a training or test set; all of them without n.

    Of image files, at most FILE_IMAGES are read. Broken ones are left out, and named on stderr.

    Returns:
        Arrays: images, uint8 (N, H, W, C), and their classes (N,).

    Raises:
        UserError: no image can be read.
    """
    images, targets = part[0], np.asarray(part[1])
    n = min(n or len(targets), len(targets))
    if torch.is_tensor(images):
        chosen = np.linspace(0, len(targets) - 1, n).astype(int)
        return images.numpy()[chosen], targets[chosen]
    read = {}
    for index in np.linspace(0, len(targets) - 1, min(n, FILE_IMAGES)).astype(int):
        path = os.fsdecode(images[index])
        try:
            read[index] = prepare(read_image(path), preprocessing)
        except UserError as error:
            print(f'left out: {one_line(str(error))}', file=sys.stderr)
    if not read:
        raise UserError(f'none of the images can be read, such as {printable(path)}')
    return np.stack(list(read.values())), targets[list(read)]


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
    checkpoint = with_preprocessing(checkpoint, dataset, dataroot)
    network = FoldedNetwork(checkpoint, checkpoint.fold().float(), checkpoint.module().float())
    try:
        network.data = load_data(checkpoint, network.dataset, network.preprocessing, dataroot)
    except UserError as error:
        network.missing = str(error)
        return network
    check_classes(checkpoint, network.data)
    return network


def with_preprocessing(checkpoint, dataset=None, dataroot=None):
    """The checkpoint, with data set and preprocessing if it does not record them: its data set was
    only inferred from shapes. Args, raises: as `load_folded`."""
    if checkpoint.preprocessing:
        return checkpoint
    if dataset == 'folder' and checkpoint.network['form'] == 'cifar':
        check_fits(checkpoint, dataset)
        # Small images are normalized as the training images of their folder.
        preprocessing = load_data(checkpoint, dataset, None, dataroot).preprocessing
    else:
        preprocessing = preprocessing_of(checkpoint, dataset)
    if not dataset:  # of the ImageNet form
        dataset = 'folder' if misfit(checkpoint.network, 'ImageNet') else 'ImageNet'
    network = {**checkpoint.network, 'dataset': dataset}
    return replace(checkpoint, preprocessing=preprocessing.as_dict(), network=network)


def load_data(checkpoint, dataset, preprocessing, dataroot=None):
    """The Data that a checkpoint was trained and tested on, or that of another `dataset` or
    `dataroot`. Without preprocessing, images have their usual size. Raises UserError if it is
    missing or broken."""
    data = datasets.load(
        dataset,
        dataroot or checkpoint.options.get('dataroot', './data'),
        download=False,
        form=checkpoint.network['form'],
        image_size=preprocessing and preprocessing.image_size,
    )
    return data.tested_on(checkpoint.options.get('holdout'))


def images_tested(checkpoint):
    """What kind of images `load_data` tests on, in a word."""
    return 'held-out' if checkpoint.options.get('holdout') else 'test'


def preprocessing_of(trained, dataset=None):
    """The Preprocessing of a network's images: the stored one, or that of its data set.

    Args:
        trained: a Checkpoint or an OnnxNetwork.
        dataset: name of the data set, for a file that does not store its preprocessing; one with
            a network of the ImageNet form needs none.

    Raises:
        UserError: the preprocessing is unknown, or has other channels than the network.
    """
    if trained.preprocessing:
        return Preprocessing.from_dict(trained.preprocessing)
    form = trained.network.get('form')
    if not dataset and form == 'imagenet':
        dataset = 'folder'  # prepared as ImageNet, with any number of classes
    if not dataset:
        raise UserError(
            f'{trained.path} does not say how its images were prepared: name its data set with '
            '--dataset'
        )
    check_fits(trained, dataset)
    if dataset == 'folder' and form == 'cifar':
        raise UserError(
            f'{trained.path} does not say how its images were prepared, nor does --dataset '
            f'{dataset} for the form {form}: pass its run, or what tools.export wrote of it'
        )
    return datasets.PREPROCESSING[dataset]


def check_fits(trained, dataset):
    """Raise UserError unless a network, a Checkpoint or an OnnxNetwork, is for this data set."""
    if wrong := misfit(trained.network, dataset):
        raise UserError(f'{trained.path} {wrong}: choose another --dataset')


def check_classes(checkpoint, data):
    """Raise UserError if the data do not have as many classes as the network."""
    n_outputs, n_classes = checkpoint.network['num_classes'], len(data.classes)
    if n_outputs != n_classes:
        raise UserError(
            f'{checkpoint.path} has {n_outputs} classes, but the data set {data.name} has '
            f'{n_classes}: name another one with --dataset or --dataroot'
        )


# --- comparing -------------------------------------------------------------------------------


@torch.inference_mode()
def compute_logits(net, inputs, batch_size=250):
    """Logits of a module or an OnnxNetwork as an array (N, num_classes). Raises UserError if one
    is not finite."""
    logits = torch.cat([net(part) for part in inputs.split(batch_size)])
    if not logits.isfinite().all():
        raise UserError('the network computes logits that are not finite: its weights overflow')
    return logits.numpy()


def top1(logits, targets):
    """Accuracy in percent; None for images without targets."""
    return None if targets is None else 100 * float((logits.argmax(1) == targets.numpy()).mean())

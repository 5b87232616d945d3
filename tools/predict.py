"""Fold a trained network, and classify image files with it.

    python -m tools.predict logs/RUN digit.png photos/

CHECKPOINT is a run folder, its model.pt7, a state dict (folded or not), or a .pth or .onnx file
that tools.export wrote. An .onnx file runs in ONNX Runtime. A folder stands for the images in it.
For each image, this prints the most probable classes, or one JSON line with --json. An image that
cannot be read is named on stderr. The others are still classified, but the exit status is 1.
With --explain, this also writes a picture for each image, with the class activation map of its most
probable class: what speaks for the class (red), and what against it (blue).
"""

import json
import sys
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch

from lab.data.datasets import PREPROCESSING
from lab.data.image_files import prepare, read_image
from lab.data.image_folders import find_images
from lab.data.names import readable
from lab.data.preprocessing import Preprocessing, normalize
from lab.errors import OneLineParser, OptionError, UserError, one_line, printable, run
from lab.files import path_argument, write_output
from lab.folded import preprocessing_of
from lab.onnx_models import OnnxNetwork
from lab.runs import checkpoint
from tools.class_maps import add_caption, class_maps, draw, encode_png


@dataclass
class Classifier:
    """A folded network, and what it needs to classify image files."""

    path: object  # of its file
    net: object  # from normalized images (N, C, H, W) to logits (N, num_classes)
    dtype: torch.dtype  # of its input
    preprocessing: Preprocessing
    classes: list  # names, or None

    def normalize(self, images):
        """Prepared images, uint8 (N, H, W, C), as inputs (N, C, H, W)."""
        return normalize(torch.from_numpy(images), self.preprocessing, self.dtype)

    def name(self, index):
        return self.classes[index] if self.classes else str(index)


def load(path, dataset=None, ema=False):
    """The Classifier in a checkpoint or in a file that ends in .onnx.

    Args:
        dataset: name of the data set, for a file that does not store its preprocessing.
        ema: take the moving averages of train.py's --ema.

    Raises:
        UserError: the file cannot be loaded, its network does not fold, or its preprocessing is
            unknown or does not fit the network.
    """
    if str(path).endswith('.onnx'):
        if ema:
            raise OptionError(f'--ema: {path} has one network; pass the run')
        source = net = OnnxNetwork(path)
    else:
        source = checkpoint.load(path)
        if ema:
            source = source.averaged()
        elif source.ema:
            print(f'{source.path}: the raw weights; --ema takes their averages', file=sys.stderr)
        net = source.fold()
    preprocessing = preprocessing_of(source, dataset)
    classes = readable(source.classes, source.network['num_classes'])
    return Classifier(source.path, net, source.dtype, preprocessing, classes)


def classify(classifier, paths, batch_size=64):
    """Yield (file, image, probabilities) for each image file, with the image as prepared, uint8
    (H, W, C), and (num_classes,) probabilities. For one that cannot be read, yield
    (file, UserError, None).

    Raises:
        UserError: the network's outputs are not finite.
    """
    images = read_images(paths, classifier.preprocessing)
    while batch := list(islice(images, batch_size)):
        whole = [image for _, image in batch if not isinstance(image, UserError)]
        rows = iter(compute_probabilities(classifier, np.stack(whole)) if whole else ())
        for file, image in batch:
            yield file, image, None if isinstance(image, UserError) else next(rows)


@torch.inference_mode()
def compute_probabilities(classifier, images):
    """Probabilities (N, num_classes) for prepared images, uint8 (N, H, W, C). Raises UserError."""
    logits = classifier.net(classifier.normalize(images))
    if not logits.isfinite().all():
        raise UserError(
            f'{classifier.path} gives outputs that are not finite: train or export it again'
        )
    return logits.softmax(1)


def read_images(paths, preprocessing):
    """Yield (file, image): uint8 (size, size, channels), or the UserError if it cannot be read."""
    for path in paths:
        try:
            files = find_images(path)
        except UserError as error:
            yield path, error
            continue
        for file in files:
            try:
                image = prepare(read_image(file), preprocessing)
            except UserError as error:
                image = error
            yield file, image


# --- output ----------------------------------------------------------------------------------


def describe(classifier, file, probabilities, args, picture):
    """The line of output about an image; `picture` is the path of its explanation, or None."""
    values, indices = probabilities.topk(min(args.top, len(probabilities)))
    values, names = values.tolist(), [classifier.name(index) for index in indices.tolist()]
    if args.json:
        line = {'image': str(file), 'classes': names, 'probabilities': values}
        return json.dumps({**line, 'explanation': str(picture)} if picture else line)
    percents = ', '.join(f'{name} {100 * p:.1f} %' for name, p in zip(names, values))
    return printable(f'{file}: {percents}{f"; {picture}" if picture else ""}')


def explain(classifier, image, probabilities):
    """The PNG of an image with the map of its most probable class."""
    index = probabilities.argmax().item()
    maps, _ = class_maps(classifier.net, classifier.normalize(image[None]))
    picture = add_caption(
        draw(image, maps[0, index]),
        f'{classifier.name(index)}: {100 * probabilities[index]:.1f} %',
        'red: evidence for it, blue: against it',
    )
    return encode_png(picture)


def unused_path(folder, file, used):
    """The path of the picture of a file: it has the file's name, and a number if that is used."""
    stem = Path(file).stem
    names = (stem if i == 1 else f'{stem}-{i}' for i in count(1))
    paths = (Path(folder).expanduser() / f'{name}.png' for name in names)
    return next(path for path in paths if path not in used)


# --- command line ----------------------------------------------------------------------------


def parse_arguments(arguments):
    parser = OneLineParser(prog='-m tools.predict', description=__doc__)
    parser.add_argument('checkpoint', metavar='CHECKPOINT', type=path_argument)
    parser.add_argument('images', metavar='IMAGE', nargs='+', type=path_argument)
    parser.add_argument(
        '--top', type=int, default=5, metavar='K', help='classes to print of each image (default 5)'
    )
    parser.add_argument('--json', action='store_true', help='print one JSON line for each image')
    parser.add_argument(
        '--dataset',
        choices=PREPROCESSING,
        help='the data set, if CHECKPOINT does not record how its images were prepared',
    )
    parser.add_argument(
        '--ema', action='store_true', help="take the moving averages of train.py's --ema"
    )
    parser.add_argument(
        '--explain',
        metavar='DIR',
        type=path_argument,
        help='write a picture for each image to this folder, with the map of its top class',
    )
    args = parser.parse_args(arguments)
    if args.top < 1:
        raise OptionError(f'--top {args.top} must be at least 1')
    return args


def main(arguments=None):
    args = parse_arguments(arguments)
    classifier = load(args.checkpoint, args.dataset, args.ema)
    status, pictures = 0, set()
    for file, image, probabilities in classify(classifier, args.images):
        if probabilities is None:
            print(f'tools.predict: {one_line(str(image))}', file=sys.stderr)
            status = 1
            continue
        picture = None
        if args.explain:
            picture = unused_path(args.explain, file, pictures)
            write_output(picture, explain(classifier, image, probabilities))
            pictures.add(picture)
        print(describe(classifier, file, probabilities, args, picture))
    return status


if __name__ == '__main__':
    run(main, 'tools.predict')

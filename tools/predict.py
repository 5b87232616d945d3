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
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch

from lab.data.image_files import prepare, read_image
from lab.data.image_folders import find_images
from lab.data.names import readable
from lab.data.preprocessing import Preprocessing, normalize
from lab.errors import OneLineParser, OptionError, UserError, one_line, printable, run
from lab.files import path_argument, write_output
from lab.folded import preprocessing_of
from lab.onnx_models import OnnxNetwork
from tools.checkpoint_arguments import add_checkpoint, load_checkpoint
from tools.class_maps import add_caption, class_maps, draw, encode_png

BATCH = 64


@dataclass
class Classifier:
    """A folded network, and what it needs to classify image files."""

    path: Path  # of its file
    net: Callable  # from normalized images (N, C, H, W) to logits (N, num_classes)
    preprocessing: Preprocessing
    classes: list  # names, or None

    def name(self, index):
        return self.classes[index] if self.classes else str(index)

    def normalize(self, images):
        """Prepared images, uint8 (N, H, W, C), as inputs (N, C, H, W)."""
        return normalize(torch.from_numpy(images), self.preprocessing)

    @torch.inference_mode()
    def probabilities(self, images):
        """Probabilities (N, num_classes) for prepared images, uint8 (N, H, W, C).

        Raises:
            UserError: the network's outputs are not finite.
        """
        logits = self.net(self.normalize(images))
        if not logits.isfinite().all():
            raise UserError(f'{self.path} gives outputs that are not finite: train it again')
        return logits.softmax(1)


def load(args):
    """The Classifier that the arguments choose: in a checkpoint, or in a file that ends in .onnx.

    Raises:
        UserError: the file cannot be loaded, its network does not fold, or its preprocessing is
            unknown or does not fit the network.
    """
    if args.checkpoint.endswith('.onnx'):
        if args.ema:
            raise OptionError(f'--ema: {args.checkpoint} has one network; pass the run')
        loaded = net = OnnxNetwork(args.checkpoint)
    else:
        loaded = load_checkpoint(args)
        if loaded.weights == 'raw' and loaded.ema:
            print(f'{loaded.path}: the raw weights; --ema takes their averages', file=sys.stderr)
        net = loaded.fold().float()
    preprocessing = preprocessing_of(loaded, args.dataset)
    classes = readable(loaded.classes, loaded.network['num_classes'])
    return Classifier(loaded.path, net, preprocessing, classes)


def classify(classifier, paths):
    """Yield (file, image, probabilities) for each image file, with the image as prepared, uint8
    (H, W, C), and (num_classes,) probabilities. For one that cannot be read, yield
    (file, UserError, None).

    Raises:
        UserError: the network's outputs are not finite.
    """
    images = read_images(paths, classifier.preprocessing)
    while batch := list(islice(images, BATCH)):
        whole = [image for _, image in batch if not isinstance(image, UserError)]
        rows = iter(classifier.probabilities(np.stack(whole)) if whole else ())
        for file, image in batch:
            yield file, image, None if isinstance(image, UserError) else next(rows)


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
    values, names = values.tolist(), list(map(classifier.name, indices.tolist()))
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
        f'{100 * probabilities[index]:.1f} %: {classifier.name(index)}',  # a long name is cut off
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
    add_checkpoint(parser)
    parser.add_argument('images', metavar='IMAGE', nargs='+', type=path_argument)
    parser.add_argument(
        '--top', type=int, default=5, metavar='K', help='classes to print of each image (default 5)'
    )
    parser.add_argument('--json', action='store_true', help='print one JSON line for each image')
    parser.add_argument(
        '--explain',
        metavar='DIR',
        type=path_argument,
        help='folder for a picture of each image with the map of its top class',
    )
    args = parser.parse_args(arguments)
    if args.top < 1:
        raise OptionError(f'--top {args.top} must be at least 1')
    return args


def main(arguments=None):
    args = parse_arguments(arguments)
    classifier = load(args)
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

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
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import torch

from lab.data.datasets import PREPROCESSING
from lab.data.image_files import prepare, read_image
from lab.data.image_folders import find_images
from lab.data.names import readable
from lab.data.preprocessing import Preprocessing, normalize
from lab.errors import OneLineParser, OptionError, UserError, one_line, printable, run
from lab.files import path_argument, write_atomically
from lab.folded import check_channels, preprocessing_of
from lab.onnx_models import OnnxNetwork
from lab.runs import checkpoint
from tools.class_maps import add_caption, class_maps, draw


@dataclass
class Classifier:
    """A folded network, and what it needs to classify image files."""

    path: object  # of its file
    net: object  # from normalized images (N, C, H, W) to logits (N, num_classes)
    dtype: torch.dtype  # of its input
    preprocessing: Preprocessing
    classes: list  # names, or None


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
        net = found = OnnxNetwork(path)
        in_channels, num_classes, dtype = net.in_channels, net.num_classes, torch.float32
        preprocessing = preprocessing_of(found, dataset)
    else:
        found = checkpoint.load(path)
        if ema:
            found = found.averaged()
        elif found.ema:
            print(f'{found.path}: the raw weights; --ema takes their averages', file=sys.stderr)
        net = found.fold()
        num_classes, in_channels = net.fc.weight.shape[0], net.architecture.in_channels
        dtype = net.fc.weight.dtype
        preprocessing = preprocessing_of(found, dataset, net.architecture)
    check_channels(found.path, in_channels, preprocessing)
    classes = readable(found.classes, num_classes)
    return Classifier(found.path, net, dtype, preprocessing, classes)


def classify(classifier, paths, batch_size=64):
    """Yield (file, image, probabilities) for each image file, with the image as prepared, uint8
    (H, W, C), and (num_classes,) probabilities. For one that cannot be read, yield
    (file, UserError, None).

    Raises:
        UserError: the network's outputs are not finite.
    """
    images = _read_images(paths, classifier.preprocessing)
    while batch := list(islice(images, batch_size)):
        whole = [image for _, image in batch if not isinstance(image, UserError)]
        rows = iter(compute_probabilities(classifier, np.stack(whole)) if whole else ())
        for file, image in batch:
            yield file, image, None if isinstance(image, UserError) else next(rows)


@torch.inference_mode()
def compute_probabilities(classifier, images):
    """Probabilities (N, num_classes) for prepared images, uint8 (N, H, W, C). Raises UserError."""
    images = torch.from_numpy(images)
    logits = classifier.net(normalize(images, classifier.preprocessing, classifier.dtype))
    if not logits.isfinite().all():
        raise UserError(
            f'{classifier.path} gives outputs that are not finite: train or export it again'
        )
    return logits.softmax(1)


def _read_images(paths, preprocessing):
    """Yield (file, image): uint8 (size, size, channels), or the UserError if it cannot be read."""
    for path in paths:
        try:
            files = find_images(path)
        except UserError as error:
            yield path, error
            continue
        for file in files:
            yield file, _read_prepared(file, preprocessing)


def _read_prepared(file, preprocessing):
    try:
        return prepare(read_image(file), preprocessing)
    except UserError as error:
        return error


def parse_arguments(arguments):
    parser = OneLineParser(prog='-m tools.predict', description=__doc__)
    parser.add_argument('checkpoint', metavar='CHECKPOINT', type=path_argument)
    parser.add_argument('images', metavar='IMAGE', nargs='+', type=path_argument)
    parser.add_argument(
        '--top',
        type=int,
        default=5,
        metavar='K',
        help='classes to print for each image (default 5)',
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
    pictures = Pictures(args.explain) if args.explain else None
    status = 0
    for file, image, probabilities in classify(classifier, args.images):
        if probabilities is None:
            print(f'tools.predict: {one_line(str(image))}', file=sys.stderr)
            status = 1
            continue
        path = pictures and pictures.write(classifier, file, image, probabilities)
        print(_describe(file, probabilities, classifier.classes, args, path))
    return status


class Pictures:
    """The folder of --explain. Raises UserError if it cannot be written to."""

    def __init__(self, folder):
        self.folder, self.names = Path(folder).expanduser(), set()
        with self._one_line_errors():
            self.folder.mkdir(parents=True, exist_ok=True)

    def write(self, classifier, file, image, probabilities):
        """Write the picture of an image with the map of its most probable class. Returns its path,
        which has the file's name, and a number if another file has that name."""
        index = probabilities.argmax().item()
        label = classifier.classes[index] if classifier.classes else str(index)
        images = normalize(
            torch.from_numpy(image[None]), classifier.preprocessing, classifier.dtype
        )
        maps, _ = class_maps(classifier.net, images)
        picture = add_caption(
            draw(image, maps[0, index]),
            f'{label}: {100 * probabilities[index]:.1f} %',
            'red: evidence for it, blue: against it',
        )
        _, content = cv2.imencode('.png', cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
        stem = name = Path(file).stem
        number = 1
        while name in self.names:
            number += 1
            name = f'{stem}-{number}'
        self.names.add(name)
        path = self.folder / f'{name}.png'
        with self._one_line_errors():
            write_atomically(path, content.tobytes())
        return path

    @contextmanager
    def _one_line_errors(self):
        try:
            yield
        except OSError as error:
            raise UserError(
                f'{self.folder} cannot be written to ({error.strerror}): choose another folder '
                'with --explain'
            ) from None


def _describe(file, probabilities, classes, args, path):
    """One line of output about an image; `path` is that of its picture, if there is one."""
    values, indices = probabilities.topk(min(args.top, len(probabilities)))
    values, indices = values.tolist(), indices.tolist()
    names = [classes[index] if classes else str(index) for index in indices]
    if args.json:
        picture = {'explanation': str(path)} if path else {}
        return json.dumps(
            {'image': str(file), 'classes': names, 'probabilities': values, **picture}
        )
    percents = [f'{name} {100 * p:.1f} %' for name, p in zip(names, values)]
    picture = f'; {path}' if path else ''
    return printable(f'{file}: {", ".join(percents)}{picture}')


if __name__ == '__main__':
    run(main, 'tools.predict')

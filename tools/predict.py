"""Fold a trained network, and classify image files with it.

    python -m tools.predict logs/RUN digit.png photos/

CHECKPOINT is a run folder, its model.pt7, a state dict (folded or not), or a .pth or .onnx file
that tools.export wrote. An .onnx file runs in ONNX Runtime. A folder stands for the images in it.
For each image, this prints the most probable classes, or one JSON line with --json.
"""

import json
from dataclasses import dataclass

import numpy as np
import torch

from lab.data.datasets import PREPROCESSING
from lab.data.image_files import find_images, prepare, read_image
from lab.data.preprocessing import Preprocessing, normalize
from lab.errors import OneLineParser, OptionError, run
from lab.folded import check_channels, preprocessing_of
from lab.onnx_models import OnnxNetwork
from lab.runs import checkpoint


@dataclass
class Classifier:
    """A folded network, and what it needs to classify image files."""

    net: object  # from normalized images (N, C, H, W) to logits (N, num_classes)
    dtype: torch.dtype  # of its input
    preprocessing: Preprocessing
    classes: list  # names, or None


def load(path, dataset=None):
    """The Classifier in a checkpoint or in a file that ends in .onnx.

    Args:
        dataset: name of the data set, for a file that does not store its preprocessing.

    Raises:
        UserError: the file cannot be loaded, its network does not fold, or its preprocessing is
            unknown or does not fit the network.
    """
    if str(path).endswith('.onnx'):
        net = found = OnnxNetwork(path)
        in_channels, dtype = net.in_channels, torch.float32
        preprocessing = preprocessing_of(found, dataset)
    else:
        found = checkpoint.load(path)
        net = found.fold()
        in_channels, dtype = net.architecture.in_channels, net.fc.weight.dtype
        preprocessing = preprocessing_of(found, dataset, net.architecture)
    check_channels(found.path, in_channels, preprocessing)
    return Classifier(net, dtype, preprocessing, found.classes)


@torch.inference_mode()
def predict(classifier, files, batch_size=64):
    """Probabilities (N, num_classes) for N image files."""
    probabilities = []
    for start in range(0, len(files), batch_size):
        images = [
            prepare(read_image(file), classifier.preprocessing)
            for file in files[start : start + batch_size]
        ]
        inputs = normalize(
            torch.from_numpy(np.stack(images)), classifier.preprocessing, classifier.dtype
        )
        probabilities.append(classifier.net(inputs).softmax(1))
    return torch.cat(probabilities)


def parse_arguments(arguments):
    parser = OneLineParser(prog='-m tools.predict', description=__doc__)
    parser.add_argument('checkpoint', metavar='CHECKPOINT')
    parser.add_argument('images', metavar='IMAGE', nargs='+')
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
    args = parser.parse_args(arguments)
    if args.top < 1:
        raise OptionError(f'--top {args.top} must be at least 1')
    return args


def main(arguments=None):
    args = parse_arguments(arguments)
    classifier = load(args.checkpoint, args.dataset)
    files = find_images(args.images)
    for file, row in zip(files, predict(classifier, files)):
        values, indices = row.topk(min(args.top, len(row)))
        names = [str(index) for index in indices.tolist()]
        if classifier.classes:
            names = [classifier.classes[index] for index in indices.tolist()]
        if args.json:
            line = {'image': str(file), 'classes': names, 'probabilities': values.tolist()}
            print(json.dumps(line))
        else:
            percents = [f'{name} {100 * p:.1f} %' for name, p in zip(names, values.tolist())]
            print(f'{file}: {", ".join(percents)}')


if __name__ == '__main__':
    run(main, 'tools.predict')

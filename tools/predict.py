"""Classify image files with a trained network, folded.

    python -m tools.predict logs/RUN digit.png photos/

CHECKPOINT is a run's folder, its model.pt7, a state dict, folded or not, or what tools.export made of one with the suffix .onnx (that
one runs in ONNX Runtime). For each image (folders stand for the images in them) the most probable classes are printed, or with
--json one JSON line.
"""

import json
from pathlib import Path

import numpy as np
import torch

from lab.runs import checkpoint
from lab.data.preprocessing import Preprocessing, normalize
from lab.data import datasets as data
from lab.data import image_files as images
from lab.errors import OneLineParser, OptionError, UserError, run


def import_onnxruntime():
    """The module, which is an extra: only .onnx files need it. UserError that names it where it isn't installed."""
    try:
        import onnxruntime
    except ImportError:
        raise UserError(
            '.onnx files need ONNX Runtime, which is not installed; pip install onnx onnxruntime onnxscript'
        ) from None
    return onnxruntime


class OnnxNetwork:
    """An exported .onnx in ONNX Runtime, on the CPU: called with normalized float32 images (N, C, H, W) it gives logits (N, classes).

    `classes` and `preprocessing` are what its metadata says, or None; `in_channels` what its input has.

    Raises:
        UserError: ONNX Runtime is not installed, or the file is missing, broken or no image classifier.
    """

    def __init__(self, path):
        runtime = import_onnxruntime()
        self.path = Path(path).expanduser()
        options = runtime.SessionOptions()
        options.log_severity_level = 4  # the error below says it all
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise UserError(f'{self.path} can not be read ({error.strerror})') from None
        try:
            self.session = runtime.InferenceSession(
                content, options, providers=['CPUExecutionProvider']
            )
            [self.input], [self.output] = self.session.get_inputs(), self.session.get_outputs()
            _, self.in_channels, _, _ = self.input.shape
            self.metadata = {
                key: json.loads(value)
                for key, value in self.session.get_modelmeta().custom_metadata_map.items()
                if key in ('network', 'classes', 'preprocessing')
            }
        except Exception as error:  # ONNX Runtime's errors have no common class
            raise UserError(
                f'{self.path} is no ONNX file of an image classifier, or a broken one ({type(error).__name__})'
            ) from None
        self.classes, self.preprocessing = (
            self.metadata.get('classes'),
            self.metadata.get('preprocessing'),
        )

    def __call__(self, inputs):
        array = np.ascontiguousarray(inputs.float().numpy())
        return torch.from_numpy(self.session.run([self.output.name], {self.input.name: array})[0])


def load(path):
    """What predicts: an OnnxNetwork for a file that ends in .onnx, else a checkpoint.Checkpoint."""
    return OnnxNetwork(path) if str(path).endswith('.onnx') else checkpoint.load(path)


def preprocessing_of(found, dataset=None):
    """The Preprocessing that a checkpoint was trained with: its own facts, else those of `dataset`."""
    if found.preprocessing:
        return Preprocessing.from_dict(found.preprocessing)
    if dataset:
        return data.PREPROCESSING[dataset]
    if not isinstance(found, OnnxNetwork):
        layout = found.fold().architecture
        if layout.form == 'imagenet' and layout.in_channels == 3:
            return data.PREPROCESSING['ImageNet']
    raise UserError(
        f'{found.path} does not say how its images were prepared; name its data set with --dataset'
    )


def check_channels(path, in_channels, preprocessing):
    """UserError where the preprocessing gives images of other channels than the network takes."""
    if in_channels != preprocessing.channels:
        raise UserError(
            f'{path} takes images of {in_channels} channels, not {preprocessing.channels}; name the data '
            'set that it was trained on with --dataset'
        )


def predict(found, files, preprocessing, batch_size=64):
    """Probabilities, (N, num_classes), of image files."""
    if isinstance(found, OnnxNetwork):
        net, in_channels, dtype = found, found.in_channels, torch.float32
    else:
        net = found.fold()
        in_channels, dtype = net.architecture.in_channels, net.fc.weight.dtype
    check_channels(found.path, in_channels, preprocessing)
    probabilities = []
    with torch.inference_mode():
        for start in range(0, len(files), batch_size):
            batch = np.stack(
                [
                    images.prepare(images.read_image(file), preprocessing)
                    for file in files[start : start + batch_size]
                ]
            )
            probabilities.append(
                net(normalize(torch.from_numpy(batch), preprocessing, dtype)).softmax(1)
            )
    return torch.cat(probabilities)


def main(arguments=None):
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
    parser.add_argument('--json', action='store_true', help='one JSON line for each image')
    parser.add_argument(
        '--dataset',
        choices=data.PREPROCESSING,
        help='how images were prepared, where CHECKPOINT does not say',
    )
    args = parser.parse_args(arguments)
    if args.top < 1:
        raise OptionError(f'--top {args.top} must be at least 1')
    found = load(args.checkpoint)
    files = images.image_files(args.images)
    probabilities = predict(found, files, preprocessing_of(found, args.dataset))
    classes = found.classes or [str(index) for index in range(probabilities.shape[1])]
    for file, row in zip(files, probabilities):
        values, indices = row.topk(min(args.top, len(row)))
        top = [(classes[index], value) for index, value in zip(indices.tolist(), values.tolist())]
        if args.json:
            print(
                json.dumps(
                    {
                        'image': str(file),
                        'classes': [name for name, _ in top],
                        'probabilities': [value for _, value in top],
                    }
                )
            )
        else:
            print(f'{file}: ' + ', '.join(f'{name} {100 * value:.1f} %' for name, value in top))


if __name__ == '__main__':
    run(main, 'tools.predict')

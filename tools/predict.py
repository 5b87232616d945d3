"""Classify image files with a trained network, folded.

    python -m tools.predict logs/RUN digit.png photos/

CHECKPOINT is a run's folder, its model.pt7, or a state dict, folded or not. For each image (folders stand for the images in
them) the most probable classes are printed, or with --json one JSON line.
"""
import json

import numpy as np
import torch

import checkpoint
import data
import images
from errors import OneLineParser, OptionError, UserError, run


def preprocessing_of(found, dataset=None):
    """The Preprocessing that a checkpoint was trained with: its own facts, else those of `dataset`."""
    if found.preprocessing:
        return images.Preprocessing.from_dict(found.preprocessing)
    if dataset:
        return data.PREPROCESSING[dataset]
    layout = found.fold().layout
    if layout.form == 'imagenet' and layout.in_channels == 3:
        return data.PREPROCESSING['ImageNet']
    raise UserError(f'{found.path} does not say how its images were prepared; name its data set with --dataset')


def predict(found, files, preprocessing, batch_size=64):
    """Probabilities, (N, num_classes), of image files."""
    net = found.fold()
    if net.layout.in_channels != preprocessing.channels:
        raise UserError(f'{found.path} takes images of {net.layout.in_channels} channels, not {preprocessing.channels}; name the data '
                        'set that it was trained on with --dataset')
    probabilities = []
    with torch.inference_mode():
        for start in range(0, len(files), batch_size):
            batch = np.stack([images.prepare(images.read_image(file), preprocessing) for file in files[start:start + batch_size]])
            dtype = net.fc.weight.dtype
            probabilities.append(net(images.normalize(torch.from_numpy(batch), preprocessing, dtype)).softmax(1))
    return torch.cat(probabilities)


def main(arguments=None):
    parser = OneLineParser(prog='-m tools.predict', description=__doc__)
    parser.add_argument('checkpoint', metavar='CHECKPOINT')
    parser.add_argument('images', metavar='IMAGE', nargs='+')
    parser.add_argument('--top', type=int, default=5, metavar='K', help='classes to print for each image (default 5)')
    parser.add_argument('--json', action='store_true', help='one JSON line for each image')
    parser.add_argument('--dataset', choices=data.PREPROCESSING, help='how images were prepared, where CHECKPOINT does not say')
    args = parser.parse_args(arguments)
    if args.top < 1:
        raise OptionError(f'--top {args.top} must be at least 1')
    found = checkpoint.load(args.checkpoint)
    files = images.image_files(args.images)
    probabilities = predict(found, files, preprocessing_of(found, args.dataset))
    classes = found.classes or [str(index) for index in range(probabilities.shape[1])]
    for file, row in zip(files, probabilities):
        values, indices = row.topk(min(args.top, len(row)))
        top = [(classes[index], value) for index, value in zip(indices.tolist(), values.tolist())]
        if args.json:
            print(json.dumps({'image': str(file), 'classes': [name for name, _ in top], 'probabilities': [value for _, value in top]}))
        else:
            print(f'{file}: ' + ', '.join(f'{name} {100 * value:.1f} %' for name, value in top))


if __name__ == '__main__':
    run(main, 'tools.predict')

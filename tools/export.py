"""Fold a trained network, write it for inference, and check what was written.

    python -m tools.export logs/RUN net.onnx
    python -m tools.export logs/RUN net.pth net.pt2 net.onnx net.int8.onnx

The suffix chooses the format:
    .pth        a dict: `state_dict` (diracnet.DiracNet.from_state_dict makes the module),
                `network` (its model, depth, width, dataset, num_classes and in_channels),
                `classes` and `preprocessing`
    .unfolded.pth  the same with the parameters before folding, to train the network further
    .pt2        torch.export; its extra file metadata.json has the last three of these
    .onnx       ONNX with input `images`, normalized floats (any batch size, C, H, W), and output
                `logits`; metadata_props has the same three
    .int8.onnx  the same in int8, calibrated on training images; see tools.int8

Old runtimes refuse a newer opset of ONNX than they know. --opset therefore defaults to the lowest
that has the network's operators: 9 for .onnx, 13 for .int8.onnx.

Each file is loaded again and compared with the unfolded network on test images. Its logit error is
the largest difference between a logit of the file and the same logit of the unfolded network, as a
fraction of the largest logit of that image. If that of a float format is more than 1e-4, or int8
loses more than 0.5 points of top-1, the file is not written, and the exit status is 1. What takes
time is named on stderr when it begins.
"""

import io
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from lab.errors import OneLineParser, OptionError, UserError, printable, run
from lab.files import make_folder, path_argument, write_atomically
from lab.folded import compute_logits, images_tested, load_folded, top1
from lab.models.diracnet_v1 import DiracNetV1
from lab.onnx_models import HIGHEST_OPSET, LOWEST_OPSET, OnnxNetwork, quiet, require_onnx, to_onnx
from lab.runs import checkpoint
from tools import int8
from tools.checkpoint_arguments import add_checkpoint, load_checkpoint

INT8, UNFOLDED = '.int8.onnx', '.unfolded.pth'
SUFFIXES = ('.pth', UNFOLDED, '.pt2', '.onnx', INT8)
FLOAT_LIMIT, INT8_LIMIT = 1e-4, 0.5  # relative error of the logits; points of top-1
TEST_IMAGES, RANDOM_IMAGES = 10_000, 64  # compare on at most this many; on noise without data


# --- writing ---------------------------------------------------------------------------------


def file_content(network, out, opset, begin):
    """The bytes of an exported file; the suffix of `out` chooses its format.

    Args:
        opset, begin: see `int8.int8_onnx`.
    """
    if out.name.endswith('.pth'):
        net = network.unfolded if out.name.endswith(UNFOLDED) else network.folded
        file = io.BytesIO()
        torch.save({'state_dict': net.state_dict(), **network.metadata}, file)
        return file.getvalue()
    if out.name.endswith('.pt2'):
        begin('tracing')
        return pt2_content(network)
    if out.name.endswith(INT8):
        begin('reading training images')
        calibration, _ = network.sample_images(True, int8.CALIBRATION)
        return int8.int8_onnx(network.folded, calibration, network.metadata, opset, begin)
    begin('tracing, converting')
    model = to_onnx(network.folded, network.input_shape, network.metadata, opset)
    return model.SerializeToString()


def pt2_content(network):
    file, images = io.BytesIO(), torch.zeros(2, *network.input_shape)
    any_batch = ({0: torch.export.Dim('batch')},)
    with quiet():
        program = torch.export.export(network.folded, (images,), dynamic_shapes=any_batch)
        metadata = {'metadata.json': json.dumps(network.metadata)}
        torch.export.save(program, file, extra_files=metadata)
    return file.getvalue()


def load_exported(path):
    """The network in an exported file: a function from images (N, C, H, W) to logits.

    Raises:
        UserError: it cannot be loaded.
    """
    if path.name.endswith('.pth'):
        return checkpoint.load(path).module()
    if path.name.endswith('.pt2'):
        return torch.export.load(path).module()
    return OnnxNetwork(path)


def export_file(network, out, opset, inputs, targets, expected):
    """Write a file if it passes the comparison, and print its row of the table.

    Args:
        opset: see `onnx_models.to_onnx`.
        inputs, targets: see `comparison_images`.
        expected: the logits of the unfolded network, (N, num_classes).

    Returns:
        Why the file was not written, or None.

    Raises:
        UserError: the file cannot be loaded again.
        OSError: it cannot be written.
    """

    def begin(step):
        announce(f'{out}: {step}')

    content = file_content(network, out, opset, begin)
    begin(f'loading, comparing on {len(inputs)} images')
    with tempfile.TemporaryDirectory() as folder:
        trial = Path(folder) / out.name
        trial.write_bytes(content)
        logits = compute_logits(load_exported(trial), inputs)
    error = relative_error(logits, expected)
    before, after = top1(expected, targets), top1(logits, targets)
    print_row(out, f'{error:.1e}', after, before, f'{len(content):,}')
    if out.name.endswith(INT8):
        if before - after > INT8_LIMIT:
            return f'{out} loses {before - after:.2f} points of top-1, more than {INT8_LIMIT}'
    elif error > FLOAT_LIMIT:
        return f'{out} is off by {error:.1e} of the largest logit, more than {FLOAT_LIMIT}'
    make_folder(out.parent)
    write_atomically(out, content)
    return None


# --- comparing -------------------------------------------------------------------------------


def comparison_images(network):
    """Images to compare on, their classes (None for noise), and a description of the images."""
    if network.data is None:
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(RANDOM_IMAGES, *network.input_shape, generator=generator)
        what = f'{len(inputs)} images of normal noise, because {network.dataset} was not found'
        return inputs, None, what
    inputs, targets = network.sample_images(False, TEST_IMAGES)
    kind = images_tested(network.checkpoint)
    return inputs, targets, f'{len(inputs)} {kind} images of {printable(network.data.name)}'


def relative_error(logits, expected):
    """The largest difference from the same expected logit, relative to the largest of its image."""
    differences = np.abs(logits - expected).max(1)
    scales = np.maximum(np.abs(expected).max(1), np.finfo(np.float32).tiny)
    return float((differences / scales).max())


def announce(step):
    print(printable(step), file=sys.stderr, flush=True)


def print_row(name, error, after, before, size):
    percents = ['-' if value is None else f'{value:.2f} %' for value in (after, before)]
    print(f'| {printable(str(name))} | {error} | {" | ".join(percents)} | {size} |', flush=True)


# --- command line ----------------------------------------------------------------------------


def parse_arguments(arguments):
    parser = OneLineParser(prog='-m tools.export', description=__doc__)
    add_checkpoint(parser)
    parser.add_argument(
        'outs', metavar='OUT', type=path_argument, nargs='+', help=f'a file: {", ".join(SUFFIXES)}'
    )
    parser.add_argument('--force', action='store_true', help='replace OUT if it exists')
    parser.add_argument('--dataroot', help='folder of the data set, if it has moved')
    parser.add_argument(
        '--opset', type=int, help=f'of .onnx files, at most {HIGHEST_OPSET} (default: see above)'
    )
    args = parser.parse_args(arguments)
    args.outs = [Path(out) for out in args.outs]
    for out in args.outs:
        if not out.name.endswith(SUFFIXES):
            raise OptionError(f'{out} must end in {", ".join(SUFFIXES)}, which chooses the format')
        if os.path.lexists(out) and not args.force:
            raise OptionError(f'{out} exists: replace it with --force')
        if args.opset is not None and out.name.endswith('.onnx'):
            lowest = int8.LOWEST_OPSET if out.name.endswith(INT8) else LOWEST_OPSET
            if not lowest <= args.opset <= HIGHEST_OPSET:
                raise OptionError(
                    f'--opset {args.opset} of {out} is not one of {lowest} to {HIGHEST_OPSET}'
                )
    return args


def check_format(network, out):
    """Raise UserError for a format that the network cannot be written in."""
    if out.name.endswith(UNFOLDED) and network.checkpoint.folded:
        raise UserError(f'{out} is impossible: {network.checkpoint.path} is folded')
    if out.name.endswith(INT8) and network.data is None:
        raise UserError(
            f'{out} needs training images of {network.dataset} to calibrate: {network.missing}'
        )
    if out.name.endswith(INT8) and isinstance(network.folded, DiracNetV1):
        raise UserError(f'{out} is impossible: int8 does not support NCReLU; export .onnx instead')
    if not out.name.endswith('.pth') and network.preprocessing.whitening:
        raise UserError(f'{out} cannot store the matrix of --preprocess zca: export .pth instead')


def main(arguments=None):
    args = parse_arguments(arguments)
    if any(out.name.endswith('.onnx') for out in args.outs):
        require_onnx()
    loaded = load_checkpoint(args)
    network = load_folded(loaded, args.dataset, args.dataroot)
    for out in args.outs:
        check_format(network, out)
    announce('reading images to compare on, computing the logits of the unfolded network')
    inputs, targets, what = comparison_images(network)
    expected = compute_logits(network.unfolded, inputs)
    n_parameters = sum(parameter.numel() for parameter in network.folded.parameters())
    which = f', {loaded.weights} weights' if loaded.ema else ''
    print(
        f'{printable(str(loaded.path))}: {n_parameters:,} parameters when folded{which}\n'
        f'Each file is compared with the unfolded network on {what}.\n'
        'logit error: the largest difference between a logit of the file and the same logit of the '
        'unfolded network,\nas a fraction of the largest logit of that image; '
        f'at most {FLOAT_LIMIT} in a float format.\n'
        'top-1: images whose largest logit is that of their class; int8 may lose '
        f'{INT8_LIMIT} points.\n'
    )
    print('| file | logit error | top-1 | top-1, unfolded | bytes |')
    print('| --- | --- | --- | --- | --- |')
    accuracy = top1(expected, targets)
    print_row('(unfolded)', '', accuracy, accuracy, '')
    failures = []
    try:
        for out in args.outs:
            failures.append(export_file(network, out, args.opset, inputs, targets, expected))
    except OSError as error:
        raise UserError(f'{out} cannot be written ({error.strerror})') from None
    if any(failures):
        raise UserError(f'not written: {"; ".join(filter(None, failures))}')


if __name__ == '__main__':
    run(main, 'tools.export')

"""int8 for folded networks: how much each recipe loses, and how much each layer loses alone.

    python -m tools.quantize logs/RUN                  # each recipe
    python -m tools.quantize logs/RUN --per-layer      # also each layer quantized alone

tools.export writes the int8 file; this shows why it uses the last recipe. A recipe is judged by
the noise in the logits of held-out training images, which are not used for calibration.
"""

import math

import numpy as np
import torch

from lab.data.datasets import PREPROCESSING
from lab.errors import OneLineParser, OptionError, UserError, printable, run
from lab.files import path_argument
from lab.folded import compute_logits, load_folded, top1
from lab.onnx_models import OnnxNetwork, require_onnx
from lab.runs import checkpoint
from tools.int8 import BEST, CALIBRATION, RECIPES, find_layers, int8_onnx, observe

TEST_IMAGES = 10_000  # judge by at most this many


def signal_to_noise(logits, reference):
    """Decibels: the power of the reference logits over that of the difference."""
    noise = max(np.square(logits - reference).sum(), 1e-30)
    return 10 * math.log10(np.square(reference).sum() / noise)


def judge(content, reference):
    """Signal to noise in dB and top-1 in percent of an int8 file, as text."""
    logits = compute_logits(OnnxNetwork(content), reference.inputs)
    decibels = signal_to_noise(logits, reference.logits)
    return [f'{decibels:.1f}', f'{top1(logits, reference.targets):.2f}']


def print_header(*columns):
    print_row(*columns)
    print_row(*['---' for _ in columns])


def print_row(*cells):
    print(f'| {" | ".join(cells)} |', flush=True)


def print_recipes(net, calibration, held_out, test):
    """A row for each recipe: noise and top-1 on held-out training images and on test images."""
    print_header(
        'int8',
        'signal to noise of the logits, held out, dB',
        'top-1, held out, %',
        'signal to noise, test, dB',
        'top-1, test, %',
    )
    right = [f'{top1(part.logits, part.targets):.2f}' for part in (held_out, test)]
    print(f'| (unfolded, float) | | {right[0]} | | {right[1]} |')
    for name, steps in RECIPES.items():
        content = int8_onnx(net, calibration, {}, steps)
        print_row(name, *judge(content, held_out), *judge(content, test))


def print_layers(net, calibration, held_out):
    """A row for each layer: its largest tap, the ranges of its input, and the noise if it alone is
    quantized."""
    print_header(
        'layer, alone in int8',
        'largest tap / rms of its filter, median (possible)',
        'range of an input channel, median',
        'largest',
        'signal to noise as folded, dB',
        'with the last recipe, dB',
    )
    with torch.inference_mode():
        ranges = observe(net, calibration, find_layers(net), lambda given, _: channel_ranges(given))
    for name, layer in net.named_modules():
        if layer in ranges:
            contents = [int8_onnx(net, calibration, {}, steps, name) for steps in ((), BEST)]
            print_row(
                name,
                f'{largest_tap(layer):.1f} ({math.sqrt(layer.weight[0].numel()):.1f})',
                f'{ranges[layer].median():.2f}',
                f'{ranges[layer].max():.2f}',
                *[judge(content, held_out)[0] for content in contents],
            )


def channel_ranges(activation):
    """The largest absolute value in each channel of (N, C, ...): (C,)."""
    return activation.abs().amax([d for d in range(activation.ndim) if d != 1])


def largest_tap(layer):
    """The largest weight of a filter over the root mean square of its weights, median of a layer.

    For a filter with a single tap, this is the square root of its number of weights.
    """
    weight = layer.weight.detach().flatten(1).abs()  # (out, taps)
    return (weight.amax(1) / weight.square().mean(1).sqrt().clamp(min=1e-12)).median()


# --- command line ----------------------------------------------------------------------------


def parse_arguments(arguments):
    parser = OneLineParser(prog='-m tools.quantize', description=__doc__)
    parser.add_argument('checkpoint', metavar='CHECKPOINT', type=path_argument)
    parser.add_argument(
        '--dataroot', help='folder of the data set, if it is not where the training had it'
    )
    parser.add_argument(
        '--dataset',
        choices=PREPROCESSING,
        help='the data set, if CHECKPOINT does not record it',
    )
    parser.add_argument(
        '--held-out',
        type=int,
        default=2000,
        metavar='N',
        help='training images to judge by, at most a quarter of them (default 2000)',
    )
    parser.add_argument(
        '--per-layer',
        action='store_true',
        help='also quantize each layer alone, as folded and with the last recipe',
    )
    args = parser.parse_args(arguments)
    if args.held_out < 1:
        raise OptionError(f'--held-out {args.held_out} must be at least 1')
    return args


def main(arguments=None):
    args = parse_arguments(arguments)
    require_onnx()
    network = load_folded(checkpoint.load(args.checkpoint), args.dataset, args.dataroot)
    if network.data is None:
        raise UserError(
            f'int8 needs training and test images of {network.dataset}: {network.missing}'
        )
    n = len(network.data.train[1])
    n_held_out = min(args.held_out, n // 4)
    calibration, _ = network.sample_images(True, CALIBRATION, (0, n - n_held_out))
    held_out = network.reference(*network.sample_images(True, n_held_out, (n - n_held_out, n)))
    test = network.reference(*network.sample_images(False, TEST_IMAGES))
    print(
        f'{printable(str(network.checkpoint.path))}: {len(calibration)} images to calibrate, '
        f'{n_held_out} held out of the training set, {len(test.inputs)} of the test set\n'
    )
    print_recipes(network.folded, calibration, held_out, test)
    if args.per_layer:
        print()
        print_layers(network.folded, calibration, held_out)


if __name__ == '__main__':
    run(main, 'tools.quantize')

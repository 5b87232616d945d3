"""int8 for folded networks: what it loses, layer by layer, and what mends it. tools.export writes the file; this shows why it is made so.

    python -m tools.quantize logs/RUN                  # recipes, from the folded network as it is to the one that is exported
    python -m tools.quantize logs/RUN --per-layer      # and each layer quantized alone

Weights are quantized per channel, activations per tensor, statically, by ONNX Runtime's quantizer; ranges are those of training images.
Recipes are judged by the noise in the logits of held-out training images, which have no part in the calibration.

A filter of a folded DiracNet is an identity and small learned taps. One step of int8 is 1/127 of the largest tap, which is the
identity's: where the filter is little else, the learned taps round to a few steps or to zero. So `separate` takes that tap out of
the filter and computes it beside the convolution, y = conv(x, W - diag(d)) + d x, the convolution in int8, the rest in float.
`equalize` then brings the channels of an activation closer to one range (cross-layer equalization, Nagel et al., arXiv 1906.04721,
with the ranges of activations instead of weights): ReLU and pooling let a positive factor through.
"""

import contextlib
import copy
import io
import json
import logging
import math
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lab.runs import checkpoint
from lab.errors import OneLineParser, OptionError, UserError, run

CALIBRATION = 512  # training images
RECIPES = {  # steps of `int8_onnx`; the last one is what is exported
    'as folded': (),
    'percentile calibration (99.99 %)': ('percentile',),
    'entropy calibration': ('entropy',),
    'first and last layer in float': ('ends',),
    'equalized': ('equalize',),
    'equalized, first and last layer in float': ('equalize', 'ends'),
    'identity apart': ('separate',),
    'identity apart, equalized': ('equalize', 'separate'),
    'identity apart, equalized, first and last layer in float': ('equalize', 'separate', 'ends'),
}
BEST = tuple(RECIPES.values())[-1]
# All but the product and the sum of a SeparateConv2d: those in int8 would round the activation three times instead of once.
INT8_OPERATIONS = ['Conv', 'Gemm', 'Relu', 'MaxPool', 'ReduceMean', 'Reshape']


def import_onnx():
    """onnx, after a look that all three extras are there. UserError that names them where one isn't installed."""
    try:
        import onnx
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f'writing .onnx needs {error.name or "extras"}, which is not installed; '
            'pip install onnx onnxruntime onnxscript'
        ) from None
    return onnx


@contextlib.contextmanager
def quiet():
    """Without the chatter of exporter and quantizer: what goes wrong there comes as an exception."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter('ignore')
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def onnx_model(net, shape, metadata):
    """A DiracNet, or one with its identities apart, as a checked onnx.ModelProto.

    Input `images`, float32 (batch, *shape); output `logits`, (batch, classes); the batch is of any size. Initializers are named as
    in the state dict, nodes by their module. `metadata` is a dict of what can be JSON.
    """
    onnx = import_onnx()
    with quiet():
        program = torch.onnx.export(
            net,
            (torch.zeros(2, *shape),),
            dynamo=True,
            verbose=False,
            input_names=['images'],
            output_names=['logits'],
            dynamic_shapes=({0: torch.export.Dim('batch')},),
        )
    model = program.model_proto
    names, taken = {}, set(net.state_dict())
    for node in model.graph.node:
        scopes = [
            prop.value for prop in node.metadata_props if prop.key == 'pkg.torch.onnx.name_scopes'
        ]
        module = scopes[0].strip('[]').replace("'", '').split(', ')[-2] if scopes else ''
        name = (
            module
            if node.op_type in ('Conv', 'Gemm')
            else '.'.join(part for part in (module, node.op_type) if part)
        )
        while name in taken:
            name += '_'
        taken.add(name)
        node.name = name
        names.update((output, name) for output in node.output if output != 'logits')
        names.update(
            (value, f'{name}.{value}')
            for value in node.input
            if value.startswith('val_') and value not in names
        )
        # Where the source code was is nobody's business, and several times as large as the graph.
        del node.metadata_props[:]
    for node in model.graph.node:
        for values in (node.input, node.output):
            values[:] = [names.get(value, value) for value in values]
    for tensor in model.graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    for part in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        del part.metadata_props[:]
    del model.graph.value_info[:]
    del model.graph.metadata_props[:]
    onnx.helper.set_model_props(model, {key: json.dumps(value) for key, value in metadata.items()})
    onnx.checker.check_model(model, full_check=True)
    return model


# --- networks that lose less -----------------------------------------------------------------------------------------


class SeparateConv2d(nn.Conv2d):
    """A 3x3 convolution plus the diagonal of its central taps, (C, 1, 1): what `separate` makes of one, computing the same."""

    def forward(self, input):
        return super().forward(input) + self.diagonal * input


@torch.no_grad()
def separate(net):
    """A copy of a DiracNet whose convolutions of as many inputs as outputs have their diagonal apart."""
    net = copy.deepcopy(net)
    for module in net.modules():
        if (
            isinstance(module, nn.Conv2d)
            and module.in_channels == module.out_channels
            and module.kernel_size == (3, 3)
        ):
            module.__class__ = SeparateConv2d
            diagonal = module.weight[:, :, 1, 1].diagonal()  # a view, (C,)
            module.register_buffer('diagonal', diagonal.clone().view(-1, 1, 1))
            diagonal.zero_()
    return net


@torch.no_grad()
def equalize(net, inputs, power=0.5, least=0.01):
    """A copy of a DiracNet that computes the same, and whose activations have more nearly one range in all channels.

    Channel c of a layer is divided by (its largest activation over `inputs`) ** power, and what reads it multiplied. With a power of 1
    the ranges would be equal, and those of the weights behind them apart. Channels that are (nearly) dead would get enormous weights:
    none counts for less than `least` of the largest.
    """
    net = copy.deepcopy(net)
    layers = [module for module in net.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    outputs = {}
    hooks = [
        layer.register_forward_hook(lambda module, _, output: outputs.__setitem__(module, output))
        for layer in layers
    ]
    net(inputs)
    for hook in hooks:
        hook.remove()
    for layer, following in zip(layers, layers[1:]):
        scale = outputs[layer].relu().amax((0, 2, 3))  # (C,)
        scale = scale.clamp(min=least * scale.max().clamp(min=1e-12))
        scale = scale**power / (scale**power).log().mean().exp()
        layer.weight /= scale.view(-1, 1, 1, 1)
        layer.bias /= scale
        following.weight *= scale.view(1, -1, *[1] * (following.weight.ndim - 2))
    return net


# --- quantizing ------------------------------------------------------------------------------------------------------


def int8_onnx(net, inputs, metadata, steps=BEST, only=None):
    """The bytes of an int8 .onnx of a folded DiracNet, in ONNX Runtime's QDQ form.

    Args:
        inputs: normalized training images (N, C, H, W), for the ranges of activations.
        steps: what is done against the loss, of those in RECIPES.
        only: name of the only layer (its key in the state dict, without .weight) to quantize; None for all.
    """
    onnx = import_onnx()
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantType,
        quantize_static,
    )

    class Reader(CalibrationDataReader):
        batches = iter(inputs.split(64))

        def get_next(self):
            batch = next(self.batches, None)
            return None if batch is None else {'images': np.ascontiguousarray(batch.numpy())}

    if 'equalize' in steps:
        net = equalize(net, inputs)
    if 'separate' in steps:
        net = separate(net)
    model = onnx_model(net, inputs.shape[1:], metadata)
    layers = [node.name for node in model.graph.node if node.op_type in ('Conv', 'Gemm')]
    nodes = [
        node.name for node in model.graph.node if only in (node.name, node.name.rpartition('.')[0])
    ]
    method, extra = CalibrationMethod.MinMax, {}
    if 'percentile' in steps:
        method, extra = CalibrationMethod.Percentile, {'CalibPercentile': 99.99}
    elif 'entropy' in steps:
        method = CalibrationMethod.Entropy
    with quiet(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'int8.onnx'
        quantize_static(
            model,
            str(path),
            Reader(),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=INT8_OPERATIONS,
            nodes_to_quantize=nodes if only else None,
            nodes_to_exclude=[layers[0], layers[-1]] if 'ends' in steps else None,
            calibrate_method=method,
            extra_options=extra,
        )
        content = path.read_bytes()
    onnx.checker.check_model(content)
    return content


def session_logits(content, inputs):
    """Logits (N, classes) that the bytes of an .onnx give, as an array."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=['CPUExecutionProvider'])
    return np.concatenate(
        [
            session.run(['logits'], {'images': np.ascontiguousarray(part.numpy())})[0]
            for part in inputs.split(250)
        ]
    )


def signal_to_noise(logits, reference):
    """Decibels: power of the reference logits over that of the difference."""
    return 10 * math.log10(
        np.square(reference).sum() / max(np.square(logits - reference).sum(), 1e-30)
    )


def main(arguments=None):
    from tools.export import TEST_IMAGES, pictures, study, targets_of  # which imports this module

    parser = OneLineParser(prog='-m tools.quantize', description=__doc__)
    parser.add_argument('checkpoint', metavar='CHECKPOINT')
    parser.add_argument(
        '--dataroot', help='where the data set is, if not where it was for the training'
    )
    parser.add_argument('--dataset', help='the data set, where CHECKPOINT does not say')
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
    import_onnx()
    found = checkpoint.load(args.checkpoint)
    about = study(found, args.dataset, args.dataroot)
    if about.source is None:
        raise UserError(f'judging int8 needs the images of {about.name}: {about.missing}')
    net = about.folded
    n = len(targets_of(about.source.train))
    held_out = min(args.held_out, n // 4)
    calibration, _ = pictures(about, True, CALIBRATION, (0, n - held_out))
    judged = {
        'held out': pictures(about, True, held_out, (n - held_out, n)),
        'test': pictures(about, False, TEST_IMAGES),
    }
    with torch.inference_mode():
        reference = {
            part: torch.cat([about.unfolded(batch) for batch in inputs.split(250)]).numpy()
            for part, (inputs, _) in judged.items()
        }

    def judge(content, parts=tuple(judged)):
        for part in parts:
            inputs, targets = judged[part]
            logits = session_logits(content, inputs)
            yield from (
                f'{signal_to_noise(logits, reference[part]):.1f}',
                f'{100 * (logits.argmax(1) == targets.numpy()).mean():.2f}',
            )

    print(
        f'{found.path}: {len(calibration)} images to calibrate, {held_out} held out of the training set, {len(judged["test"][1])} of '
        'the test set\n'
    )
    print(
        '| int8 | signal to noise of the logits, held out, dB | top-1, held out, % | signal to noise, test, dB | top-1, test, % |'
    )
    print('| --- | --- | --- | --- | --- |')
    right = [
        f'{100 * (reference[part].argmax(1) == judged[part][1].numpy()).mean():.2f}'
        for part in judged
    ]
    print(f'| (unfolded, float) | | {right[0]} | | {right[1]} |')
    for name, steps in RECIPES.items():
        print(
            f'| {name} | {" | ".join(judge(int8_onnx(net, calibration, {}, steps)))} |', flush=True
        )
    if args.per_layer:
        print_layers(net, calibration, judge)


def print_layers(net, calibration, judge):
    """For each layer: how its largest tap compares with the rest, its input's ranges, and the noise it alone makes."""
    inputs = {}
    hooks = [
        module.register_forward_hook(
            lambda module, given, _, name=name: inputs.__setitem__(name, given[0])
        )
        for name, module in net.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    ]
    with torch.inference_mode():
        net(calibration)
    for hook in hooks:
        hook.remove()
    print(
        '\n| layer, alone in int8 | largest tap / rms of its filter, median (possible) | range of an input channel, median | largest | '
        'signal to noise as folded, dB | with the last recipe, dB |'
    )
    print('| --- | --- | --- | --- | --- | --- |')
    for name, given in inputs.items():
        weight = net.get_submodule(name).weight.detach().flatten(1).abs()  # (out, taps)
        peak = (weight.amax(1) / weight.square().mean(1).sqrt().clamp(min=1e-12)).median()
        ranges = given.abs().amax([d for d in range(given.ndim) if d != 1])
        noise = [
            next(iter(judge(int8_onnx(net, calibration, {}, steps, name), ['held out'])))
            for steps in ((), BEST)
        ]
        print(
            f'| {name} | {peak:.1f} ({math.sqrt(weight.shape[1]):.1f}) | {ranges.median():.2f} | {ranges.max():.2f} | '
            f'{" | ".join(noise)} |',
            flush=True,
        )


if __name__ == '__main__':
    run(main, 'tools.quantize')

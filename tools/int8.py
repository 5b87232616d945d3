"""int8 for folded networks: the steps that keep their accuracy, and the .onnx file.

Weights are quantized per channel, activations per tensor, by ONNX Runtime's static quantizer, with
the ranges found on training images.

A filter of a folded DiracNet is an identity plus small learned taps. One step of int8 is 1/127 of
the largest tap, which is the identity's. Where that tap dominates the filter, the learned taps
round to a few steps or to zero. `separate` takes the identity's tap out of the filter:
y = conv(x, W - diag(d)) + d x, with the convolution in int8 and the rest in float. `equalize`
brings the channels of an activation closer to one range. It is the cross-layer equalization of
Nagel et al. (arXiv 1906.04721), with the ranges of activations instead of weights; it works
because a positive factor passes through ReLU and pooling.
"""

import copy
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lab.onnx_models import quiet, require_onnx, to_onnx

CALIBRATION = 512  # training images
RECIPES = {  # steps of `int8_onnx`; the last recipe is the one that tools.export uses
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
# The product and the sum of a SeparateConv2d are left out: in int8 they would round the activation
# three times instead of once.
INT8_OPERATIONS = ['Conv', 'Gemm', 'Relu', 'MaxPool', 'ReduceMean', 'Reshape']


# --- networks that lose less -----------------------------------------------------------------


class SeparateConv2d(nn.Conv2d):
    """A 3x3 convolution plus `diagonal` (C, 1, 1) times its input, see `separate`."""

    def forward(self, input):
        return super().forward(input) + self.diagonal * input


@torch.no_grad()
def separate(net):
    """A copy of a DiracNet that computes the same, with the identity's taps outside the filters.

    It changes the 3x3 convolutions with as many input channels as output channels.
    """
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
    """A copy of a DiracNet that computes the same, with similar activation ranges in all channels.

    The output channels of each layer are divided by their largest activation, to the power of
    `power`; the weights of the next layer are multiplied by the same factors. With power 1 the
    activation ranges become equal, but the next layer's weights differ more.

    Args:
        inputs: images (N, C, H, W) to find the largest activations with.
        least: the smallest activation that counts, relative to the layer's largest. Without it,
            channels that are nearly dead would get very large weights.
    """
    net = copy.deepcopy(net)
    layers = find_layers(net)
    largest = observe(net, inputs, layers[:-1], lambda _, output: output.relu().amax((0, 2, 3)))
    for layer, following in zip(layers, layers[1:]):
        scale = largest[layer]  # (C,)
        scale = scale.clamp(min=least * scale.max().clamp(min=1e-12))
        scale = scale**power / (scale**power).log().mean().exp()
        layer.weight /= scale.view(-1, 1, 1, 1)
        layer.bias /= scale
        following.weight *= scale.view(1, -1, *[1] * (following.weight.ndim - 2))
    return net


def find_layers(net):
    """The convolutions and linear layers of a network, in order."""
    return [module for module in net.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]


def observe(net, inputs, layers, statistic):
    """Run a network on inputs; return {layer: statistic(the layer's input, its output)}."""
    observed = {}

    def hook(layer, given, output):
        observed[layer] = statistic(given[0], output)

    handles = [layer.register_forward_hook(hook) for layer in layers]
    net(inputs)
    for handle in handles:
        handle.remove()
    return observed


# --- quantizing ------------------------------------------------------------------------------


def int8_onnx(net, inputs, metadata, steps=BEST, only=None):
    """The bytes of an int8 .onnx file of a folded DiracNet, in ONNX Runtime's QDQ format.

    Args:
        inputs: normalized training images (N, C, H, W), to find the ranges of activations with.
        metadata: see `onnx_models.to_onnx`.
        steps: the steps of a recipe, see RECIPES.
        only: name of the only layer to quantize; None quantizes all.

    Raises:
        UserError: a package is not installed.
    """
    require_onnx()
    import onnx
    from onnxruntime.quantization import QuantType, quantize_static

    if 'equalize' in steps:
        net = equalize(net, inputs)
    if 'separate' in steps:
        net = separate(net)
    model = to_onnx(net, inputs.shape[1:], metadata)
    layers = [node.name for node in model.graph.node if node.op_type in ('Conv', 'Gemm')]
    with quiet(), tempfile.TemporaryDirectory() as folder:
        given, path = Path(folder) / 'float.onnx', Path(folder) / 'int8.onnx'
        onnx.save(model, given)  # older releases change a model that they get as an object
        quantize_static(
            str(given),
            str(path),
            calibration_reader(inputs),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=INT8_OPERATIONS,
            nodes_to_quantize=nodes_of(model, only) if only else None,
            nodes_to_exclude=[layers[0], layers[-1]] if 'ends' in steps else None,
            **calibration_options(steps),
        )
        content = path.read_bytes()
    onnx.checker.check_model(content)
    return content


def calibration_reader(inputs):
    """An object that feeds images to ONNX Runtime's quantizer, in batches of 64."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        batches = iter(inputs.split(64))

        def get_next(self):
            batch = next(self.batches, None)
            if batch is None:
                return None
            return {'images': np.ascontiguousarray(batch.numpy())}

    return Reader()


def calibration_options(steps):
    """The arguments of `quantize_static` for how a recipe finds activation ranges."""
    from onnxruntime.quantization import CalibrationMethod

    if 'percentile' in steps:
        return {
            'calibrate_method': CalibrationMethod.Percentile,
            'extra_options': {'CalibPercentile': 99.99},
        }
    if 'entropy' in steps:
        return {'calibrate_method': CalibrationMethod.Entropy}
    return {'calibrate_method': CalibrationMethod.MinMax}


def nodes_of(model, layer):
    """Names of the nodes that a layer was exported to."""
    names = [node.name for node in model.graph.node]
    return [name for name in names if layer in (name, name.rpartition('.')[0])]

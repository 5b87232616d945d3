"""int8 for folded networks: an .onnx file that keeps their accuracy.

ONNX Runtime's static quantizer quantizes weights per channel and activations per tensor, with the
ranges found on training images. The first and the last layer stay in float.

A filter of a folded DiracNet is an identity plus small learned taps. One step of int8 is 1/127 of
the largest tap, which is the identity's. Where that tap dominates the filter, the learned taps
round to a few steps or to zero. `separate` takes the identity's tap out of the filter:
y = conv(x, W - diag(d)) + d x, with the convolution in int8 and the rest in float. `equalize`
brings the channels of an activation closer to one range. It is the cross-layer equalization of
Nagel et al. (arXiv 1906.04721), with the ranges of activations instead of weights; it works
because a positive factor passes through ReLU and pooling. logs/reference/export-int8.md compares
these steps with others.
"""

import copy
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from lab.onnx_models import quiet, require_onnx, to_onnx

CALIBRATION = 512  # training images
LOWEST_OPSET = 13  # the first that quantizes per channel
# The least activation that counts, relative to the largest of its layer. Without it, channels that
# are nearly dead would get very large weights.
LEAST = 0.01
# The product and the sum of a SeparateConv2d are left out: in int8 they would round the activation
# three times instead of once.
INT8_OPERATIONS = ['Conv', 'Gemm', 'Relu', 'MaxPool', 'ReduceMean', 'Reshape']


def int8_onnx(net, inputs, metadata, opset=None, begin=lambda step: None):
    """The bytes of an int8 .onnx file of a folded DiracNet, in ONNX Runtime's QDQ format.

    Args:
        inputs: normalized training images (N, C, H, W), to find the ranges of activations with.
        metadata, opset: see `onnx_models.to_onnx`.
        begin: called with the name of each step that takes seconds, when it begins.

    Raises:
        UserError: a package is not installed, or the opset does not fit the network.
    """
    require_onnx()
    import onnx
    from onnxruntime.quantization import QuantType, quantize_static

    batches = ({'images': batch.contiguous().numpy()} for batch in inputs.split(64))
    begin('tracing, converting')
    net = separate(equalize(net, inputs))
    model = to_onnx(net, inputs.shape[1:], metadata, opset, LOWEST_OPSET)
    layers = [node.name for node in model.graph.node if node.op_type in ('Conv', 'Gemm')]
    begin(f'calibrating on {len(inputs)} training images, quantizing')
    with quiet(), tempfile.TemporaryDirectory() as folder:
        float_path, int8_path = Path(folder) / 'float.onnx', Path(folder) / 'int8.onnx'
        onnx.save(model, float_path)  # older releases change a model that they get as an object
        quantize_static(
            str(float_path),
            str(int8_path),
            SimpleNamespace(get_next=lambda: next(batches, None)),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=INT8_OPERATIONS,
            nodes_to_exclude=[layers[0], layers[-1]],
        )
        content = int8_path.read_bytes()
    onnx.checker.check_model(content)
    return content


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
def equalize(net, inputs):
    """A copy of a DiracNet that computes the same, with similar activation ranges in all channels.

    The output channels of each layer are divided by the root of their largest activation; the
    weights of the next layer are multiplied by the same factors. Without the root the ranges would
    become equal, but the next layer's weights would differ more.

    Args:
        inputs: images (N, C, H, W) to find the largest activations with.
    """
    net = copy.deepcopy(net)
    layers = [module for module in net.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    largest = largest_activations(net, inputs, layers[:-1])
    for layer, following in zip(layers, layers[1:]):
        scale = largest[layer]  # (C,)
        scale = scale.clamp(min=LEAST * scale.max().clamp(min=1e-12))
        scale = scale**0.5 / (scale**0.5).log().mean().exp()
        layer.weight /= scale.view(-1, 1, 1, 1)
        layer.bias /= scale
        following.weight *= scale.view(1, -1, *[1] * (following.weight.ndim - 2))
    return net


def largest_activations(net, inputs, convolutions):
    """{convolution: the largest output of each of its channels after ReLU, (C,)}."""
    largest = {}

    def hook(convolution, _, output):
        largest[convolution] = output.relu().amax((0, 2, 3))

    handles = [convolution.register_forward_hook(hook) for convolution in convolutions]
    net(inputs)
    for handle in handles:
        handle.remove()
    return largest

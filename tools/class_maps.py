"""Class activation maps: where in an image the evidence for a class is.

A chain ends in a global average pool and one linear layer. Both are linear, so the layer can just
as well be applied before the pool: the mean of the resulting map, plus the bias, is exactly the
logit. Source: Zhou et al., Learning Deep Features for Discriminative Localization, arXiv
1512.04150.
"""

import cv2
import numpy as np
import torch
from torch import nn

from lab.errors import UserError
from lab.onnx_models import OnnxNetwork, quiet, require_onnx

SIDE = 224  # pixels of a picture at least
TOLERANCE = 0.05  # of the largest logit: int8 rounds between the map and the logits


@torch.inference_mode()
def class_maps(net, inputs):
    """The map of each class: its evidence at each position of the last features.

    Args:
        net: a folded network, or an OnnxNetwork that ends like one.
        inputs: normalized images, (N, C, H, W).

    Returns:
        maps: float32 (N, num_classes, h, w). In the CIFAR form, h is H / 4; in the ImageNet form,
            H / 32.
        bias: (num_classes,). maps.mean((2, 3)) + bias are the logits.

    Raises:
        UserError: the file of an OnnxNetwork does not end in a global average pool and one linear
            layer.
    """
    if not isinstance(net, OnnxNetwork):
        features, weight, bias = _last_features(net, inputs), net.fc.weight, net.fc.bias
        return torch.einsum('kc,nchw->nkhw', weight.float(), features.float()), bias.float()
    require_onnx(['onnx', 'onnxruntime'])
    try:
        features, weight, bias, logits = _onnx_parts(net, inputs)
        maps = torch.einsum('kc,nchw->nkhw', weight, features)
        error = (maps.mean((2, 3)) + bias - logits).abs().max()
        if not error <= TOLERANCE * logits.abs().max():
            raise ValueError
    except Exception:  # whatever the graph of another network leads to
        raise UserError(
            f'{net.path} has no class activation maps: they need a network that ends in a global '
            'average pool and one linear layer'
        ) from None
    return maps, bias


def _last_features(net, inputs):
    """What a folded network's global average pool gets, (N, C, h, w)."""
    [pool] = [part for part in net.modules() if isinstance(part, nn.AdaptiveAvgPool2d)]
    features = []
    with pool.register_forward_pre_hook(lambda pool, args: features.append(args[0])):
        net(inputs)
    return features[0]


def _onnx_parts(net, inputs):
    """Features (N, C, h, w) before the pool of an OnnxNetwork, weight (K, C) and bias (K,) of its
    last layer, and logits (N, K), from its graph with more outputs."""
    import onnx
    import onnxruntime

    model = onnx.load(net.path)
    producers = {name: node for node in model.graph.node for name in node.output}
    node = producers[net.output.name]
    _, weight, bias = node.input
    while node.op_type not in ('ReduceMean', 'GlobalAveragePool'):
        node = producers[node.input[0]]
    values = (node.input[0], weight, bias, net.output.name)
    outputs = [f'class_maps.{i}' for i in range(len(values))]
    for value, output in zip(values, outputs):  # a weight of the file cannot itself be an output
        model.graph.node.append(onnx.helper.make_node('Identity', [value], [output]))
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(output))
    with quiet():
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), providers=['CPUExecutionProvider']
        )
        arrays = session.run(outputs, {net.input.name: inputs.float().numpy()})
    return [torch.from_numpy(array).float() for array in arrays]


# --- pictures --------------------------------------------------------------------------------


def draw(image, class_map):
    """A picture of an image and, right of it, the map of a class over it.

    Red is evidence for the class, blue against it; the strongest has the full color.

    Args:
        image: uint8, (H, W, 1) or (H, W, 3), RGB.
        class_map: (h, w); None draws the image alone.

    Returns:
        uint8 (SIDE, 2 * SIDE, 3), or larger if the image is; RGB.
    """
    size = max(SIDE, *image.shape[:2])
    image = cv2.resize(np.ascontiguousarray(image), (size, size), interpolation=cv2.INTER_NEAREST)
    if image.ndim == 2:
        image = np.repeat(image[:, :, None], 3, axis=2)
    if class_map is None:
        return image
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[:, :, None].astype(np.float32)
    strength = np.asarray(class_map, np.float32)
    strength = strength / max(np.abs(strength).max(), np.finfo(np.float32).tiny)
    strength = cv2.resize(strength, (size, size), interpolation=cv2.INTER_LINEAR)[:, :, None]
    color = np.where(strength > 0, np.float32([220, 30, 30]), np.float32([30, 60, 220]))
    share = 0.7 * np.abs(strength)
    return np.hstack([image, ((1 - share) * gray + share * color).round().astype(np.uint8)])


def add_caption(picture, *lines):
    """A picture, uint8 (H, W, 3), with lines of text below it. OpenCV 4 has ASCII only."""
    height, size = 22, 0.5
    strip = np.full((height * len(lines) + 6, picture.shape[1], 3), 255, np.uint8)
    for i, line in enumerate(lines, 1):
        place = (6, height * i - 4)
        cv2.putText(strip, line, place, cv2.FONT_HERSHEY_SIMPLEX, size, (0, 0, 0), 1, cv2.LINE_AA)
    return np.vstack([picture, strip])


def encode_png(picture):
    """The bytes of a PNG of a picture, uint8 (H, W, 3), RGB."""
    _, content = cv2.imencode('.png', cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    return content.tobytes()

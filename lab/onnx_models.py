"""Networks as ONNX: the export of a module, and the ONNX Runtime session that runs it."""

import contextlib
import importlib
import io
import json
import logging
import warnings
from pathlib import Path

import numpy as np
import torch

from lab.errors import OptionError, UserError
from lab.files import size_of
from lab.runs.checkpoint import check_metadata

PACKAGES = ('onnx', 'onnxruntime', 'onnxscript')
# Opsets of .onnx files. Before 9, a weight had to be an input of the graph, too. The oldest ONNX
# Runtime in requirements.txt runs 21. torch's exporter writes no opset before 18.
LOWEST_OPSET, EXPORTER_OPSET, HIGHEST_OPSET = 9, 18, 21
# Operators that compute the same in all of them, apart from what `_lower` changes.
STABLE = {'Add', 'Concat', 'Conv', 'Gemm', 'Max', 'MaxPool', 'Min', 'Mul', 'Relu', 'Reshape'}
STABLE.add('ReduceMean')


def require_onnx(packages=PACKAGES):
    """Import the optional packages for .onnx files. Raises UserError if one is not installed."""
    try:
        for package in packages:
            importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            f'.onnx files need {error.name or "a package"}, which is not installed: '
            f'pip install {" ".join(PACKAGES)}'
        ) from None


@contextlib.contextmanager
def quiet():
    """Silence the progress reports and warnings of exporters; errors still raise exceptions."""
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


# --- running ---------------------------------------------------------------------------------


class OnnxNetwork:
    """An ONNX image classifier in ONNX Runtime, on the CPU.

    Called with normalized images (N, C, H, W), it returns float32 logits (N, num_classes).
    `classes` and `preprocessing` come from the file's metadata, or are None; `network` has the
    `in_channels` and `num_classes` of its input and output.

    Args:
        model: a path, or the content of a file as bytes.

    Raises:
        UserError: ONNX Runtime is not installed, or the file is missing, broken or not an image
            classifier.
    """

    def __init__(self, model):
        require_onnx(['onnxruntime'])
        import onnxruntime

        self.path = 'the ONNX model' if isinstance(model, bytes) else Path(model).expanduser()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors are reported below
        try:
            if isinstance(model, bytes):
                content = model
            else:
                size_of(self.path)
                content = self.path.read_bytes()
            self.session = onnxruntime.InferenceSession(
                content, options, providers=['CPUExecutionProvider']
            )
            [self.input], [self.output] = self.session.get_inputs(), self.session.get_outputs()
            _, in_channels, _, _ = self.input.shape
            _, num_classes = self.output.shape
            self.network = {'in_channels': in_channels, 'num_classes': num_classes}
            if self.output.type != 'tensor(float)':
                raise ValueError(f'its output is a {self.output.type}')
            metadata = self.session.get_modelmeta().custom_metadata_map
            self.classes = json.loads(metadata.get('classes', 'null'))
            self.preprocessing = json.loads(metadata.get('preprocessing', 'null'))
            check_metadata(self.network, self.classes, self.preprocessing)
        except Exception as error:  # ONNX Runtime's errors have no common class
            raise UserError(
                f'{self.path} is not an ONNX image classifier that can be read ({_reason(error)}): '
                'pass a file that tools.export wrote'
            ) from None

    def __call__(self, inputs):
        array = np.ascontiguousarray(inputs.float().numpy())
        try:
            [logits] = self.session.run([self.output.name], {self.input.name: array})
            if logits.ndim != 2 or len(logits) != len(array):
                raise ValueError(f'it returns logits of the shape {logits.shape}')
        except Exception as error:
            raise UserError(
                f'{self.path} cannot classify images of the shape {array.shape} '
                f'({_reason(error)}): export it again'
            ) from None
        return torch.from_numpy(logits)


def _reason(error):
    """Our own message, or the name of an error of ONNX Runtime, whose messages fill a page."""
    if isinstance(error, OSError):
        return error.strerror
    return error if isinstance(error, ValueError) else type(error).__name__


# --- exporting -------------------------------------------------------------------------------


def to_onnx(net, shape, metadata, opset=None, lowest=LOWEST_OPSET):
    """Export a module as an onnx.ModelProto that the ONNX checker accepts.

    Its input is `images`, float32 (batch, *shape), its output `logits`, (batch, num_classes),
    with any batch size. Weights have their names in the state dict, nodes those of their modules.

    Args:
        net: an image classifier in evaluation mode, such as a DiracNet.
        shape: (C, H, W).
        metadata: a dict of values that JSON can represent, for the model's metadata_props.
        opset: from `lowest` to HIGHEST_OPSET; None for the lowest that has the network's operators.

    Raises:
        OptionError: the opset does not have them.
    """
    require_onnx()
    import onnx

    with quiet():
        program = torch.onnx.export(
            net,
            (torch.zeros(2, *shape),),
            dynamo=True,
            verbose=False,
            input_names=['images'],
            output_names=['logits'],
            dynamic_shapes=({0: torch.export.Dim('batch')},),
            opset_version=max(opset or lowest, EXPORTER_OPSET),
        )
    model = program.model_proto
    newer = sorted({node.op_type for node in model.graph.node} - STABLE)
    if newer:
        lowest = EXPORTER_OPSET
    elif any(node.op_type == 'Gemm' and len(node.input) == 2 for node in model.graph.node):
        newer, lowest = ['Gemm without bias'], max(lowest, 11)  # as of a new network, where it is 0
    opset = opset or lowest
    if opset < lowest:
        raise OptionError(
            f'--opset {opset} is too low: our files of networks with {", ".join(newer)} '
            f'need one from {lowest} to {HIGHEST_OPSET}'
        )
    if opset < EXPORTER_OPSET:
        _lower(model, opset)
    # Old runtimes refuse a newer version of the format.
    model.ir_version = onnx.helper.find_min_ir_version_for(model.opset_import)
    _name_after_modules(model.graph)
    _remove_traces(model.graph)
    onnx.helper.set_model_props(model, {key: json.dumps(value) for key, value in metadata.items()})
    onnx.checker.check_model(model, full_check=True)
    return model


def _lower(model, opset):
    """Change a model of STABLE operators from EXPORTER_OPSET to an earlier opset."""
    import onnx

    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == 'ReduceMean':  # its axes were an attribute, and counted from the front
            axes = weights[node.input.pop()]
            values = [axis % 4 for axis in onnx.numpy_helper.to_array(axes).tolist()]
            node.attribute.append(onnx.helper.make_attribute('axes', values))
            model.graph.initializer.remove(axes)
        # The exporter writes defaults, too, also those of attributes that came later.
        known = onnx.defs.get_schema(node.op_type, opset).attributes
        for attribute in list(node.attribute):
            if attribute.name not in known:
                node.attribute.remove(attribute)
    model.opset_import[0].version = opset


def _name_after_modules(graph):
    """Give each node a name of its own, that of its module."""
    taken = set()
    for node in graph.node:
        node.name = _node_name(node)
        while node.name in taken:
            node.name += '_'
        taken.add(node.name)


def _node_name(node):
    """The name of a layer's module; for other operations, the module's name and the operation."""
    module = ''
    for prop in node.metadata_props:
        if prop.key == 'pkg.torch.onnx.name_scopes':
            # The node's scopes as text: ['', 'features', 'features.conv', 'conv2d'].
            module = prop.value.strip('[]').replace("'", '').split(', ')[-2]
    if node.op_type in ('Conv', 'Gemm'):
        return module
    return f'{module}.{node.op_type}' if module else node.op_type


def _remove_traces(graph):
    """Remove the exporter's notes on the source code, which are several times as large as the
    graph and contain local paths."""
    for part in (*graph.node, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
    del graph.value_info[:]
    del graph.metadata_props[:]

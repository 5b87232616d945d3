"""ONNX files that are broken, hostile or of another network: each is refused in one line."""

import json
import math
import os

import numpy as np
import pytest

import train
from lab.data.datasets import PREPROCESSING
from tools import export, plot, predict

onnx = pytest.importorskip('onnx')
DIGITS = PREPROCESSING['digits'].as_dict()


def onnx_file(path, metadata, shape=('batch', 1, 8, 8), last=None, kind=1):
    """An ONNX file with two classes, whose logits are zeros.

    Args:
        last: the operation from `sums` to `logits`, its inputs and its attributes.
        kind: the type of the logits.
    """
    value = onnx.helper.make_tensor_value_info
    operation, n_inputs, attributes = last or ('Identity', 1, {})
    nodes = [
        onnx.helper.make_node('Flatten', ['images'], ['flat']),
        onnx.helper.make_node('MatMul', ['flat', 'weight'], ['sums']),
        onnx.helper.make_node(operation, ['sums'] * n_inputs, ['logits'], **attributes),
    ]
    weight = np.zeros((shape[2] * shape[3], 2), np.float32)
    graph = onnx.helper.make_graph(
        nodes,
        'net',
        [value('images', 1, shape)],
        [value('logits', kind, ('batch', 2))],
        [onnx.numpy_helper.from_array(weight, 'weight')],
    )
    opset = onnx.helper.make_opsetid('', 18)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9)
    onnx.helper.set_model_props(model, {'preprocessing': json.dumps(DIGITS), **metadata})
    onnx.save(model, path)


def test_a_sound_file(tmp_path, call, digit_files):
    onnx_file(tmp_path / 'net.onnx', {'classes': '["a", "b"]'})
    result = call(predict.main, tmp_path / 'net.onnx', digit_files)
    assert result.status == 0 and result.out.count('50.0 %') == 2 * 40


@pytest.mark.parametrize(
    'metadata',
    [
        {'classes': '["a"]'},
        {'classes': '[1, 2]'},
        {'classes': '{"a": 1}'},
        {'classes': 'a, b'},
        {'preprocessing': 'null'},  # and no --dataset
        {'preprocessing': '[]'},
        {'preprocessing': json.dumps({**DIGITS, 'channels': 3})},
        {'preprocessing': json.dumps({**DIGITS, 'mean': [math.nan]})},
        {'preprocessing': json.dumps({**DIGITS, 'std': [0]})},
        {'preprocessing': json.dumps({**DIGITS, 'image_size': 9, 'resize': 9})},
    ],
    ids=str,
)
def test_metadata(metadata, tmp_path, refused, digit_files):
    onnx_file(tmp_path / 'net.onnx', metadata)
    refused(1, 'net.onnx', predict.main, tmp_path / 'net.onnx', digit_files)


@pytest.mark.parametrize(
    'changes',
    [
        {'shape': ('batch', 1, 8, 9)},
        {'last': ('Concat', 2, {'axis': 0})},  # two rows for each image
        {'last': ('Shape', 1, {})},
        {'last': ('ReduceSum', 1, {})},
        {'last': ('Cast', 1, {'to': 7}), 'kind': 7},  # int64
        {'last': ('Cast', 1, {'to': 8}), 'kind': 8},  # string
    ],
    ids=str,
)
def test_another_input_or_output(changes, tmp_path, refused, digit_files):
    onnx_file(tmp_path / 'net.onnx', {}, **changes)
    refused(1, 'net.onnx', predict.main, tmp_path / 'net.onnx', digit_files)


@pytest.mark.parametrize('name', ['pipe', 'none', 'empty', 'text', 'cut'])
def test_no_onnx_file(name, tmp_path, refused, digit_files, deadline):
    path = tmp_path / f'{name}.onnx'
    if name == 'pipe':
        os.mkfifo(path)
    elif name == 'cut':
        onnx_file(path, {})
        path.write_bytes(path.read_bytes()[:200])
    elif name != 'none':
        path.write_bytes(b'hello' if name == 'text' else b'')
    refused(1, path.name, predict.main, path, digit_files)


def test_programs_for_other_files(tmp_path, refused):
    path = tmp_path / 'net.onnx'
    onnx_file(path, {})
    for main, *arguments in (
        (export.main, path, tmp_path / 'out.pth'),
        (train.main, '--evaluate', path),
        (plot.main, path, '--graph', '--out', tmp_path / 'graph.png'),
    ):
        refused(1, ['net.onnx', 'tools.predict'], main, *arguments)

"""ONNX files that are broken or hostile: tools.predict refuses them, each in one line."""

import json
import math
import os

import numpy as np
import pytest

import train
from lab.data.datasets import PREPROCESSING
from tools import export, plot, predict


def onnx_file(path, metadata, shape=('batch', 1, 8, 8), last=None, kind=1):
    """An ONNX file with two classes, whose logits are zeros.

    last: makes the node from `sums` to `logits`; kind: the type of the logits.
    """
    onnx = pytest.importorskip('onnx')
    value = onnx.helper.make_tensor_value_info
    pixels = shape[2] * shape[3]
    nodes = [
        onnx.helper.make_node('Flatten', ['images'], ['flat']),
        onnx.helper.make_node('MatMul', ['flat', 'weight'], ['sums']),
        last or onnx.helper.make_node('Identity', ['sums'], ['logits']),
    ]
    weight = onnx.numpy_helper.from_array(np.zeros((pixels, 2), np.float32), 'weight')
    graph = onnx.helper.make_graph(
        nodes,
        'net',
        [value('images', 1, shape)],
        [value('logits', kind, ('batch', 2))],
        [weight],
    )
    opset = onnx.helper.make_opsetid('', 18)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9)
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, path)


DIGITS = PREPROCESSING['digits'].as_dict()
# Of an .onnx file: its metadata, and the words that the line must have.
ONNX = [
    ({'classes': '["a"]'}, ['classes', '1 names', '2']),
    ({'classes': '[1, 2]'}, ['classes', 'names']),
    ({'classes': '{"a": 1}'}, ['classes']),
    ({'classes': 'a, b'}, ['line 1 column 1']),
    ({'preprocessing': '[]'}, ['preprocessing']),
    ({'preprocessing': json.dumps({**DIGITS, 'channels': 3})}, ['preprocessing', 'channels']),
    ({'preprocessing': json.dumps({**DIGITS, 'mean': [math.nan]})}, ['preprocessing', 'mean']),
    ({'preprocessing': json.dumps({**DIGITS, 'std': [0]})}, ['preprocessing', 'std']),
    ({'preprocessing': json.dumps({**DIGITS, 'resize': 4})}, ['preprocessing', '4']),
    ({'preprocessing': json.dumps({**DIGITS, 'image_size': 9, 'resize': 9})}, ['8 pixels']),
]


@pytest.mark.parametrize('metadata, words', ONNX)
def test_facts_in_an_onnx_file(metadata, words, tmp_path, refused):
    path = tmp_path / 'net.onnx'
    onnx_file(path, {'preprocessing': json.dumps(DIGITS), **metadata})
    refused(1, ['net.onnx', *words], predict.main, path, __file__)


def test_onnx_files_that_are_no_files_or_do_not_run(tmp_path, refused, call, digit_files, deadline):
    os.mkfifo(tmp_path / 'pipe.onnx')
    refused(1, ['pipe.onnx', 'regular'], predict.main, tmp_path / 'pipe.onnx', __file__)
    refused(2, ['~nobody'], predict.main, '~nobody.onnx', __file__)
    sound, wrong = tmp_path / 'sound.onnx', tmp_path / 'wrong.onnx'
    facts = {'preprocessing': json.dumps(DIGITS), 'classes': '["a", "b"]'}
    onnx_file(sound, facts)
    result = call(predict.main, sound, digit_files)
    assert result.status == 0 and result.out.count('50.0 %') == 2 * 40
    onnx_file(wrong, facts, shape=('batch', 1, 8, 9))  # its images must be 9 pixels wide
    refused(1, ['wrong.onnx', '(40, 1, 8, 8)'], predict.main, wrong, digit_files)


def node(operation, *inputs, **attributes):
    onnx = pytest.importorskip('onnx')
    return onnx.helper.make_node(operation, inputs, ['logits'], **attributes)


# What the file does to the logits, and the words that the line must have.
OUTPUTS = [
    (lambda: {'last': node('Concat', 'sums', 'sums', axis=0)}, ['(80, 2)', '40 images']),
    (lambda: {'last': node('Shape', 'sums')}, ['ONNX']),
    (lambda: {'last': node('ReduceSum', 'sums')}, ['(1, 1)', '40 images']),
    (lambda: {'last': node('Cast', 'sums', to=7), 'kind': 7}, ['int64']),
    (lambda: {'last': node('Cast', 'sums', to=9), 'kind': 9}, ['bool']),
    (lambda: {'last': node('Cast', 'sums', to=8), 'kind': 8}, ['string']),
]


@pytest.mark.parametrize('make, words', OUTPUTS)
def test_logits_of_another_form(make, words, tmp_path, refused, digit_files):
    path = tmp_path / 'net.onnx'
    onnx_file(path, {'preprocessing': json.dumps(DIGITS)}, **make())
    refused(1, ['net.onnx', *words], predict.main, path, digit_files)


def test_other_programs_name_the_one_that_reads_them(tmp_path, refused):
    path = tmp_path / 'net.onnx'
    onnx_file(path, {})
    for main, *options in (
        (export.main, tmp_path / 'out.pth'),
        (train.main, '--evaluate'),
        (plot.main, '--graph', '--out', tmp_path / 'graph.png'),
    ):
        command = [*options, path] if '--evaluate' in options else [path, *options]
        refused(1, ['net.onnx', 'tools.predict'], main, *command)

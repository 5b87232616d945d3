"""tools.export: each format against the unfolded network, its metadata, and what it refuses."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import ROOT, python, read_log
from diracnet import DiracNet
from lab.data import datasets
from lab.data.preprocessing import fit_whitening, normalize
from lab.folded import FoldedNetwork
from lab.runs import checkpoint
from tools import export, int8, predict
from tools.export import load_exported

FORMATS = ('.pth', '.unfolded.pth', '.pt2', '.onnx', '.int8.onnx')


@pytest.fixture(scope='module')
def onnx():
    pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    return pytest.importorskip('onnx')


@pytest.fixture(scope='module')
def exported(onnx, digits_run, tmp_path_factory):
    """All formats of the run, from one command in a process of its own: {suffix: path}, and what
    the command printed."""
    folder = tmp_path_factory.mktemp('exported')
    paths = {suffix: folder / 'new' / f'digits{suffix}' for suffix in FORMATS}
    result = python('-m', 'tools.export', digits_run, *paths.values())
    # A line for each step as it begins; the exporters' own messages are silenced.
    *_, end = lines = result.err.splitlines()
    assert result.status == 0 and len(lines) == 11 and str(paths['.int8.onnx']) in end, result
    return paths, result.out


def rows(out):
    """{file: (error, top-1, unfolded, bytes)} from the printed table."""
    lines = [line for line in out.splitlines() if line.startswith('| ')]
    cells = [[cell.strip() for cell in line.split('|')[1:-1]] for line in lines[2:]]
    return {row[0]: row[1:] for row in cells}


def percent(cell):
    return float(cell.removesuffix(' %'))


def test_table(exported, digits_run):
    paths, out = exported
    assert '171,754 parameters' in out and '360 test images' in out
    table = rows(out)
    accuracy = read_log(digits_run)[-1]['test_acc']
    _, top1, _, size = table.pop('(unfolded)')
    assert percent(top1) == pytest.approx(accuracy, abs=0.01) and size == ''  # of no file
    assert list(table) == [str(path) for path in paths.values()]
    for path, (_, top1, before, size) in table.items():
        assert int(size.replace(',', '')) == Path(path).stat().st_size
        assert percent(before) == pytest.approx(accuracy, abs=0.01)
        assert percent(top1) >= accuracy - 0.51
    assert paths['.int8.onnx'].stat().st_size < 0.4 * paths['.onnx'].stat().st_size
    assert len(list(paths['.pth'].parent.iterdir())) == len(FORMATS)


@pytest.mark.parametrize('suffix', FORMATS)
def test_logits_by_hand(suffix, exported, digits_run):
    """Without the tool's own comparison, and for batch sizes that it does not use."""
    module = checkpoint.load(digits_run).module()
    pixels, _ = datasets.load('digits', '.').train
    for n in (1, 3, 70):
        inputs = normalize(pixels[-n:], datasets.PREPROCESSING['digits'])
        with torch.no_grad():
            expected = module(inputs)
            logits = load_exported(exported[0][suffix])(inputs)
        assert logits.shape == (n, 10)
        error = (logits - expected).abs().max() / expected.abs().max()
        assert error < (0.3 if suffix == '.int8.onnx' else 1e-5)
        assert (error > 1e-4) == (suffix == '.int8.onnx')


def test_metadata(exported, onnx, digits_run):
    paths, _ = exported
    contents = [torch.load(paths[s], weights_only=True) for s in ('.pth', '.unfolded.pth')]
    state_dicts = [content.pop('state_dict') for content in contents]
    extra_files = {'metadata.json': ''}
    torch.export.load(str(paths['.pt2']), extra_files=extra_files)
    contents.append(json.loads(extra_files['metadata.json']))
    for suffix in ('.onnx', '.int8.onnx'):
        properties = onnx.load(paths[suffix]).metadata_props
        ours = [prop for prop in properties if not prop.key.startswith('onnx.')]
        contents.append({prop.key: json.loads(prop.value) for prop in ours})
    expected = {
        'network': checkpoint.load(digits_run).network,
        'classes': list('0123456789'),
        'preprocessing': datasets.PREPROCESSING['digits'].as_dict(),
    }
    assert all(content == expected for content in contents)
    DiracNet(16, 1, 'digits').load_state_dict(state_dicts[0])
    params = torch.load(digits_run / 'model.pt7', weights_only=True)['params']
    assert state_dicts[1].keys() == params.keys()
    assert all(torch.equal(state_dicts[1][key], tensor) for key, tensor in params.items())


@pytest.mark.parametrize('suffix, opsets', [('.onnx', (9, 21)), ('.int8.onnx', (13, 21))])
def test_opset(suffix, opsets, exported, onnx, digits_run, tmp_path, call, refused):
    """The default is the lowest; the highest computes the same. Old runtimes load no newer version
    of the format than they know, so that is the lowest, too."""
    lowest, highest = opsets
    out = tmp_path / f'net{suffix}'
    for opset in (lowest - 1, highest + 1):
        words = ['--opset', f'{lowest} to {highest}']
        refused(2, words, export.main, digits_run, out, '--opset', opset)
    assert call(export.main, digits_run, out, '--opset', highest).status == 0
    pixels, _ = datasets.load('digits', '.').train
    inputs = normalize(pixels[-70:], datasets.PREPROCESSING['digits'])
    logits = []
    for path, opset in ((exported[0][suffix], lowest), (out, highest)):
        model = onnx.load(path)
        assert [entry.version for entry in model.opset_import] == [opset]
        assert model.ir_version == {9: 4, 13: 7, 21: 10}[opset]
        logits.append(load_exported(path)(inputs))
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5 * logits[0].abs().max().item())


def test_onnx_graphs(exported, onnx):
    paths, _ = exported
    models = {suffix: onnx.load(paths[suffix]) for suffix in ('.onnx', '.int8.onnx')}
    for model in models.values():
        onnx.checker.check_model(model, full_check=True)
        assert [value.name for value in model.graph.input] == ['images']
        assert [value.name for value in model.graph.output] == ['logits']
        assert str(ROOT).encode() not in model.SerializeToString()
    keys = set(torch.load(paths['.pth'], weights_only=True)['state_dict'])
    assert keys <= {tensor.name for tensor in models['.onnx'].graph.initializer}
    weights = {tensor.name: tensor for tensor in models['.int8.onnx'].graph.initializer}
    name = 'features.group2.block3.conv.weight'
    assert weights[f'{name}_quantized'].data_type == onnx.TensorProto.INT8
    assert weights[f'{name}_scale'].dims == [64]  # per channel


def test_folded_checkpoint_and_force(exported, tmp_path, call, refused):
    folded, out = exported[0]['.pth'], tmp_path / 'again.pth'
    refused(1, 'folded', export.main, folded, tmp_path / 'again.unfolded.pth')
    out.write_text('mine')
    refused(2, ['again.pth', '--force'], export.main, folded, out)
    assert out.read_text() == 'mine'
    link = tmp_path / 'link.pth'
    link.symlink_to('nowhere')
    refused(2, ['link.pth', '--force'], export.main, folded, link)
    assert call(export.main, folded, out, '--force').status == 0
    assert out.read_bytes() == folded.read_bytes()


def test_predict(exported, digits_run, digit_files, call):
    outputs = []
    for path in (digits_run, exported[0]['.onnx'], exported[0]['.int8.onnx']):
        result = call(predict.main, path, digit_files, '--json')
        assert result.status == 0, result
        outputs.append([json.loads(line) for line in result.out.splitlines()])
    classes = [[line['classes'][0] for line in lines] for lines in outputs]
    assert len(classes[0]) == 40 and classes[0] == classes[1]
    assert sum(map(str.__eq__, classes[0], classes[2])) >= 38
    for ours, theirs in zip(*outputs[:2]):
        np.testing.assert_allclose(ours['probabilities'], theirs['probabilities'], atol=1e-5)


# --- files that do not pass the comparison ---------------------------------------------------


def test_a_wrong_fold_is_found(digits_run, tmp_path, call, monkeypatch):
    fold = checkpoint.Checkpoint.fold

    def fold_wrongly(self):
        net = fold(self)
        with torch.no_grad():
            net.features.group1.block2.conv.weight[3, 3, 1, 1] *= 1.01
        return net

    out = tmp_path / 'out.pth'
    out.write_text('mine')
    monkeypatch.setattr(checkpoint.Checkpoint, 'fold', fold_wrongly)
    result = call(export.main, digits_run, out, '--force')
    assert result.status == 1 and str(out) in result.err.splitlines()[-1], result
    assert float(rows(result.out)[str(out)][0]) > 1e-4
    assert [path.name for path in tmp_path.iterdir()] == ['out.pth'] and out.read_text() == 'mine'


def test_a_bad_int8_is_found(onnx, digits_run, tmp_path, call, monkeypatch):
    sample_images = FoldedNetwork.sample_images

    def sample_dark_images(self, train, n):
        inputs, targets = sample_images(self, train, n)
        # The ranges found by calibration become far too small.
        return (0.02 * inputs if train else inputs), targets

    monkeypatch.setattr(int8, 'CALIBRATION', 1)
    monkeypatch.setattr(FoldedNetwork, 'sample_images', sample_dark_images)
    out = tmp_path / 'out.int8.onnx'
    result = call(export.main, digits_run, out)
    assert result.status == 1 and str(out) in result.err.splitlines()[-1], result
    _, after, before, _ = rows(result.out)[str(out)]
    assert percent(after) < percent(before) - 0.5
    assert list(tmp_path.iterdir()) == []


# --- bad input -------------------------------------------------------------------------------


def test_without_stored_preprocessing(digits_run, tmp_path, call, refused):
    bare, out = tmp_path / 'bare.pth', tmp_path / 'out.pth'
    torch.save(checkpoint.load(digits_run).fold().state_dict(), bare)
    for options in ((), ('--dataset', 'CIFAR10')):
        refused(1, ['bare.pth', '--dataset'], export.main, bare, out, *options)
    assert call(export.main, bare, out, '--dataset', 'digits').status == 0
    content = torch.load(out, weights_only=True)
    assert content['classes'] == list('0123456789') and content['network']['dataset'] == 'digits'
    assert content['preprocessing'] == datasets.PREPROCESSING['digits'].as_dict()


def test_without_the_data_set(onnx, tmp_path, call, refused):
    """Float formats are compared on noise, and the output says so; int8 cannot be calibrated."""
    net = tmp_path / 'net.pth'
    torch.save(DiracNet(10, 0.25, 'FashionMNIST').state_dict(), net)
    options = ('--dataset', 'FashionMNIST', '--dataroot', tmp_path / 'nowhere')
    result = call(export.main, net, tmp_path / 'out.pth', *options)
    assert result.status == 0 and 'noise' in result.out
    refused(1, 'out.int8.onnx', export.main, net, tmp_path / 'out.int8.onnx', *options)


@pytest.mark.parametrize('module', ['onnxruntime', 'onnx', 'onnxscript'])
def test_onnx_is_not_installed(module, digits_run, tmp_path, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    words = [module, 'pip install onnx onnxruntime onnxscript']
    refused(1, words, export.main, digits_run, tmp_path / 'out.onnx')
    if module == 'onnxruntime':
        refused(1, words, predict.main, tmp_path / 'net.onnx', tmp_path)


def test_whitening_does_not_fit_into_metadata(onnx, digits_run, tmp_path, refused):
    content = torch.load(digits_run / 'model.pt7', weights_only=True)
    images, _ = datasets.load('digits', '.').train
    content['preprocessing']['whitening'] = fit_whitening(images)
    content['options']['preprocess'] = 'zca'
    torch.save(content, tmp_path / 'zca.pt7')
    for name in ('out.onnx', 'out.int8.onnx', 'out.pt2'):
        refused(1, name, export.main, tmp_path / 'zca.pt7', tmp_path / name)

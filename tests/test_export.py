"""tools.export: every format against the unfolded network, its metadata, what makes it fail, and prediction from .onnx."""

import json
import sys

import numpy as np
import pytest
import torch

from lab.runs import checkpoint
from lab.data import datasets as data
from conftest import python
from diracnet import DiracNet, fold
from lab.data.preprocessing import fit_whitening, normalize
from tools import export, predict, quantize

FORMATS = ('.pth', '.pt2', '.onnx', '.int8.onnx')


@pytest.fixture(scope='module')
def onnx():
    pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    return pytest.importorskip('onnx')


@pytest.fixture(scope='module')
def exported(onnx, digits_run, tmp_path_factory):
    """All formats of the run, written by one command, as a real process: a dict of paths, and its output."""
    folder = tmp_path_factory.mktemp('exported')
    paths = {suffix: folder / 'new' / f'digits{suffix}' for suffix in FORMATS}
    result = python('-m', 'tools.export', digits_run, *paths.values())
    assert result.status == 0 and result.err == '', (
        result
    )  # nothing of the exporters' chatter either
    return paths, result.out


def rows(out):
    """The table's rows by the end of their file names: (error, top-1, unfolded, bytes, ms, ms)."""
    lines = [
        [cell.strip() for cell in line.split('|')[1:-1]]
        for line in out.splitlines()
        if line.startswith('| ')
    ]
    return {cells[0]: cells[1:] for cells in lines[2:]}


def test_table(exported, digits_run):
    paths, out = exported
    assert '171,754 parameters; compared on 360 test images of digits' in out
    table = rows(out)
    accuracy = json.loads(
        (digits_run / 'log.txt').read_text().splitlines()[-1].removeprefix('json_stats: ')
    )['test_acc']
    assert float(table.pop('(unfolded)')[1].rstrip(' %')) == pytest.approx(accuracy, abs=0.01)
    assert list(table) == [str(path) for path in paths.values()]
    for suffix, path in paths.items():
        error, top1, before, size, *times = table[str(path)]
        assert int(size.replace(',', '')) == path.stat().st_size
        assert all(float(ms) > 0 for ms in times)
        assert float(before.rstrip(' %')) == pytest.approx(accuracy, abs=0.01)
        assert (
            float(error) < (0.5 if suffix == '.int8.onnx' else 1e-4)
            and float(top1.rstrip(' %')) >= accuracy - 0.51
        )
    assert paths['.int8.onnx'].stat().st_size < 0.4 * paths['.onnx'].stat().st_size
    assert sorted(path.name for path in paths['.pth'].parent.iterdir()) == sorted(
        f'digits{suffix}' for suffix in FORMATS
    )


@pytest.mark.parametrize('suffix', FORMATS)
def test_logits_by_hand(suffix, exported, digits_run):
    """Without the comparison of the tool itself: logits of other batch sizes than any it has used."""
    module = checkpoint.load(digits_run).module()
    pixels, _ = data.load('digits', '.').train
    for n in (1, 3, 70):
        inputs = normalize(pixels[-n:], data.PREPROCESSING['digits'])
        with torch.no_grad():
            reference = module(inputs)
            found = export.reload(exported[0][suffix], suffix)(inputs)
        assert found.shape == (n, 10)
        error = (found - reference).abs().max() / reference.abs().max()
        assert error < (0.3 if suffix == '.int8.onnx' else 1e-5) and (error > 1e-4) == (
            suffix == '.int8.onnx'
        )


def test_metadata_and_names(exported, onnx, digits_run):
    paths, _ = exported
    content = torch.load(paths['.pth'], weights_only=True)
    facts = {'metadata.json': ''}
    torch.export.load(str(paths['.pt2']), extra_files=facts)
    found = [json.loads(facts['metadata.json'])]
    for suffix in ('.onnx', '.int8.onnx'):
        model = onnx.load(paths[suffix])
        onnx.checker.check_model(model, full_check=True)
        found.append(
            {
                prop.key: json.loads(prop.value)
                for prop in model.metadata_props
                if not prop.key.startswith('onnx.')
            }
        )
        assert [value.name for value in model.graph.input] == ['images'] and [
            value.name for value in model.graph.output
        ] == ['logits']
        assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == 'batch'
        assert (
            str(export.ROOT).encode() not in model.SerializeToString()
        )  # no traces of where it was made
    for metadata in found:
        assert metadata['classes'] == list('0123456789') == content['classes']
        assert (
            metadata['preprocessing']
            == content['preprocessing']
            == data.PREPROCESSING['digits'].as_dict()
        )
        assert metadata['network'] == content['network'] == checkpoint.load(digits_run).network
    graph = onnx.load(paths['.onnx']).graph
    names = {tensor.name for tensor in graph.initializer}
    assert set(content['state_dict']) <= names and len(names) <= len(content['state_dict']) + 2
    assert {
        key.removesuffix('.weight') for key in content['state_dict'] if key.endswith('.weight')
    } <= {node.name for node in graph.node}
    weights = {tensor.name: tensor for tensor in onnx.load(paths['.int8.onnx']).graph.initializer}
    last = weights['features.group2.block3.conv.weight_quantized']
    assert last.data_type == onnx.TensorProto.INT8 and weights[
        'features.group2.block3.conv.weight_scale'
    ].dims == [64]  # per channel


def test_predict(exported, digits_run, digit_files, call):
    outputs = []
    for path in (digits_run, exported[0]['.onnx'], exported[0]['.int8.onnx']):
        result = call(predict.main, path, digit_files, '--json')
        assert result.status == 0, result
        outputs.append([json.loads(line) for line in result.out.splitlines()])
    run, float_onnx, int8 = outputs
    assert len(run) == 40
    for ours, theirs in zip(run, float_onnx):
        assert ours['image'] == theirs['image'] and ours['classes'][0] == theirs['classes'][0]
        np.testing.assert_allclose(ours['probabilities'], theirs['probabilities'], atol=1e-5)
    assert sum(ours['classes'][0] == theirs['classes'][0] for ours, theirs in zip(run, int8)) >= 19
    result = call(predict.main, exported[0]['.onnx'], sorted(digit_files.iterdir())[0], '--top', 2)
    assert result.status == 0 and result.out.count('%') == 2


def test_folded_checkpoint_and_force(exported, tmp_path, call, refused):
    out = tmp_path / 'again.onnx'
    out.write_text('mine')
    refused(2, ['again.onnx exists', '--force'], export.main, exported[0]['.pth'], out)
    assert out.read_text() == 'mine'
    assert call(export.main, exported[0]['.pth'], out, '--force').status == 0
    images = torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(
        predict.OnnxNetwork(out)(images),
        predict.OnnxNetwork(exported[0]['.onnx'])(images),
        rtol=0,
        atol=0,
    )


def test_a_wrong_fold_is_found(digits_run, tmp_path, call, monkeypatch):
    def wrong(params):
        folded = fold(params)
        folded['features.group1.block2.conv.weight'][3, 3, 1, 1] *= 1.01
        return folded

    out = tmp_path / 'out.pth'
    out.write_text('mine')
    monkeypatch.setattr(checkpoint, 'fold', wrong)
    result = call(export.main, digits_run, out, '--force')
    assert result.status == 1 and result.err.count('\n') == 1 and 'more than 0.0001' in result.err
    assert rows(result.out)[str(out)]  # the table says by how much
    assert [path.name for path in tmp_path.iterdir()] == ['out.pth'] and out.read_text() == 'mine'


def test_a_bad_int8_is_found(onnx, digits_run, tmp_path, call, monkeypatch):
    monkeypatch.setattr(quantize, 'CALIBRATION', 1)
    whole = export.pictures
    monkeypatch.setattr(
        export,
        'pictures',
        lambda about, train, n, span=None: (
            (0.02 * whole(about, train, n)[0], None) if train else whole(about, train, n)
        ),
    )  # ranges far too small
    result = call(export.main, digits_run, tmp_path / 'out.int8.onnx')
    assert result.status == 1 and 'points of top-1' in result.err
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_does_not_load_is_found(digits_run, tmp_path, refused, monkeypatch):
    monkeypatch.setattr(export, 'content', lambda about, suffix: b'broken')
    refused(1, ['out.pth', 'new process'], export.main, digits_run, tmp_path / 'out.pth')
    assert list(tmp_path.iterdir()) == []


def test_nan_is_an_error():
    logits = np.ones((2, 3))
    assert export.relative_error(logits, logits) == 0
    assert export.relative_error(logits * 1.5, logits) == 0.5
    assert export.relative_error(np.where(np.eye(2, 3), np.nan, 1), logits) > 1e300


def test_steps_compute_the_same():
    torch.manual_seed(0)
    net = DiracNet(16, 1, 'digits').eval()
    images = torch.randn(8, 1, 8, 8)
    with torch.no_grad():
        expected = net(images)
        for changed in (
            quantize.separate(net),
            quantize.equalize(net, images),
            quantize.separate(quantize.equalize(net, images)),
        ):
            torch.testing.assert_close(changed(images), expected, rtol=1e-3, atol=1e-4)
        apart = quantize.separate(net).features.group1.block1.conv
        assert (
            apart.diagonal.abs().min() > 0 and apart.weight[:, :, 1, 1].diagonal().abs().max() == 0
        )
        layer = quantize.equalize(net, images, power=1, least=1e-6).features
        ranges = layer[:3](images).amax((0, 2, 3))  # up to the last convolution of the first group
    assert ranges[ranges > 0].max() / ranges[ranges > 0].min() < 1.01
    assert (
        net.features.group1.block1.conv.weight[:, :, 1, 1].diagonal().abs().min() > 0
    )  # the given one is left as it is


# --- bad input -------------------------------------------------------------------------------------------------------


def test_unknown_suffix(digits_run, tmp_path, refused):
    for name in ('out.bin', 'out', 'out.pth.gz', 'int8'):
        refused(2, [name, '.int8.onnx', '.pt2'], export.main, digits_run, tmp_path / name)
    refused(2, 'out.bin', export.main, digits_run, tmp_path / 'fine.pth', tmp_path / 'out.bin')
    assert list(tmp_path.iterdir()) == []


def test_without_preprocessing_facts(digits_run, tmp_path, call, refused):
    torch.save(checkpoint.load(digits_run).fold().state_dict(), tmp_path / 'bare.pth')
    refused(1, ['bare.pth', '--dataset'], export.main, tmp_path / 'bare.pth', tmp_path / 'out.pth')
    refused(
        1,
        ['bare.pth', '--dataset'],
        export.main,
        tmp_path / 'bare.pth',
        tmp_path / 'out.pth',
        '--dataset',
        'CIFAR10',
    )
    refused(
        2, 'MNIST', export.main, tmp_path / 'bare.pth', tmp_path / 'out.pth', '--dataset', 'MNIST'
    )
    assert (
        call(export.main, tmp_path / 'bare.pth', tmp_path / 'out.pth', '--dataset', 'digits').status
        == 0
    )
    content = torch.load(tmp_path / 'out.pth', weights_only=True)
    assert content['classes'] == list('0123456789') and content['network']['dataset'] == 'digits'
    assert content['preprocessing'] == data.PREPROCESSING['digits'].as_dict()


def test_without_the_data_set(onnx, tmp_path, call, refused):
    """Floats are compared on noise, and it is said; int8 can't be calibrated."""
    torch.save(DiracNet(10, 0.25, 'FashionMNIST').state_dict(), tmp_path / 'net.pth')
    arguments = ('--dataset', 'FashionMNIST', '--dataroot', tmp_path / 'nowhere')
    result = call(export.main, tmp_path / 'net.pth', tmp_path / 'out.pth', *arguments)
    assert (
        result.status == 0
        and 'normal noise' in result.out
        and 'FashionMNIST was not found' in result.out
    )
    refused(
        1,
        ['training images', 'FashionMNIST', '--dataroot'],
        export.main,
        tmp_path / 'net.pth',
        tmp_path / 'out.int8.onnx',
        *arguments,
    )
    refused(1, ['FashionMNIST', '--dataroot'], quantize.main, tmp_path / 'net.pth', *arguments)


@pytest.mark.parametrize('module', ['onnxruntime', 'onnx', 'onnxscript'])
def test_onnx_runtime_is_not_installed(module, digits_run, tmp_path, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    remedy = 'pip install onnx onnxruntime onnxscript'
    for name in ('out.onnx', 'out.int8.onnx'):
        refused(1, [module, remedy], export.main, digits_run, tmp_path / name)
    if module == 'onnxruntime':
        refused(1, remedy, predict.main, tmp_path / 'net.onnx', tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_whitening_does_not_fit(onnx, digits_run, tmp_path, refused):
    content = torch.load(digits_run / 'model.pt7', weights_only=True)
    content['preprocessing']['whitening'] = fit_whitening(data.load('digits', '.').train[0])
    torch.save(content, tmp_path / 'zca.pt7')
    for name in ('out.onnx', 'out.int8.onnx', 'out.pt2'):
        refused(1, [name, 'zca', '.pth'], export.main, tmp_path / 'zca.pt7', tmp_path / name)


def test_broken_onnx(exported, digit_files, tmp_path, refused, onnx):
    whole = exported[0]['.onnx'].read_bytes()
    for name, part in (
        ('cut.onnx', whole[: len(whole) // 2]),
        ('empty.onnx', b''),
        ('text.onnx', b'hello'),
    ):
        (tmp_path / name).write_bytes(part)
        refused(1, [name, 'broken'], predict.main, tmp_path / name, digit_files)
    refused(1, 'none.onnx', predict.main, tmp_path / 'none.onnx', digit_files)
    model = onnx.load(exported[0]['.onnx'])
    del model.metadata_props[:]
    onnx.save(model, tmp_path / 'bare.onnx')
    refused(1, ['bare.onnx', '--dataset'], predict.main, tmp_path / 'bare.onnx', digit_files)
    refused(
        1,
        ['channels', '--dataset'],
        predict.main,
        tmp_path / 'bare.onnx',
        digit_files,
        '--dataset',
        'CIFAR10',
    )

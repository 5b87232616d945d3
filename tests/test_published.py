"""Published files: fetching them, and every layout that can be loaded. The files are made here, byte for byte in their formats."""

import hashlib
import json
import threading
from collections import OrderedDict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from torch import nn

from lab.runs import checkpoint
import diracnet
import train
from conftest import ROOT, python, read_log
from diracnet import DiracNet, Network, define_diracnet, diracnet18, diracnet34, fold
from tools import export, predict


@pytest.fixture
def server():
    """A real HTTP server on loopback: server.files maps names to (status, bytes, announced length); server.asked lists requests."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.rsplit('/', 1)[1]
            httpd.asked.append(name)
            status, content, length = httpd.files[name]
            self.send_response(status)
            self.send_header('Content-Length', str(length))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    httpd = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    httpd.files, httpd.asked = {}, []
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield httpd
    httpd.shutdown()
    httpd.server_close()


def saved(content, path, old=True):
    """As torch.save of early 2018 wrote it (`old`): not a zip archive."""
    torch.save(content, path, _use_new_zipfile_serialization=not old)
    assert (path.read_bytes()[:2] == b'PK') != old
    return path


@pytest.fixture
def publish(server, tmp_path, monkeypatch):
    """publish(name, state dict): serve it as the file of that model; returns its file name and the cache's path for it."""
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path / 'hub'))

    def publish(name, weights, digest=None):
        content = saved(weights, tmp_path / 'made.pth').read_bytes()
        file_name = f'{name}v2folded-{(digest or hashlib.sha256(content).hexdigest())[:8]}.pth'
        server.files[file_name] = (200, content, len(content))
        monkeypatch.setitem(
            diracnet.model_urls, name, f'http://127.0.0.1:{server.server_port}/modelzoo/{file_name}'
        )
        return file_name, tmp_path / 'hub' / 'checkpoints' / file_name

    return publish


def test_addresses():
    assert diracnet.model_urls == {
        'diracnet18': 'https://s3.amazonaws.com/modelzoo-networks/diracnet18v2folded-a2174e15.pth',
        'diracnet34': 'https://s3.amazonaws.com/modelzoo-networks/diracnet34v2folded-dfb15d34.pth',
    }


def test_pretrained(publish, server, capfd):
    for define in (diracnet18, diracnet34):
        weights = OrderedDict(
            (key, torch.randn_like(tensor)) for key, tensor in define().state_dict().items()
        )
        _, cached = publish(define.__name__, weights)
        for _ in range(2):
            model = define(pretrained=True)
            assert all(
                torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items()
            )
        assert cached.exists()
        assert '100%' in capfd.readouterr().err  # the progress bar
    assert len(server.asked) == 2  # one each: the second time from the cache


@pytest.fixture
def small_weights():
    return DiracNet(18, 0.125).state_dict()


def test_wrong_hash(publish, small_weights):
    file_name, cached = publish('diracnet18', small_weights, digest='0123abcd')
    with pytest.raises(RuntimeError) as error:
        diracnet18(pretrained=True)
    for words in (diracnet.model_urls['diracnet18'], str(cached), '0123abcd', 'invalid hash'):
        assert words in str(error.value)
    assert not cached.exists() and not list(cached.parent.iterdir())


def test_truncated_transfer_and_server_error(publish, server, small_weights):
    file_name, cached = publish('diracnet18', small_weights)
    _, content, length = server.files[file_name]
    for answer in ((200, content[: len(content) // 2], length), (500, b'', 0), (404, b'', 0)):
        server.files[file_name] = answer
        with pytest.raises(RuntimeError) as error:
            diracnet18(pretrained=True)
        assert str(cached) in str(error.value) and file_name in str(error.value)
        assert not cached.exists() and not list(cached.parent.iterdir())
    server.files[file_name] = (200, content, length)
    assert diracnet._published('diracnet18').keys() == small_weights.keys()


def test_without_a_network(publish, server, small_weights):
    file_name, cached = publish('diracnet18', small_weights)
    server.shutdown()
    server.server_close()
    with pytest.raises(RuntimeError) as error:
        diracnet18(pretrained=True)
    prefix = file_name[-12:-4]
    for words in (diracnet.model_urls['diracnet18'], str(cached), prefix, 'refused'):
        assert words in str(error.value)
    assert '\n' not in str(error.value)
    # the remedy that it names
    cached.write_bytes(server.files[file_name][1])
    assert diracnet._published('diracnet18').keys() == small_weights.keys()


def test_cached_file_that_is_broken_or_holds_code(publish, server, small_weights, tmp_path):
    from conftest import Malicious

    _, cached = publish('diracnet18', small_weights)
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b'something else')
    with pytest.raises(RuntimeError, match='remove it'):
        diracnet18(pretrained=True)
    assert server.asked == []
    cached.unlink()
    publish('diracnet18', {'features.conv.weight': Malicious(tmp_path / 'trap')})
    with pytest.raises(Exception, match='[Ww]eights_only|GLOBAL'):
        diracnet18(pretrained=True)
    assert not (tmp_path / 'trap').exists()


def test_pretrained_weights_fit_no_other_network(publish, small_weights):
    publish('diracnet18', DiracNet(18, 0.125).state_dict())
    assert diracnet18(pretrained=True, width=0.125).fc.out_features == 1000
    with pytest.raises(ValueError, match='1000 classes'):
        diracnet18(pretrained=True, width=0.125, num_classes=10)


def test_hub(publish):
    weights = DiracNet(18).state_dict()
    publish('diracnet18', weights)
    hub = {'repo_or_dir': str(ROOT), 'source': 'local'}
    model = torch.hub.load(**hub, model='diracnet18', pretrained=True)
    assert torch.equal(model.fc.weight, weights['fc.weight'])
    assert len(torch.hub.load(**hub, model='diracnet34').features.group2) == 12
    net = torch.hub.load(
        **hub, model='diracnet', depth=28, width=0.5, dataset='CIFAR100', num_classes=7
    )
    assert (
        isinstance(net, nn.Module)
        and net(torch.randn(2, 3, 32, 32)).shape == (2, 7)
        and 'group0.block0.alpha' in net.state_dict()
    )
    folded = torch.hub.load(**hub, model='diracnet', depth=16, dataset='digits', folded=True)
    assert (
        folded(torch.randn(2, 1, 8, 8)).shape == (2, 10)
        and 'features.conv.bias' in folded.state_dict()
    )


def test_hub_needs_torch_alone(tmp_path):
    """In a process that can't import anything else of ours, OpenCV, torchnet or scikit-learn."""
    code = (
        "import sys\nfor name in ('cv2', 'torchnet', 'sklearn', 'torchvision', 'matplotlib', 'tqdm.auto'): sys.modules[name] = None\n"
        f"import torch; print(torch.hub.load({str(ROOT)!r}, 'diracnet18', source='local').fc)"
    )
    result = python('-c', code)
    assert result.status == 0 and 'out_features=1000' in result.out, result.err


# --- layouts ---------------------------------------------------------------------------------------------------------


def deltas(params):
    """The identities that the original kept beside the parameters."""
    found = {}
    for key, tensor in params.items():
        if key.endswith('.conv'):
            found['eye' + '_'.join(map(str, tensor.shape))] = nn.init.dirac_(
                torch.empty_like(tensor)
            )
    return found


@pytest.fixture
def layouts(digits_run, tmp_path):
    """The digits run's network in every layout, zip and old: name to path."""
    tensors = torch.load(digits_run / 'model.pt7', weights_only=True)['params']
    statistics = {key: tensor for key, tensor in tensors.items() if 'running' in key}
    others = {key: tensor for key, tensor in tensors.items() if key not in statistics}
    optimizer = {
        'state': {},
        'param_groups': [
            {
                'lr': 0.1,
                'momentum': 0.9,
                'dampening': 0,
                'weight_decay': 0.0005,
                'nesterov': False,
                'params': [140033, 140071],
            }
        ],
    }
    contents = {
        'published': {
            'params': OrderedDict(others),
            'stats': OrderedDict({**statistics, **deltas(tensors)}),
        },
        'later': {'params': {**tensors, **deltas(tensors)}, 'epoch': 3, 'optimizer': optimizer},
        'flat': tensors,
        'module': OrderedDict(Network(*define_diracnet(16, 1, 'digits')).state_dict() | tensors),
        'folded': OrderedDict(fold(tensors)),
    }
    paths = {'run': digits_run}
    for name, content in contents.items():
        for old in (False, True):
            (tmp_path / f'{name}{old}').mkdir()
            paths[f'{name}{"-old" if old else ""}'] = saved(
                content, tmp_path / f'{name}{old}' / 'model.pt7', old
            )
    return paths


def test_every_layout_evaluates_exports_and_predicts(
    layouts, digits_run, tmp_path, call, photographs
):
    import cv2

    expected = read_log(digits_run)[-1]
    cv2.imwrite(str(tmp_path / 'image.png'), photographs[0])
    answers = set()
    for name, path in layouts.items():
        result = call(train.main, '--evaluate', path, '--dataset', 'digits')
        assert result.status == 0, (name, result.err)
        stats = json.loads(result.out.removeprefix('json_stats: '))
        assert stats['test_acc'] == expected['test_acc'] and stats['n'] == 360, name
        result = call(predict.main, path, tmp_path / 'image.png', '--dataset', 'digits', '--top', 1)
        assert result.status == 0, (name, result.err)
        answers.add(result.out)
        found = checkpoint.load(path)
        assert found.fold().architecture.depth == 16 and found.network['depth'] == 16
    assert len(answers) == 1


def test_training_goes_on_from_other_files(layouts, tmp_path, call, refused):
    result = call(
        train.main,
        '--resume',
        layouts['later-old'],
        '--dataset',
        'digits',
        '--epochs',
        5,
        '--epoch_step',
        '[4]',
        '--lr',
        '0.01',
        '--save',
        tmp_path / 'later',
    )
    assert result.status == 0 and 'new optimizer' in result.out
    log = read_log(tmp_path / 'later')
    assert [line['epoch'] for line in log] == [4, 5] and log[0]['train_acc'] > 95  # it had learned
    result = call(
        train.main,
        '--resume',
        layouts['published'],
        '--dataset',
        'digits',
        '--epochs',
        1,
        '--lr',
        '0.01',
        '--save',
        tmp_path / 'tuned',
    )
    assert result.status == 0 and [
        line['train_acc'] > 95 for line in read_log(tmp_path / 'tuned')
    ] == [True]
    refused(1, 'folded', train.main, '--resume', layouts['folded'])
    refused(
        2,
        ['later', '3 epochs'],
        train.main,
        '--resume',
        layouts['later'],
        '--dataset',
        'digits',
        '--epochs',
        3,
    )
    refused(
        2,
        ['--depth', '34', '16'],
        train.main,
        '--resume',
        layouts['flat'],
        '--dataset',
        'digits',
        '--depth',
        34,
    )


def test_published_imagenet_layout(tmp_path):
    """A whole unfolded DiracNet-18 as published in 2018, and its folded file."""
    f, params = define_diracnet(18, 0.25, 'ImageNet')
    tensors = {key: tensor.detach() for key, tensor in params.items()}
    statistics = {key: tensor for key, tensor in tensors.items() if 'running' in key}
    path = saved(
        {
            'params': {key: tensor for key, tensor in tensors.items() if key not in statistics},
            'stats': {**statistics, **deltas(tensors)},
        },
        tmp_path / 'diracnet18-v2_checkpoint.pth',
    )
    found = checkpoint.load(path)
    assert found.network == {
        'model': 'diracnet',
        'depth': 18,
        'width': 0.25,
        'dataset': 'ImageNet',
        'num_classes': 1000,
        'in_channels': 3,
    }
    x = torch.randn(2, 3, 64, 64)
    expected = f(x, tensors, False)
    assert torch.equal(found.module()(x), expected)
    torch.testing.assert_close(found.fold()(x), expected, rtol=1e-4, atol=1e-5)
    folded = checkpoint.load(saved(fold(tensors), tmp_path / 'diracnet18v2folded-00000000.pth'))
    assert folded.folded and torch.equal(folded.fold()(x), found.fold()(x))


def test_what_is_missing_is_named(layouts, tmp_path, refused):
    content = torch.load(layouts['published'], weights_only=True)
    del content['stats']['group1.block1.bn.running_var']
    torch.save(content, tmp_path / 'cut.pth')
    for main, arguments in (
        (train.main, ('--evaluate', tmp_path / 'cut.pth', '--dataset', 'digits')),
        (predict.main, (tmp_path / 'cut.pth', __file__, '--dataset', 'digits')),
        (export.main, (tmp_path / 'cut.pth', tmp_path / 'out.pth', '--force')),
    ):
        refused(1, 'group1.block1.bn.running_var', main, *arguments)

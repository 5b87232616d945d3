"""hubconf.py: torch.hub's entry points, which need torch alone."""

import hashlib

import torch
from torch import nn

import diracparams
from conftest import ROOT, python
from diracnet import DiracNet

HUB = {'repo_or_dir': str(ROOT), 'source': 'local'}


def test_entry_points():
    assert len(torch.hub.load(**HUB, model='diracnet34').features.group2) == 12
    options = {'depth': 28, 'width': 0.5, 'dataset': 'CIFAR100', 'num_classes': 7}
    net = torch.hub.load(**HUB, model='diracnet', **options)
    assert isinstance(net, nn.Module) and 'group0.block0.alpha' in net.state_dict()
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    folded = torch.hub.load(**HUB, model='diracnet', depth=16, dataset='digits', folded=True)
    assert 'features.conv.bias' in folded.state_dict()
    assert folded(torch.randn(2, 1, 8, 8)).shape == (2, 10)


def test_networks_of_the_repository():
    for dataset, size in (('digits', 8), ('FashionMNIST', 28)):
        net = torch.hub.load(**HUB, model='diracnet', dataset=dataset, pretrained=True).eval()
        assert len(net.classes) == 10 and net.preprocessing['image_size'] == size
        assert net(torch.zeros(1, 1, size, size)).shape == (1, 10)


def test_pretrained(tmp_path, monkeypatch):
    """Published weights, from torch.hub's cache."""
    weights = DiracNet(18).state_dict()
    torch.save(weights, tmp_path / 'made.pth')
    digest = hashlib.sha256((tmp_path / 'made.pth').read_bytes()).hexdigest()
    cached = tmp_path / 'checkpoints' / f'diracnet18v2folded-{digest[:8]}.pth'
    cached.parent.mkdir()
    (tmp_path / 'made.pth').rename(cached)
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path))
    monkeypatch.setitem(diracparams.model_urls, 'diracnet18', f'http://localhost/{cached.name}')
    model = torch.hub.load(**HUB, model='diracnet18', pretrained=True)
    assert torch.equal(model.fc.weight, weights['fc.weight'])


def test_needs_torch_alone():
    """In a process that can import nothing else that the repository needs, and no file of lab/."""
    code = f"""
import sys
for name in ('cv2', 'torchnet', 'sklearn', 'torchvision', 'matplotlib', 'tqdm.auto'):
    sys.modules[name] = None
import torch
print(torch.hub.load({str(ROOT)!r}, 'diracnet18', source='local').fc)
print([name for name in sys.modules if name.split('.')[0] in ('lab', 'train', 'tools')])
"""
    result = python('-c', code)
    assert result.status == 0, result.err
    assert 'out_features=1000' in result.out and result.out.splitlines()[-1] == '[]'

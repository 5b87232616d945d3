"""hubconf.py: torch.hub's entry points, which need torch alone."""

import torch
from torch import nn

from conftest import ROOT, python

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

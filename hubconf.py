"""Entry points for torch.hub: torch.hub.load(REPOSITORY, 'diracnet18', pretrained=True)."""

from diracnet import DiracNet, Network, define_diracnet
from diracnet import diracnet18 as diracnet18
from diracnet import diracnet34 as diracnet34

dependencies = ['torch']


def diracnet(depth, width=1, dataset='CIFAR10', *, folded=False, **kwargs):
    """DiracNet-DEPTH-WIDTH for a data set, with new weights.

    Args:
        depth, width, dataset: as for `diracnet.define_diracnet`, like the keyword arguments
            num_classes and in_channels.
        folded: return the folded network (diracnet.DiracNet) instead of the one to train
            (diracnet.Network).
    """
    if folded:
        return DiracNet(depth, width, dataset, **kwargs)
    return Network(*define_diracnet(depth, width, dataset, **kwargs))

"""Entry points of torch.hub: torch.hub.load(REPOSITORY, 'diracnet18', pretrained=True)."""

dependencies = ['torch']

from diracnet import DiracNet, Network, define_diracnet, diracnet18, diracnet34  # noqa: E402, F401  torch.hub reads dependencies first


def diracnet(depth, width=1, dataset='CIFAR10', *, folded=False, **kwargs):
    """DiracNet-DEPTH-WIDTH for a data set, with fresh weights.

    Args:
        depth, width, dataset, and num_classes= and in_channels=: those of diracnet.define_diracnet.
        folded: plain convolutions (diracnet.DiracNet) instead of Dirac ones and batch norms (diracnet.Network, to train).
    """
    if folded:
        return DiracNet(depth, width, dataset, **kwargs)
    return Network(*define_diracnet(depth, width, dataset, **kwargs))

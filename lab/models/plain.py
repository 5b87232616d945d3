"""The chains of DiracNets, versions 1 and 2, with ordinary convolutions."""

from diracnet import define_chain, make_architecture
from lab.models.diracnet_v1 import define_chain_v1


def define_plain(depth, width, dataset, *, num_classes=None, in_channels=None):
    """The chain of `diracnet.define_diracnet` with ordinary convolutions instead of Dirac ones, all else the same.

    Arguments, returns and errors are those of `define_diracnet`; params has no alpha and no beta.
    """
    return define_chain(
        make_architecture(depth, width, dataset, num_classes, in_channels), dirac=False
    )


def define_plain_ncrelu(depth, width, dataset, *, num_classes=None, in_channels=None):
    """The same chain, NCReLUs too, with ordinary convolutions (Kaiming normal) instead of Dirac ones; params has no alpha and no beta."""
    return define_chain_v1(
        make_architecture(depth, width, dataset, num_classes, in_channels), dirac=False
    )

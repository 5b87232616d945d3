"""The chains of DiracNets, versions 1 and 2, with ordinary convolutions instead of Dirac ones.

Arguments, returns and errors are those of `diracnet.define_diracnet`, but params has no alpha or
beta.
"""

from diracnet import conv_params, define_chain, initialize_scales, make_architecture
from lab.models.diracnet_v1 import define_chain_v1


def plain_params(in_channels, out_channels):
    return {'conv': conv_params(in_channels, out_channels, 3)}


def plain_ncrelu_params(in_channels, out_channels):
    return {'conv': conv_params(2 * in_channels, out_channels, 3)}  # NCReLU doubles the channels


def define_plain(depth, width, dataset, *, num_classes=None, in_channels=None, bn_init='paper'):
    """The plain network that the paper compares DiracNets with."""
    architecture = make_architecture(depth, width, dataset, num_classes, in_channels)
    f, params = define_chain(architecture, plain_params)
    return f, initialize_scales(params, architecture.depth, bn_init)


def define_plain_ncrelu(
    depth, width, dataset, *, num_classes=None, in_channels=None, bn_init='paper'
):
    """The same for version 1: NCReLU stays; the convolutions start with Kaiming normal weights."""
    architecture = make_architecture(depth, width, dataset, num_classes, in_channels)
    f, params = define_chain_v1(architecture, plain_ncrelu_params)
    return f, initialize_scales(params, architecture.depth, bn_init)

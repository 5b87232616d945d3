"""The chains of DiracNets, versions 1 and 2, with ordinary convolutions instead of Dirac ones.

Arguments, returns and errors are those of `diracnet.define_diracnet`, but params has no alpha or
beta.
"""

from diracnet import define_chain, initialize_scales, make_architecture, plain_conv_params
from lab.models import diracnet_v1


def define_plain(
    depth, width, dataset, *, num_classes=None, in_channels=None, form=None, bn_init='paper'
):
    """The plain network that the paper compares DiracNets with."""
    architecture = make_architecture(depth, width, dataset, num_classes, in_channels, form)
    f, params = define_chain(architecture, plain_conv_params)
    return f, initialize_scales(params, architecture.depth, bn_init)


def define_plain_ncrelu(
    depth, width, dataset, *, num_classes=None, in_channels=None, form=None, bn_init='paper'
):
    """The same for version 1: NCReLU stays; the convolutions start with Kaiming normal weights."""
    architecture = make_architecture(depth, width, dataset, num_classes, in_channels, form)
    f, params = diracnet_v1.define_chain_v1(architecture, diracnet_v1.plain_conv_params)
    return f, initialize_scales(params, architecture.depth, bn_init)

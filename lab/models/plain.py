"""The chains of DiracNets, versions 1 and 2, with ordinary convolutions instead of Dirac ones.

Arguments, returns and errors are those of `diracnet.define_diracnet`, but params has no alpha or
beta.
"""

from functools import partial

from diracnet import chain, dirac_chain
from diracparams import chain_params, conv_params, initialize_scales, make_architecture
from lab.models import diracnet_v1


def define_plain(depth, width, dataset, *, bn_init='paper', widen_early=False, **choices):
    """The plain network that the paper compares DiracNets with."""
    architecture = make_architecture(depth, width, dataset, widen_early=widen_early, **choices)
    params = chain_params(architecture, plain_conv_params)
    return partial(dirac_chain, architecture), initialize_scales(params, depth, bn_init)


def plain_conv_params(in_channels, out_channels):
    return {'conv': conv_params(in_channels, out_channels, 3)}


def define_plain_ncrelu(depth, width, dataset, *, bn_init='paper', **choices):
    """The same for version 1: NCReLU stays; the convolutions start with Kaiming normal weights."""
    architecture = make_architecture(depth, width, dataset, **choices)
    params = chain_params(architecture, diracnet_v1.plain_conv_params)
    f = partial(chain, architecture, block=diracnet_v1.block_v1)
    return f, initialize_scales(params, depth, bn_init)

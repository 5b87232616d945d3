"""Networks that DiracNets are compared with, defined like them as f, params."""
from diracnet import define_chain, define_diracnet, layout


def define_plain(depth, width, dataset, *, num_classes=None, in_channels=None):
    """The chain of `diracnet.define_diracnet` with ordinary convolutions instead of Dirac ones, all else the same.

    Arguments, returns and errors are those of `define_diracnet`; params has no alpha and no beta.
    """
    return define_chain(layout(depth, width, dataset, num_classes, in_channels), dirac=False)


MODELS = {'diracnet': define_diracnet, 'plain': define_plain}  # what --model names

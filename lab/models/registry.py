"""All models by name: their definitions, and which of them given parameters belong to."""

from functools import partial

import torch

from diracnet import DATASETS, define_diracnet, infer_architecture
from lab.models.diracnet_v1 import define_diracnet_v1, infer_architecture_v1
from lab.models.plain import define_plain, define_plain_ncrelu
from lab.models.resnet import (
    BLOCKS,
    define_resnet,
    define_resnet_dirac,
    define_wide_resnet,
    infer_resnet,
)

MODELS = {
    'diracnet': define_diracnet,
    'diracnet-v1': define_diracnet_v1,
    'plain': define_plain,
    'plain-ncrelu': define_plain_ncrelu,
    'resnet': define_resnet,
    'resnet-dirac': define_resnet_dirac,
    'wrn': define_wide_resnet,
}  # what --model names
CHAINS = ('diracnet', 'plain')  # those of diracnet.chain
VERSION_1 = ('diracnet-v1', 'plain-ncrelu')  # those of diracnet_v1.chain_v1
OPTIONS = {
    'resnet': {'block': BLOCKS[0]},
    'resnet-dirac': {'block': BLOCKS[0]},
    'wrn': {'dropout': 0.0},
}  # of one model, not of others

INITS = {
    'kaiming': partial(torch.nn.init.kaiming_normal_, nonlinearity='relu'),
    'xavier': torch.nn.init.xavier_normal_,
    'normal': partial(torch.nn.init.normal_, std=0.01),
    'orthogonal': torch.nn.init.orthogonal_,
}


def define(model, depth, width, dataset, *, init=None, **options):
    """f, params of any of MODELS. `init`, a name in INITS, draws the weights of all convolutions anew; else they are as the model has
    them. Raises ValueError."""
    f, params = MODELS[model](depth, width, dataset, **options)
    if init is not None:
        with torch.no_grad():
            for tensor in params.values():
                if tensor.ndim == 4:
                    INITS[init](tensor)
    return f, params


def infer(params):
    """The network's definition from tensors alone, as far as they tell: a CIFAR form fits several data sets."""
    for read in (_infer_diracnet, infer_resnet):
        try:
            form, network = read(params)
        except ValueError:
            continue
        fitting = [
            name
            for name, facts in DATASETS.items()
            if facts == (form, network['in_channels'], network['num_classes'])
        ]
        return {
            **network,
            'dataset': fitting[0] if fitting else 'ImageNet' if form == 'imagenet' else 'CIFAR10',
        }
    return None


def _infer_diracnet(params):
    dirac = any(key.endswith('.alpha') for key in params)
    try:
        architecture, model = infer_architecture(params), 'diracnet' if dirac else 'plain'
    except ValueError:
        architecture, model = (
            infer_architecture_v1(params),
            'diracnet-v1' if dirac or 'conv.weight' in params else 'plain-ncrelu',
        )
    return architecture.form, {
        'model': model,
        'depth': architecture.depth,
        'width': architecture.width,
        'num_classes': architecture.num_classes,
        'in_channels': architecture.in_channels,
    }

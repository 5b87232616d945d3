"""All models by name: define them, recognize them by their tensors, fold them."""

import inspect

import torch

import diracnet
from diracnet import (
    DATASETS,
    DiracNet,
    check_tensors,
    define_diracnet,
    infer_architecture,
    is_dirac,
)
from lab.models.diracnet_v1 import (
    DiracNetV1,
    define_diracnet_v1,
    fold_v1,
    infer_architecture_v1,
    is_folded_v1,
)
from lab.models.initialization import initialize_convolutions
from lab.models.plain import define_plain, define_plain_ncrelu
from lab.models.repvgg import define_repvgg, fold_repvgg, infer_repvgg, is_repvgg
from lab.models.resnet import (
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
    'repvgg': define_repvgg,
    'resnet': define_resnet,
    'resnet-dirac': define_resnet_dirac,
    'wrn': define_wide_resnet,
}
CHAINS = ('diracnet', 'plain')  # their function is diracnet.chain
VERSION_1 = ('diracnet-v1', 'plain-ncrelu')  # their function is diracnet_v1.chain_v1
FOLDABLE = (*CHAINS, *VERSION_1, 'repvgg')
SCALES = ('bn_init', 'alpha', 'beta')  # the options of diracnet.initialize_scales


def define(model, depth, width, dataset, *, init=None, **options):
    """f, params of a model.

    Args:
        model: a name in MODELS.
        depth, width, dataset: as for `diracnet.define_diracnet`.
        init: a name in `initialization.INITS`, to initialize all convolutions in that way; None
            keeps the model's own initialization.
        options: num_classes, in_channels, form, as for `diracnet.define_diracnet`, and those that
            not all models share, see `own_options` and `initial_scales`.

    Raises:
        ValueError: a choice is impossible; the message says what is possible.
    """
    if init == 'looks-linear' and model != 'plain-ncrelu':
        raise ValueError(f'--init {init} does not apply to --model {model}, only to plain-ncrelu')
    f, params = MODELS[model](depth, width, dataset, **options)
    if init is not None:
        initialize_convolutions(params, init)
    return f, params


def own_options(model):
    """The options of this model that not all models share, with their defaults.

    Those that only choose its initial parameters are not among them: a checkpoint has its own.
    """
    others = ('num_classes', 'in_channels', 'form', 'dirac', *SCALES)
    return {name: value for name, value in _keywords(model).items() if name not in others}


def initial_scales(model):
    """The names in SCALES that this model has, with their defaults."""
    return {name: value for name, value in _keywords(model).items() if name in SCALES}


def _keywords(model):
    """The keyword-only arguments of a model's definition, with their defaults."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(MODELS[model]).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }


def initialization(options):
    """The keyword arguments of `define` with which a run of these options begins."""
    names = ('init', *initial_scales(options['model']))
    return {name: options[name] for name in names if name in options}


def form_of(network):
    """The form of a network, 'cifar' or 'imagenet': its own, or else that of its data set.

    network: a dict with `dataset`, such as the options of a run.
    """
    return network.get('form') or DATASETS[network['dataset']][0]


def network_option_names(model):
    """The options of train.py that define a network of this model."""
    return ('model', 'depth', 'width', 'dataset', 'form', *own_options(model))


def fold(model, params):
    """The folded state dict of a model.

    Args:
        model: a name in FOLDABLE.
        params: its flat dict of params.

    Raises:
        ValueError: the model does not fold, or these are not its params.
    """
    if model not in FOLDABLE:
        raise ValueError(f'--model {model} does not fold; only {", ".join(FOLDABLE)} do')
    if model == 'repvgg':
        return fold_repvgg(params)
    return fold_v1(params) if model in VERSION_1 else diracnet.fold(params)


def is_folded(params):
    """Whether a dict of tensors has names of a folded network, complete or not."""
    return any(key.startswith('features.') for key in params) or is_folded_v1(params)


def folded_module(model, folded):
    """The module of a folded state dict, in evaluation mode. Raises ValueError if none fits."""
    kind = DiracNetV1 if model in VERSION_1 else DiracNet
    return kind.from_state_dict(folded).eval()


def infer(params):
    """What `recognize` returns, or None if no model fits."""
    try:
        return recognize(params)
    except ValueError:
        return None


def recognize(params):
    """The network whose tensors have exactly these keys and shapes.

    Args:
        params: flat dict of params or folded state dict of any model. Identities that the
            original's files store (eye64_64_3_3) do not matter.

    Returns:
        A dict of model, depth, width, num_classes, in_channels, dataset and form: arguments of
        `define`. If several data sets fit, `dataset` is the first of them.

    Raises:
        ValueError: no model fits; the message names the first key that is wrong.
    """
    form, network = _find_network(params)
    return {**network, 'dataset': _fitting_dataset(form, network), 'form': form}


def _find_network(params):
    if 'conv1.weight' in params:
        return _find_resnet(params)
    if is_repvgg(params):
        return _describe('repvgg', infer_repvgg(params))
    if is_folded_v1(params):
        return _describe('diracnet-v1', infer_architecture_v1(params))
    if _has_ncrelu(params):
        model = 'diracnet-v1' if is_dirac(params) else 'plain-ncrelu'
        return _describe(model, infer_architecture_v1(params))
    return _describe('diracnet' if is_dirac(params) else 'plain', infer_architecture(params))


def _find_resnet(params):
    form, network = infer_resnet(params)
    try:
        check_tensors(params, shapes(**network, dataset=_fitting_dataset(form, network)))
    except ValueError as error:
        raise ValueError(f'not the parameters of a ResNet: {error}') from None
    return form, network


def _has_ncrelu(params):
    """Whether the first block sees twice the channels that it makes."""
    shape = getattr(params.get('group0.block0.conv'), 'shape', ())
    return len(shape) == 4 and shape[1] == 2 * shape[0]


def shapes(**network):
    """The params of a network as tensors without values.

    Raises ValueError if there is no such network, or if it is too large for any memory.
    """
    try:
        with torch.device('meta'):
            return define(**network)[1]
    except (RuntimeError, TypeError) as error:  # the size of a tensor overflows
        raise ValueError(f'it is too large: {error}') from None


def _describe(model, architecture):
    """What `infer_resnet` returns, for a chain."""
    return architecture.form, {
        'model': model,
        'depth': architecture.depth,
        'width': architecture.width,
        'num_classes': architecture.num_classes,
        'in_channels': architecture.in_channels,
    }


def _fitting_dataset(form, network):
    facts = (form, network['in_channels'], network['num_classes'])
    for name in DATASETS:
        if DATASETS[name] == facts:
            return name
    return 'ImageNet' if form == 'imagenet' else 'CIFAR10'

"""All models by name: define them, fold them, recognize a file that does not say what it is."""

import inspect
import json

import torch
import torch.nn.functional as F

import diracnet
from diracnet import DiracNet, define_diracnet
from diracparams import DATASETS, check, read_network
from lab.models.diracnet_v1 import DiracNetV1, define_diracnet_v1, fold_v1
from lab.models.initialization import initialize_convolutions
from lab.models.plain import define_plain, define_plain_ncrelu
from lab.models.repvgg import define_repvgg, fold_repvgg
from lab.models.resnet import define_resnet, define_resnet_dirac, define_wide_resnet

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
CHAINS = ('diracnet', 'plain')  # their function is diracnet.dirac_chain
VERSION_1 = ('diracnet-v1', 'plain-ncrelu')
FOLDS = {  # the function that folds a model's params, and the module of what it returns
    **dict.fromkeys(CHAINS, (diracnet.fold, DiracNet)),
    **dict.fromkeys(VERSION_1, (fold_v1, DiracNetV1)),
    'repvgg': (fold_repvgg, DiracNet),
}
SCALES = ('bn_init', 'alpha', 'beta')  # the options of diracparams.initialize_scales


# --- defining --------------------------------------------------------------------------------


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


def shapes(**network):
    """The params of a network as tensors without values.

    Raises ValueError if there is no such network, or if it is too large for any memory.
    """
    try:
        with torch.device('meta'):
            return define(**network)[1]
    except RuntimeError as error:
        if 'overflow' not in str(error):  # of the size of a tensor
            raise
        raise ValueError(f'width {network["width"]:g} is too large for any memory') from None


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


def misfit(network, dataset):
    """Why a network is not for this data set, in words; '' if its form, channels and classes fit. A
    folder of images has both forms and any number of classes."""
    form, channels, classes = DATASETS[dataset]
    own_channels = network['in_channels']
    own_form = network.get('form', form)  # that of an .onnx file is unknown
    if dataset != 'folder' and own_form != form:
        return f'has the form {own_form}, but {dataset} has {form}'
    if own_channels != channels:
        return f'is for {own_channels}-channel images, but {dataset} has {channels}-channel ones'
    if classes not in (None, network['num_classes']):
        return f'has {network["num_classes"]} classes, but {dataset} has {classes}'
    return ''


def network_option_names(model):
    """The options of train.py that define a network of this model."""
    return ('model', 'depth', 'width', 'dataset', 'form', *own_options(model))


def flags(options):
    """The options as command-line arguments."""
    arguments = []
    for name, value in options.items():
        if value is False:
            continue
        arguments.append(f'--{name}')
        if isinstance(value, list):
            arguments.append(json.dumps(value, separators=(',', ':')))
        elif value is not True:
            arguments.append(str(value))
    return arguments


# --- folding ---------------------------------------------------------------------------------


def fold(model, params):
    """The folded state dict of a model.

    Args:
        model: a name in FOLDS.
        params: its flat dict of params.

    Raises:
        ValueError: the model does not fold, or these are not its params.
    """
    check(model in FOLDS, f'--model {model} does not fold; only {", ".join(FOLDS)} do')
    return FOLDS[model][0](params)


def why_unfoldable(network):
    """Why the network with these arguments of `define` does not fold; '' if it does.

    An option of its own may make a model compute what its fold does not.
    """
    model, own = network['model'], own_options(network['model'])
    if model not in FOLDS:
        return f'--model {model} does not fold; only {", ".join(FOLDS)} do'
    try:
        if _fold_error(network) <= 1e-6:  # a right fold is off by 1e-9
            return ''
    except ValueError as error:
        return str(error)
    options = {'model': model, **{name: network.get(name, own[name]) for name in own}}
    return f'{" ".join(flags(options))} computes what its folded network does not'


@torch.no_grad()
def _fold_error(network):
    """How much a small network with new parameters and its folded one differ: the largest error
    of an image's logits, relative to the largest of them.

    Some images are far larger than those of the statistics: activations may be clipped.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        f, params = _define_small(network)
        params = {  # what begins as 0 or 1 must count, too
            key: tensor.double() + torch.rand_like(tensor.double()) / 10
            for key, tensor in params.items()
        }
    size = 64 if form_of(network) == 'imagenet' else 8
    channels = network.get('in_channels') or DATASETS[network['dataset']][1]
    images = torch.linspace(-20, 20, 2 * channels * size**2, dtype=torch.double).sin()
    images = images.view(2, channels, size, size)

    def norm(x, mean, var, weight, bias, eps, **_):  # keeps the statistics of these images
        for running, batch in zip((var, mean), torch.var_mean(x, (0, 2, 3), correction=0)):
            running.copy_(batch)
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)

    f(images, params, True, norm=norm)
    images = torch.cat([images, 1e4 * images])
    expected = f(images, params, False)
    folded = folded_module(network['model'], fold(network['model'], params))
    errors = (folded(images) - expected).abs().amax(1) / expected.abs().amax(1)
    return errors.max().item()


def _define_small(network):
    """f, params of a network with fewer layers and channels, if it has many: rounding errors grow
    with the layers."""
    depth, width = network['depth'], network['width']
    few = {'depth': min(depth, 36 + depth % 6), 'width': min(width, 0.25)}
    try:
        return define(**{**network, **few})
    except ValueError:  # this model has other depths
        return define(**network)


def folded_module(model, folded):
    """The module of a folded state dict, in evaluation mode. Raises ValueError if none fits."""
    return FOLDS[model][1].from_state_dict(folded).eval()


# --- recognizing -----------------------------------------------------------------------------


def is_folded(params):
    """Whether a dict of tensors has names of a folded network, complete or not."""
    return 'conv.weight' in params or any(key.startswith('features.') for key in params)


def recognize(params):
    """The network whose tensors have exactly these keys and shapes.

    Published files and bare state dicts do not say what they are. DiracNets of both versions and
    their plain chains are recognized, folded or not; of folded ones, which are all plain, the
    models are called plain and diracnet-v1.

    Args:
        params: flat dict of params or folded state dict. Identities that the original's files
            store (eye64_64_3_3) do not matter.

    Returns:
        A dict of model, depth, width, num_classes, in_channels, dataset and form: arguments of
        `define`. If several data sets fit, `dataset` is the first of them.

    Raises:
        ValueError: no model fits; the message names the first key that is wrong.
    """
    folded = is_folded(params)
    is_dirac = any(key.endswith('.alpha') for key in params)
    if 'conv.weight' in params or _has_ncrelu(params):
        model, prefix = 'diracnet-v1' if is_dirac or folded else 'plain-ncrelu', ''
    else:
        model, prefix = 'diracnet' if is_dirac else 'plain', 'features.' if folded else ''
    try:
        network = read_network(params, prefix)
    except ValueError as error:
        names = ', '.join(list(params)[:3])
        raise ValueError(
            f'{error}, but those of another network ({names}, ...); without the options of a run, '
            'only DiracNets and plain chains are recognized'
        ) from None
    fitting = [name for name in DATASETS if name != 'folder' and not misfit(network, name)]
    fallback = 'ImageNet' if network['form'] == 'imagenet' else 'CIFAR10'
    network = {'model': model, **network, 'dataset': [*fitting, fallback][0]}
    expected = shapes(**network)
    check_shapes(params, fold(model, expected) if folded else expected)
    return network


def _has_ncrelu(params):
    """Whether the first block sees twice the channels that it makes."""
    shape = getattr(params.get('group0.block0.conv'), 'shape', ())
    return len(shape) == 4 and shape[1] == 2 * shape[0]


def check_shapes(tensors, expected):
    """Raise ValueError unless two dicts of tensors have the same keys and shapes; identities that
    the original's files store (eye64_64_3_3) do not matter."""
    for key in {**expected, **tensors}:
        if key.startswith('eye'):
            continue
        check(key in expected, f'unknown tensor {key}')
        here = tuple(expected[key].shape)
        there = tuple(tensors[key].shape) if key in tensors else 'missing'
        check(there == here, f'{key} is {there} instead of {here}')

"""Dirac weights for any network.

    diracify(model)       # its convolutions get Dirac weights; the model still computes the same
    ...                   # train it
    folded = fold(model)  # plain convolutions again, with the batch norms folded in

This file needs torch, and the other four dirac*.py files beside it.
"""

import copy
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import overload

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

import diracnet
from diracconv import (
    DiracConv,
    DiracConv1d,
    DiracConv2d,
    DiracConv3d,
    DiracParametrization,
    in_double,
    like_conv,
    split_weight,
)
from diracfold import (
    foldable_norms,
    is_batch_norm,
    is_plain,
    is_wrapper,
    torch_class,
    without_norm,
)

LAYERS = {nn.Conv1d: DiracConv1d, nn.Conv2d: DiracConv2d, nn.Conv3d: DiracConv3d}


# --- into Dirac convolutions -----------------------------------------------------------------


def keeps_size(conv: nn.Module) -> bool:
    """Whether a convolution has stride 1, more than one tap, and output of its input's size.

    Even kernels do not qualify: they have no tap in the center.
    """
    if max(conv.kernel_size) == 1 or max(conv.stride) > 1 or conv.padding == 'valid':
        return False
    if any(size % 2 == 0 for size in conv.kernel_size):
        return False
    if conv.padding == 'same':
        return True
    dimensions = zip(conv.kernel_size, conv.dilation, conv.padding)
    return all(2 * padding == dilation * (size - 1) for size, dilation, padding in dimensions)


def diracify(
    model: nn.Module,
    *,
    fresh: bool = False,
    where: Callable[[nn.Module], bool] = keeps_size,
) -> nn.Module:
    """Replace convolutions of a network with Dirac convolutions, in place.

    Prints to stderr how many it replaced. The new layers keep the hooks and `requires_grad` of the
    old ones. A warning names the selected convolutions that cannot be replaced: those that are
    neither `torch.nn.Conv1d`, `Conv2d` or `Conv3d` nor a subclass with the same forward, and those
    whose weight is computed (weight norm, pruning, ...), shared, lazy, complex or quantized.

    Args:
        model: any module. A convolution that appears in several places stays a single module.
        fresh: start from new weights near the identity. By default the layers start from the
            weights of the model, and the function that it computes stays the same.
        where: predicate that selects from the model's convolutions.

    Returns:
        The model, or the Dirac convolution if the model is itself a convolution.
    """
    names = {module: name for name, module in model.named_modules() if _is_convolution(module)}
    selected = [conv for conv in names if not _is_dirac(conv) and where(conv)]
    owners = Counter(tensor for module in model.modules() for tensor in module._parameters.values())
    made = {
        conv: _dirac_conv(conv, fresh)
        for conv in selected
        if is_plain(conv, LAYERS) and owners[conv.weight] == 1
    }
    print(f'diracify: replaced {len(made)} of {len(names)} convolutions', file=sys.stderr)
    left = [f'{names[conv]} ({type(conv).__name__})' for conv in selected if conv not in made]
    if left:
        warnings.warn(
            'convolutions that diracify cannot replace, because of their class, a forward of their '
            f'own, or a weight that is computed or shared: {", ".join(left).strip()}',
            stacklevel=2,
        )
    return _replace(model, made)


def _is_convolution(module):
    quantized = type(module).__module__.startswith('torch.ao.nn.') and hasattr(module, 'groups')
    return quantized or isinstance(module, nn.modules.conv._ConvNd)


def _dirac_conv(conv, fresh):
    weight = conv.weight
    kind = LAYERS[torch_class(conv, LAYERS)]
    dirac = like_conv(kind, conv, device=weight.device, dtype=weight.dtype)
    if not fresh:
        parts = split_weight(weight, conv.groups)
        with torch.no_grad():
            for parameter, part in zip((dirac.weight, dirac.alpha, dirac.beta), parts):
                parameter.copy_(part)
        dirac.bias = conv.bias
    for parameter in (dirac.weight, dirac.alpha, dirac.beta):
        parameter.requires_grad_(weight.requires_grad)
    if conv.bias is not None:
        dirac.bias.requires_grad_(conv.bias.requires_grad)
    return _keep_hooks(dirac.train(conv.training), conv)


def _replace(model, made):
    """Replace the keys of `made` with its values, in every place where they appear."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module not in made:
            continue
        if not name:  # the model itself
            return made[module]
        parent, _, attribute = name.rpartition('.')
        setattr(model.get_submodule(parent), attribute, made[module])
    return model


def _keep_hooks(replacement, module):
    # The same dicts, not copies: the handles that remove hooks refer to them.
    vars(replacement).update({key: hook for key, hook in vars(module).items() if 'hook' in key})
    return replacement


# --- into plain convolutions -----------------------------------------------------------------


@overload
def fold(model: nn.Module) -> nn.Module: ...
@overload
def fold(model: Mapping[str, Tensor]) -> dict[str, Tensor]: ...


def fold(model: nn.Module | Mapping[str, Tensor]) -> nn.Module | dict[str, Tensor]:
    """Fold Dirac weights and batch norms into plain convolutions.

    A batch norm is folded into the convolution directly before it, or into the linear layer if
    it is a BatchNorm1d of features (N, C). `torch.nn.Identity` takes its place; an activation in
    the batch norm's module stays. The batch norm stays, and a warning names it, if there is no such
    layer, if other code or a hook also sees the layer's output, or if torch.fx cannot trace the
    code that calls them. docs/export.md says what tracing does not see.

    Args:
        model: any module, with layers of diracconv.py or with DiracParametrization; or a
            DiracNet's flat dict of params, whose folded state dict `diracnet.fold` returns.

    Returns:
        A copy that computes the same as the model in evaluation mode. Its classes, methods, hooks
        and `requires_grad` are those of the model, with exceptions: a `diracnet.Network` becomes a
        DiracNet; a wrapper (`torch.compile`, DataParallel, AveragedModel) becomes the module
        inside; weights that pruning, or torch's old weight and spectral norm, compute become
        ordinary ones.

    Raises:
        TypeError: the model cannot be copied; the message names the attribute.
        ValueError: the model has a `diracnet.Network` that is not a DiracNet.
    """
    if not isinstance(model, nn.Module):
        return diracnet.fold(model)
    model = _copy(_unwrapped(model))
    model.eval()
    compiled = [module for module in model.modules() if _is_compiled(module)]
    model = _with_replaced(model, {module: _unwrapped(module) for module in compiled})
    for module in model.modules():
        _store_computed_weights(module)
    dirac = [module for module in model.modules() if _is_dirac(module)]
    model = _with_replaced(model, {module: _plain(module) for module in dirac})
    if not any(is_batch_norm(module) for module in model.modules()):
        return model
    return _fold_batch_norms(model)


def _unwrapped(model):
    """The module inside wrappers that compute the same."""
    while is_wrapper(model) or _is_compiled(model):
        model = model._orig_mod if _is_compiled(model) else model.module
    return model


def _is_compiled(module):
    return '_orig_mod' in module._modules  # as torch.compile names what it wraps


def _with_replaced(model, made):
    """A copy of a model with the values of `made` in the place of the keys, wherever modules hold
    them: also in lists and other attributes. Its tensors are those of the model."""
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    memo.update({id(module): replacement for module, replacement in made.items()})
    return copy.deepcopy(model, memo)


def _copy(model):
    # deepcopy refuses computed tensors, such as the weight of torch's old weight norm.
    attributes = [value for module in model.modules() for value in vars(module).values()]
    tensors = [value for value in attributes if isinstance(value, torch.Tensor)]
    computed = {id(tensor): tensor.detach() for tensor in tensors if not tensor.is_leaf}
    try:
        return copy.deepcopy(model, computed)
    except Exception as error:
        name = _first_uncopyable(model)
        raise TypeError(f'fold() needs a copy, and {name} cannot be copied: {error}') from error


def _first_uncopyable(model):
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute != '_modules' and not _is_copyable(value):
                return f'{name}.{attribute}'.lstrip('.')
    return type(model).__name__


def _is_copyable(value):
    try:
        return bool(copy.deepcopy([value]))
    except Exception:
        return False


def _store_computed_weights(module):
    """Replace weights that a hook computes before each forward pass with their values."""
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)
        elif isinstance(hook, WeightNorm):
            remove_weight_norm(module, hook.name)
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(module, hook.name)


def _is_dirac(module):
    if isinstance(module, (DiracConv, diracnet.Network)):  # a subclass may compute something else
        return torch_class(module, (*LAYERS.values(), diracnet.Network)) is not None
    return parametrize.is_parametrized(module, 'weight') and any(
        isinstance(part, DiracParametrization) for part in module.parametrizations.weight
    )


def _plain(module):
    if isinstance(module, diracnet.Network):
        return _keep_hooks(_folded_network(module), module)
    if isinstance(module, DiracConv):
        return _keep_hooks(module.fold(), module)
    # remove_parametrizations would change the class of the module, which the copy shares with the
    # original.
    folded = {
        name: nn.Parameter(getattr(module, name).detach(), next(parts.parameters()).requires_grad)
        for name, parts in module.parametrizations.items()
    }
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module.parametrizations
    for name, parameter in folded.items():
        module.register_parameter(name, parameter)
    return module


def _folded_network(network):
    originals = network.params()
    params = {key: in_double(tensor) for key, tensor in originals.items()}
    folded = diracnet.DiracNet.from_state_dict(diracnet.fold(params))
    folded.to(params['conv'].device).eval()
    # Another function may have params of the same names and shapes.
    x = torch.rand(1, params['conv'].shape[1], 32, 32, generator=torch.Generator().manual_seed(0))
    x = x.to(params['conv'])
    with torch.no_grad():
        if not torch.allclose(folded(x), network.f(x, params, False), 1e-6, 1e-6, equal_nan=True):
            raise ValueError('the function of this Network is not that of a DiracNet')
    folded.to(originals['conv'])  # its dtype and device
    for name, parameter in folded.named_parameters():
        source = name.removeprefix(folded.prefix).replace('conv.bias', 'bn.bias')
        parameter.requires_grad_(originals[source.replace('conv.weight', 'conv')].requires_grad)
    # Such as the names of the classes.
    own = {name: value for name, value in vars(network).items() if name not in ('f', 'owners')}
    vars(folded).update({name: value for name, value in own.items() if name not in vars(folded)})
    return folded


def _fold_batch_norms(model):
    traced = _copy(model)
    foldable, error = foldable_norms(traced)
    own = dict(zip(traced.modules(), model.modules()))
    made = {}
    for norm, (layers, statistics) in foldable.items():
        norm, layers = own[norm], [own[layer] for layer in layers]
        replacement = without_norm(norm, layers)
        if replacement:
            made[norm] = _keep_hooks(replacement, norm)
            for layer in layers:
                _fold_statistics(layer, statistics)
    model = _with_replaced(model, made)
    left = [name or type(model).__name__ for name, m in model.named_modules() if is_batch_norm(m)]
    if left:
        reason = f' ({error})' if error else ''
        warnings.warn(
            f'batch norms that cannot be folded{reason} stay: {", ".join(left)}', stacklevel=3
        )
    return model


def _fold_statistics(layer, statistics):
    mean, var, eps, scale, shift = statistics
    given = [tensor for tensor in (layer.bias, shift, layer.weight) if tensor is not None]
    layer.weight, layer.bias = fuse_conv_bn_weights(
        layer.weight, layer.bias, mean, var, eps, scale, shift
    )
    layer.bias.requires_grad_(given[0].requires_grad)  # a new bias is trained if the norm's was

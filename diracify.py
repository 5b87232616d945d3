"""Dirac weights for any network.

    diracify(model)       # its convolutions get Dirac weights; the model still computes the same
    ...                   # train it
    folded = fold(model)  # plain convolutions again, with the batch norms folded in

This file needs torch, diracconv.py and diracnet.py alone.
"""

import copy
import warnings

import torch
from torch import nn
from torch.fx.experimental.optimization import fuse
from torch.nn.utils import parametrize

import diracnet
from diracconv import (
    DiracConv,
    DiracConv1d,
    DiracConv2d,
    DiracConv3d,
    DiracParametrization,
    like_conv,
    plain_conv,
    split_weight,
)

LAYERS = {nn.Conv1d: DiracConv1d, nn.Conv2d: DiracConv2d, nn.Conv3d: DiracConv3d}
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


# --- into Dirac convolutions -----------------------------------------------------------------


def qualifies(conv):
    """Whether a module is a convolution for which the identity is a sensible starting point.

    That is a `torch.nn` convolution whose output has the size of its input and whose kernel is
    larger than one tap.
    """
    return type(conv) in LAYERS and max(conv.kernel_size) > 1 and _keeps_size(conv)


def _keeps_size(conv):
    if any(stride != 1 for stride in conv.stride) or conv.padding == 'valid':
        return False
    if conv.padding == 'same':
        return True
    dimensions = zip(conv.kernel_size, conv.dilation, conv.padding)
    return all(2 * padding == dilation * (size - 1) for size, dilation, padding in dimensions)


def diracify(model, *, fresh=False, where=qualifies):
    """Replace convolutions of a network with Dirac convolutions, in place.

    Args:
        model: any module. A convolution that appears in several places stays a single module.
        fresh: start from new weights near the identity. By default the layers start from the
            weights of the model, and the function that it computes stays the same.
        where: predicate that selects from the model's `torch.nn.Conv1d`, `Conv2d` and `Conv3d`.

    Returns:
        The model, or the Dirac convolution if the model is itself a convolution.
    """

    def selected(module):
        return type(module) in LAYERS and where(module)

    return _replace(model, selected, lambda conv: _dirac_conv(conv, fresh))


def _dirac_conv(conv, fresh):
    weight = conv.weight
    dirac = like_conv(LAYERS[type(conv)], conv, device=weight.device, dtype=weight.dtype)
    if not fresh:
        weight, alpha, beta = split_weight(conv.weight, conv.groups)
        with torch.no_grad():
            dirac.weight.copy_(weight)
            dirac.alpha.copy_(alpha)
            dirac.beta.copy_(beta)
        dirac.bias = conv.bias
    return dirac.train(conv.training)


def _replace(model, selected, make):
    """Replace each selected module with make(module), in every place where it appears."""
    made = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not selected(module):
            continue
        if module not in made:
            made[module] = make(module)
        if not name:  # the model itself
            return made[module]
        parent, _, attribute = name.rpartition('.')
        setattr(model.get_submodule(parent), attribute, made[module])
    return model


# --- into plain convolutions -----------------------------------------------------------------


def fold(model):
    """Fold Dirac weights and batch norms into plain convolutions.

    A batch norm is folded into the convolution (or linear layer) directly before it. It stays, and
    a warning names it, if there is no such layer, if either of the two is called more than once,
    or if the output of the layer is also used elsewhere. All batch norms stay, with a warning, if
    torch.fx cannot trace the model.

    Args:
        model: any module, with layers of diracconv.py or with DiracParametrization; or a
            DiracNet's flat dict of params, whose folded state dict `diracnet.fold` returns.

    Returns:
        A copy that computes the same as the model in evaluation mode. If the model has batch
        norms, the copy is a `torch.fx.GraphModule` that keeps the names of the modules.
    """
    if not isinstance(model, nn.Module):
        return diracnet.fold(model)
    if isinstance(model, diracnet.Network):
        folded = diracnet.DiracNet.from_state_dict(diracnet.fold(model.params()))
        return folded.to(next(model.parameters()).device).eval()
    model = copy.deepcopy(model).eval()
    model = _replace(model, lambda module: isinstance(module, DiracConv), DiracConv.fold)
    model = _replace(model, _is_parametrized, _without_parametrization)
    if not any(isinstance(module, BATCH_NORMS) for module in model.modules()):
        return model
    return _fold_batch_norms(model)


def _is_parametrized(module):
    return parametrize.is_parametrized(module, 'weight') and any(
        isinstance(part, DiracParametrization) for part in module.parametrizations.weight
    )


def _without_parametrization(conv):
    # remove_parametrizations would change the class of the module, which the copy shares with the
    # original.
    return plain_conv(parametrize.type_before_parametrizations(conv), conv, conv.weight)


def _fold_batch_norms(model):
    try:
        traced = torch.fx.symbolic_trace(model)
    except Exception as error:  # tracing runs the model's own code
        warnings.warn(
            f'torch.fx cannot trace {type(model).__name__} ({error}): its batch norms stay',
            stacklevel=3,
        )
        return model
    kept = _reused_batch_norms(traced)
    for module in kept:
        module.track_running_stats = False  # fuse() skips a batch norm without statistics
    folded = fuse(traced, inplace=True, no_trace=True)
    for module in kept:
        module.track_running_stats = True
    folded.delete_all_unused_submodules()
    left = [node.target for node in _calls(folded, BATCH_NORMS)]
    if left:
        names = ', '.join(dict.fromkeys(left))
        warnings.warn(f'batch norms that cannot be folded stay: {names}', stacklevel=3)
    return folded


def _reused_batch_norms(traced):
    """Batch norms that are called more than once, or after a module that is.

    `fuse` treats each call separately, but folding one call would change the module for all calls.
    """
    calls_by_module = {}
    for node in _calls(traced):
        calls_by_module.setdefault(traced.get_submodule(node.target), []).append(node)

    def is_reused(node):
        return len(calls_by_module[traced.get_submodule(node.target)]) > 1

    reused = []
    for node in _calls(traced, BATCH_NORMS):
        sources = [source for source in node.all_input_nodes if source.op == 'call_module']
        module = traced.get_submodule(node.target)
        if module.track_running_stats and any(is_reused(call) for call in (node, *sources)):
            reused.append(module)
    return reused


def _calls(traced, kinds=nn.Module):
    """The nodes of a traced model that call modules of these classes."""
    return [
        node
        for node in traced.graph.nodes
        if node.op == 'call_module' and isinstance(traced.get_submodule(node.target), kinds)
    ]

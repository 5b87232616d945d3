"""Dirac weights for any network: `diracify` brings them into its convolutions, `fold` takes them, and batch norms, out again."""

import copy
import warnings

import torch
from torch import nn
from torch.nn.utils import parametrize

import diracnet
from diracconv import (
    DiracConv1d,
    DiracConv2d,
    DiracConv3d,
    DiracParametrization,
    _DiracConv,
    plain_conv,
    split_weight,
)

LAYERS = {nn.Conv1d: DiracConv1d, nn.Conv2d: DiracConv2d, nn.Conv3d: DiracConv3d}
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def qualifies(conv):
    """Whether the identity is a sensible start for a convolution: it keeps the size of its input, and looks at neighbours."""
    same = (
        conv.padding == 'same'
        or conv.padding != 'valid'
        and all(
            2 * padding == dilation * (size - 1)
            for padding, dilation, size in zip(conv.padding, conv.dilation, conv.kernel_size)
        )
    )
    return (
        type(conv) in LAYERS
        and all(stride == 1 for stride in conv.stride)
        and max(conv.kernel_size) > 1
        and same
    )


def diracify(model, *, fresh=False, where=qualifies):
    """Turn convolutions of a network into Dirac ones, in place.

    Args:
        model: any module. A convolution that stands at several places stays one.
        fresh: start from new weights, near the identity; else from those given, and the function computed stays the same.
        where: predicate of a `torch.nn.Conv1d`, `Conv2d` or `Conv3d` that says whether to turn it; see `qualifies`.

    Returns:
        The model; where it is itself a convolution, the Dirac one.
    """

    def turn(conv):
        dirac = LAYERS[type(conv)](
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        if not fresh:
            with torch.no_grad():
                for parameter, value in zip(
                    (dirac.weight, dirac.alpha, dirac.beta), split_weight(conv.weight, conv.groups)
                ):
                    parameter.copy_(value)
            dirac.bias = conv.bias
        return dirac.train(conv.training)

    return _replace(model, lambda module: type(module) in LAYERS and where(module), turn)


def _replace(model, chosen, make):
    """Replace every chosen module by make(module), at all its places."""
    made = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if chosen(module):
            if module not in made:
                made[module] = make(module)
            if not name:
                return made[module]
            parent, _, attribute = name.rpartition('.')
            setattr(model.get_submodule(parent), attribute, made[module])
    return model


def fold(model):
    """Fold a trained network: its Dirac convolutions, and the batch norms behind convolutions, become plain convolutions.

    Args:
        model: any module, with the layers of diracconv.py or DiracParametrization; a DiracNet's flat dict of params gives its folded
            state dict, see `diracnet.fold`.

    Returns:
        A copy in evaluation mode that computes what the model does there: a `torch.fx.GraphModule` with the model's names for its
        parts, where torch.fx can trace it. A batch norm that can't be folded stays, and a warning names it: behind a convolution that
        is called more than once or whose output goes elsewhere, too, or not behind a convolution at all.
    """
    if not isinstance(model, nn.Module):
        return diracnet.fold(model)
    if isinstance(model, diracnet.Network):
        return (
            diracnet.DiracNet.from_state_dict(diracnet.fold(model.params()))
            .to(next(model.parameters()).device)
            .eval()
        )
    model = _replace(
        copy.deepcopy(model).eval(), lambda module: isinstance(module, _DiracConv), _DiracConv.fold
    )
    # Not by remove_parametrizations: that changes the module's class, which a copy shares with its original.
    model = _replace(
        model,
        _is_parametrized,
        lambda conv: plain_conv(parametrize.type_before_parametrizations(conv), conv, conv.weight),
    )
    if not any(isinstance(module, BATCH_NORMS) for module in model.modules()):
        return model
    return _fuse_batch_norms(model)


def _is_parametrized(module):
    return parametrize.is_parametrized(module, 'weight') and any(
        isinstance(part, DiracParametrization) for part in module.parametrizations.weight
    )


def _fuse_batch_norms(model):
    from torch.fx.experimental.optimization import fuse

    try:
        traced = torch.fx.symbolic_trace(model)
    except Exception as error:  # noqa: BLE001  tracing runs the model's own code
        warnings.warn(
            f'torch.fx can not trace {type(model).__name__} ({error}): its batch norms stay',
            stacklevel=3,
        )
        return model
    # fuse() looks at one call at a time: a convolution or a batch norm that is called more than once would be changed for all.
    parts = dict(traced.named_modules(remove_duplicate=False))
    calls = {}
    for node in traced.graph.nodes:
        if node.op == 'call_module':
            calls.setdefault(parts[node.target], []).append(node)
    kept = [
        module
        for module, nodes in calls.items()
        if isinstance(module, BATCH_NORMS)
        and module.track_running_stats
        and (
            len(nodes) > 1
            or any(
                len(calls.get(parts[source.target], ())) > 1
                for node in nodes
                for source in node.all_input_nodes
                if source.op == 'call_module'
            )
        )
    ]
    for module in kept:
        module.track_running_stats = False  # fuse() leaves such ones alone
    fused = fuse(traced, inplace=True, no_trace=True)
    for module in kept:
        module.track_running_stats = True
    fused.delete_all_unused_submodules()
    left = [
        node.target
        for node in fused.graph.nodes
        if node.op == 'call_module' and isinstance(fused.get_submodule(node.target), BATCH_NORMS)
    ]
    if left:
        warnings.warn(
            'batch norms that can not be folded stay: ' + ', '.join(dict.fromkeys(left)),
            stacklevel=3,
        )
    return fused

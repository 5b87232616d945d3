"""Dirac weights for any network.

    diracify(model)       # its convolutions get Dirac weights; the model still computes the same
    ...                   # train it
    folded = fold(model)  # plain convolutions again, with the batch norms folded in

This file needs torch, diracconv.py, diracnet.py and diracparams.py alone.
"""

import copy
import inspect
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from operator import attrgetter, eq
from types import SimpleNamespace
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_weights

import diracnet
from diracconv import (
    DiracConv,
    DiracConv1d,
    DiracConv2d,
    DiracConv3d,
    DiracParametrization,
    like_conv,
    split_weight,
)

LAYERS = {nn.Conv1d: DiracConv1d, nn.Conv2d: DiracConv2d, nn.Conv3d: DiracConv3d}
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


# --- into Dirac convolutions -----------------------------------------------------------------


def keeps_size(conv: nn.Module) -> bool:
    """Whether a convolution has stride 1, more than one tap, and output of its input's size."""
    if max(conv.kernel_size) == 1 or max(conv.stride) > 1 or conv.padding == 'valid':
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
        if _is_plain(conv, LAYERS) and owners[conv.weight] == 1
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


def _is_plain(layer, classes):
    """Whether a layer computes what one of these classes does, from ordinary parameters."""
    return (
        _torch_class(layer, classes) is not None
        and 'bias' in layer._parameters
        and type(layer.weight) is nn.Parameter
        and layer.weight.is_floating_point()
    )


def _torch_class(module, classes):
    """The one of these classes whose computation a module runs or inherits, or None."""

    def inherits(kind, method):
        own = getattr(module, method, None)
        return getattr(own, '__func__', None) is getattr(kind, method, None)

    for kind in classes:
        if isinstance(module, kind) and inherits(kind, 'forward'):
            return kind if inherits(kind, '_conv_forward') else None
    return None


def _dirac_conv(conv, fresh):
    weight = conv.weight
    kind = LAYERS[_torch_class(conv, LAYERS)]
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
    return dirac.train(conv.training)


def _replace(model, made):
    """Replace the keys of `made` with its values, in every place where they appear."""
    for module, replacement in made.items():
        _keep_hooks(replacement, module)
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


# --- into plain convolutions -----------------------------------------------------------------


@overload
def fold(model: nn.Module) -> nn.Module: ...
@overload
def fold(model: Mapping[str, Tensor]) -> dict[str, Tensor]: ...


def fold(model: nn.Module | Mapping[str, Tensor]) -> nn.Module | dict[str, Tensor]:
    """Fold Dirac weights and batch norms into plain convolutions.

    A batch norm is folded into the convolution directly before it, or into the linear layer if
    it is a BatchNorm1d of features (N, C). An activation in the batch norm's module stays. The
    batch norm stays, and a warning names it, if there is no such layer, if the layer is called
    more than once, if its output is also used elsewhere, or if a hook sees this output. All batch
    norms stay, with a warning that names them, if torch.fx cannot trace the model.

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
    model = _copy(model).eval()
    dirac = [module for module in model.modules() if _is_dirac(module)]
    model = _replace(model, {module: _plain(module) for module in dirac})
    if not any(_is_batch_norm(module) for module in model.modules()):
        return model
    return _fold_batch_norms(model)


def _copy(model):
    # deepcopy refuses computed tensors, such as the weight of torch's old weight norm.
    attributes = [value for module in model.modules() for value in vars(module).values()]
    tensors = [value for value in attributes if isinstance(value, torch.Tensor)]
    computed = {id(tensor): tensor.detach() for tensor in tensors if not tensor.is_leaf}
    return copy.deepcopy(model, computed)


def _is_dirac(module):
    return isinstance(module, DiracConv) or (
        parametrize.is_parametrized(module, 'weight')
        and any(isinstance(part, DiracParametrization) for part in module.parametrizations.weight)
    )


def _plain(conv):
    if isinstance(conv, DiracConv):
        return conv.fold()
    # remove_parametrizations would change the class of the module, which the copy shares with the
    # original.
    tensors = {name: getattr(conv, name) for name in conv.parametrizations}
    conv.__class__ = parametrize.type_before_parametrizations(conv)
    del conv.parametrizations
    for name, tensor in tensors.items():
        conv.register_parameter(name, nn.Parameter(tensor.detach()))
    return conv


def _is_batch_norm(module):
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or _is_other_batch_norm(module)


def _is_other_batch_norm(module):
    """Whether a module of another class has running statistics, as a frozen batch norm does."""
    has_statistics = getattr(module, 'running_var', None) is not None
    return has_statistics and not isinstance(module, nn.modules.batchnorm._BatchNorm)


def _fold_batch_norms(model):
    try:
        graph = _trace(model)
    except Exception as error:  # tracing runs the model's own code
        left = [name for name, module in model.named_modules() if _is_batch_norm(module)]
        warnings.warn(
            f'torch.fx cannot trace {type(model).__name__} ({error}): its batch norms stay: '
            f'{", ".join(left)}',
            stacklevel=3,
        )
        return model
    folded = _fold_in_graph(model, graph)
    left = _batch_norms_left(model, graph, folded)
    if left:
        warnings.warn(f'batch norms that cannot be folded stay: {", ".join(left)}', stacklevel=3)
    folded = torch.fx.GraphModule(model, graph)
    _keep_hooks(folded, model)
    return folded


def _trace(model):
    """The graph of a model. Batch norms with a forward of their own are traced, not called."""
    tracer = torch.fx.Tracer()
    is_leaf, layers = tracer.is_leaf_module, (*LAYERS, nn.Linear, *BATCH_NORMS)
    tracer.is_leaf_module = lambda module, name: (
        is_leaf(module, name) or _torch_class(module, layers) or _is_other_batch_norm(module)
    )
    return tracer.trace(model)


def _fold_in_graph(model, graph):
    """Fold batch norms into the model's layers, and remove their nodes from its graph. Returns the
    names of the modules that these nodes came from."""
    folded = set()
    uses = Counter(
        _attribute(model, node) for node in graph.nodes if node.op in ('call_module', 'get_attr')
    )
    for node in graph.nodes:
        norm = _batch_norm(model, node)
        layer = norm and _layer_before(model, node, norm, uses)
        if not layer:
            continue
        statistics = norm.running_mean, norm.running_var, norm.eps
        layer.weight, layer.bias = fuse_conv_bn_weights(
            layer.weight, layer.bias, *statistics, norm.weight, norm.bias
        )
        folded.add(_module_name(node))
        source, *tensors = node.all_input_nodes
        if isinstance(layer, nn.Linear):
            _assert_features(graph, node, source)
        node.replace_all_uses_with(source)
        for unused in (node, *(tensor for tensor in tensors if len(tensor.users) == 1)):
            graph.erase_node(unused)
    return folded


def _module_name(node):
    """The name of the module that a node calls, or in whose code it is; '' for the model."""
    if node.op == 'call_module':
        return node.target
    stack = node.meta.get('nn_module_stack')
    return next(reversed(stack.values()))[0] if stack else ''


def _assert_features(graph, node, source):
    """Check at run time that the input is (N, C): in (N, C, L), other features are normalized."""
    message = 'fold() folded a batch norm into this linear layer, whose output must be (N, C)'
    with graph.inserting_before(node):
        ndim = graph.call_function(getattr, (source, 'ndim'))
        graph.call_function(torch._assert, (graph.call_function(eq, (ndim, 2)), message))


def _attribute(model, node):
    return attrgetter(node.target)(model)


def _batch_norm(model, node):
    """The batch norm with fixed statistics that a node computes, or None.

    That is a module, or the arguments of a call of `F.batch_norm`.
    """
    norm = None
    if node.op == 'call_module':
        module = _attribute(model, node)
        has_hooks = module._forward_hooks or module._forward_pre_hooks
        if _torch_class(module, BATCH_NORMS) and not has_hooks:
            norm = module
    elif node.target is F.batch_norm:
        call = inspect.signature(F.batch_norm).bind(*node.args, **node.kwargs)
        call.apply_defaults()
        del call.arguments['input']
        if all(tensor.op == 'get_attr' for tensor in node.all_input_nodes[1:]):
            norm = SimpleNamespace(
                **torch.fx.node.map_arg(call.arguments, lambda tensor: _attribute(model, tensor))
            )
    is_fixed = norm and not norm.training and type(norm.running_mean) is torch.Tensor
    return norm if is_fixed else None


def _layer_before(model, node, norm, uses):
    """The layer whose output a node normalizes, if the batch norm can be folded into it."""
    source = node.all_input_nodes[0]
    if source.op != 'call_module':
        return None
    layer = _attribute(model, source)
    if not _is_plain(layer, (*LAYERS, nn.Linear) if isinstance(norm, nn.BatchNorm1d) else LAYERS):
        return None
    readers = [user for user in source.users if not _reads_shape(user)]
    is_used_once = len(readers) == uses[layer] == 1 and not (uses[layer.weight] + uses[layer.bias])
    has_size = len(layer.weight) == norm.running_mean.numel()
    return layer if is_used_once and has_size and not layer._forward_hooks else None


def _reads_shape(node):
    if node.op == 'call_method':
        return node.target in ('dim', 'size')
    return node.target is getattr and node.args[1] in ('device', 'dtype', 'ndim', 'shape')


def _batch_norms_left(model, graph, folded):
    """The names of the batch norms that a graph still calls, or whose code it still has. Of those
    that were `folded`, what follows the norm may stay."""
    names = dict.fromkeys(map(_module_name, graph.nodes))
    left = [name for name in names if _is_batch_norm(model.get_submodule(name))]
    return [name or type(model).__name__ for name in left if name not in folded]

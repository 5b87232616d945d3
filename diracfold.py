"""Which batch norms of a network can be folded into the layers before them. `diracify.fold` asks.

torch.fx traces the network's code; nothing of the network changes. This file needs torch alone.
"""

import builtins
import contextlib
import inspect
from collections import defaultdict
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.node import map_aggregate

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
AnyBatchNorm = nn.modules.batchnorm._BatchNorm  # the base class of these four and of others
MAX_PATHS = 64  # through the code of a network
REFUSALS = (AssertionError, ValueError)  # of inputs, by the network's own code


# --- kinds of modules ------------------------------------------------------------------------


def torch_class(module: nn.Module, classes: tuple[type, ...]) -> type | None:
    """The one of these classes whose computation a module runs or inherits, or None."""

    def inherits(kind, method):
        own = getattr(module, method, None)
        return getattr(own, '__func__', None) is getattr(kind, method, None)

    for kind in classes:
        if isinstance(module, kind) and inherits(kind, 'forward'):
            return kind if inherits(kind, '_conv_forward') else None
    return None


def is_plain(layer: nn.Module, classes: tuple[type, ...]) -> bool:
    """Whether a layer computes what one of these classes does, from ordinary parameters."""
    return (
        torch_class(layer, classes) is not None
        and 'bias' in layer._parameters
        and type(layer.weight) is nn.Parameter
        and layer.weight.is_floating_point()
    )


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a module is a batch norm of torch, or has running statistics, as a frozen one."""
    return isinstance(module, AnyBatchNorm) or getattr(module, 'running_var', None) is not None


# --- which batch norm follows which layer ----------------------------------------------------


def foldable_norms(model: nn.Module) -> tuple[dict, list[str]]:
    """The batch norms of a model in evaluation mode that can be folded.

    Each call of such a norm follows one of its layers, and each call of these layers is followed
    by the norm alone, in all paths through the code.

    Args:
        model: a copy, because its code runs with proxies as inputs, and may store them.

    Returns:
        foldable: a dict {norm: (layers, statistics)} with (mean, var, eps, weight, bias) as
            statistics.
        errors: why torch.fx cannot trace the model, and then those of its parts that it cannot
            trace either.
    """
    errors = []
    layers_before, norms_after, statistics = defaultdict(set), defaultdict(set), {}
    for part, graph in _traced_parts(model, errors, set()):
        norm_after = {}
        for node in graph.nodes:
            norm, values = _batch_norm(part, node)
            if norm:
                layer = _layer_before(part, node, norm, values)
                layers_before[norm].add(layer)
                norm_after[node.all_input_nodes[0]] = layer and norm
                statistics[norm] = values
        for node in graph.nodes:
            if node.op == 'call_module':
                norms_after[part.get_submodule(node.target)].add(norm_after.get(node))
            elif node.op == 'get_attr' and _owner_name(node) != _module_name(node):
                # Code of another module reads a tensor of a layer or norm.
                owner = part.get_submodule(_owner_name(node))
                layers_before[owner].add(None)
                norms_after[owner].add(None)
    foldable = {
        norm: (layers, statistics[norm])
        for norm, layers in layers_before.items()
        if None not in layers and all(norms_after[layer] == {norm} for layer in layers)
    }
    return foldable, errors


def _traced_parts(model, errors, seen):
    """The largest parts of a model that torch.fx can trace, each with the graph of each path."""
    if model in seen:
        return
    seen.add(model)
    try:
        paths = _paths(model)
    except Exception as error:  # tracing runs the model's own code
        reason = str(error).partition('\n')[0].partition('. ')[0]
        errors.append(f'torch.fx cannot trace {type(model).__name__}: {reason}')
        for child in model.children():
            yield from _traced_parts(child, errors, seen)
        return
    yield from ((model, path.graph) for path in paths)
    # What forward does not call, another method may call.
    called = set().union(*(path.called for path in paths))
    for module in model.modules():
        if called.isdisjoint(module.modules()):
            yield from _traced_parts(module, errors, seen)
            seen.update(module.modules())


def _paths(model):
    """The paths through a model's code, as tracers. A branch on a value is followed both ways, and
    optional arguments are given in some paths and left out in others."""
    arguments = inspect.signature(model.forward).parameters.values()
    defaults = {each.name: each.default for each in arguments if each.default is not each.empty}
    pending = [(constants, ()) for constants in ([None, defaults] if defaults else [None])]
    paths, n_traced, refusal = [], 0, None
    while pending:
        constants, decisions = pending.pop()
        tracer = _Tracer(decisions)
        try:
            with _proxies_as_tensors():
                tracer.trace(model, constants)
            paths.append(tracer)
        except REFUSALS as error:
            refusal = error
        new = range(len(decisions), len(tracer.decisions))
        pending += [(constants, (*tracer.decisions[:n], True)) for n in new]
        n_traced += 1
        if n_traced > MAX_PATHS:
            raise RuntimeError('its code has too many branches')
    if not paths:
        raise refusal
    return paths


class _Tracer(torch.fx.Tracer):
    """Follows one path through a model's code. At the first branches on a value, it decides as
    `decisions` says, and at later ones as for a value that is false."""

    def __init__(self, decisions):
        super().__init__()
        self.decisions, self.n_decided, self.called = list(decisions), 0, set()

    def to_bool(self, obj: torch.fx.Proxy) -> bool:
        if self.n_decided == MAX_PATHS:  # a loop until a value is true
            raise RuntimeError('its code has too many branches')
        if self.n_decided == len(self.decisions):
            self.decisions.append(False)
        self.n_decided += 1
        return self.decisions[self.n_decided - 1]

    def proxy(self, node: torch.fx.Node) -> torch.fx.Proxy:
        return _TensorProxy(node, self)

    def create_arg(self, a: Any) -> Any:
        return a.node if isinstance(a, torch.fx.Proxy) else super().create_arg(a)

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        # Batch norms with a forward of their own are traced, not called.
        is_layer = torch_class(module, (*CONVOLUTIONS, nn.Linear, *BATCH_NORMS)) is not None
        is_other_norm = is_batch_norm(module) and not isinstance(module, AnyBatchNorm)
        return is_layer or is_other_norm or super().is_leaf_module(module, name)

    def call_module(self, module: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        self.called.add(module)
        hooks = module._forward_hooks or module._forward_pre_hooks
        if not hooks or self.is_leaf_module(module, self.path_of_module(module)):
            return super().call_module(module, forward, args, kwargs)
        # Hooks are not called with proxies, but what they see has one more reader.
        if module._forward_pre_hooks or not isinstance(module, AnyBatchNorm):
            args, kwargs = map_aggregate(args, _read), map_aggregate(kwargs, _read)
        return map_aggregate(super().call_module(module, module.forward, args, kwargs), _read)


def _read(value):
    return torch.clone(value) if isinstance(value, torch.fx.Proxy) else value


class _TensorProxy(torch.fx.Proxy):
    """Passes for a tensor where code asks what it is given: for an attribute, or by isinstance."""

    def __getattr__(self, name):
        if not hasattr(Tensor, name):
            raise AttributeError(f'a tensor has no attribute {name}')
        return super().__getattr__(name)


@contextlib.contextmanager
def _proxies_as_tensors():
    """isinstance(proxy, Tensor) is true. A proxy with Tensor as its __class__ would crash C code,
    which asks in the same way, and then reads the tensor's memory."""
    original = builtins.isinstance

    def patched(obj, kinds):
        return original(obj, kinds) or (type(obj) is _TensorProxy and issubclass(Tensor, kinds))

    builtins.isinstance = patched
    try:
        yield
    finally:
        builtins.isinstance = original


def _owner_name(node):
    """The name of the module whose tensor a node gets."""
    return node.target.rpartition('.')[0]


def _module_name(node):
    """The name of the module in whose code a node is; '' for the model."""
    stack = node.meta.get('nn_module_stack')
    return next(reversed(stack.values()))[0] if stack else ''


def _batch_norm(model, node):
    """The module of the batch norm with fixed statistics that a node computes, and its (mean, var,
    eps, weight, bias); or (None, None).

    The node calls the module, or F.batch_norm in its code.
    """
    if node.op == 'call_module':
        norm = model.get_submodule(node.target)
        is_plain = torch_class(norm, BATCH_NORMS) is not None
        if not is_plain or norm.training or norm._forward_hooks or norm._forward_pre_hooks:
            return None, None
        values = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    elif node.target is F.batch_norm:
        norm = model.get_submodule(_module_name(node))
        call = inspect.signature(F.batch_norm).bind(*node.args, **node.kwargs)
        call.apply_defaults()
        tensors = node.all_input_nodes[1:]
        is_own = isinstance(norm, AnyBatchNorm)
        if not is_own or call.arguments['training'] or any(t.op != 'get_attr' for t in tensors):
            return None, None
        names = ('running_mean', 'running_var', 'eps', 'weight', 'bias')
        values = tuple(
            attrgetter(value.target)(model) if isinstance(value, torch.fx.Node) else value
            for value in map(call.arguments.get, names)
        )
    else:
        return None, None
    return (norm, values) if type(values[0]) is Tensor else (None, None)


def _layer_before(model, node, norm, values):
    """The layer whose output a node normalizes, if the batch norm can be folded into it."""
    source = node.all_input_nodes[0]
    if source.op != 'call_module':
        return None
    layer = model.get_submodule(source.target)
    takes_linear = isinstance(norm, nn.BatchNorm1d) and node.op == 'call_module'
    if not is_plain(layer, (*CONVOLUTIONS, nn.Linear) if takes_linear else CONVOLUTIONS):
        return None
    readers = [user for user in source.users if not _reads_shape(user)]
    has_size = len(layer.weight) == values[0].numel()
    return layer if len(readers) == 1 and has_size and not layer._forward_hooks else None


def _reads_shape(node):
    if node.op == 'call_method':
        return node.target in ('dim', 'size')
    return node.target is getattr and node.args[1] in ('device', 'dtype', 'ndim', 'shape')


# --- what takes the place of a batch norm ----------------------------------------------------


def without_norm(norm: nn.Module, layers: set[nn.Module]) -> nn.Module | None:
    """What takes the place of a batch norm that is folded into these layers: an identity, or what
    else the norm's own forward computes; None if torch.fx cannot tell this."""
    if torch_class(norm, BATCH_NORMS):
        is_linear = any(isinstance(layer, nn.Linear) for layer in layers)
        return FeatureIdentity() if is_linear else nn.Identity()
    paths = _paths(norm)
    if len(paths) > 1:
        return None
    graph = paths[0].graph
    for node in graph.nodes:
        if node.target is F.batch_norm:
            source, *tensors = node.all_input_nodes
            node.replace_all_uses_with(source)
            for unused in (node, *(tensor for tensor in tensors if len(tensor.users) == 1)):
                graph.erase_node(unused)
    return torch.fx.GraphModule(norm, graph)


class FeatureIdentity(nn.Identity):
    """In the place of a BatchNorm1d after a linear layer. Input and output are (N, C): in
    (N, C, L), the batch norm would normalize other features than the layer's."""

    def forward(self, input: Tensor) -> Tensor:
        torch._assert(
            input.ndim == 2, 'fold() needs outputs (N, C) of a linear layer before a norm'
        )
        return input

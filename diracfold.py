"""Which batch norms of a network can be folded into the layers before them. `diracify.fold` asks.

torch.fx traces the network's code; nothing of the network changes. This file needs torch alone.
"""

import builtins
import contextlib
import dis
import inspect
import itertools
import sys
from collections import defaultdict
from collections.abc import Callable
from operator import attrgetter
from types import CodeType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.node import map_aggregate
from torch.fx.proxy import TraceError
from torch.optim.swa_utils import AveragedModel

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
AnyBatchNorm = nn.modules.batchnorm._BatchNorm  # the base class of these four and of others
MAX_PATHS = 64  # through the code of a network
WRAPPERS = (AveragedModel, nn.DataParallel, nn.parallel.DistributedDataParallel)


# --- kinds of modules ------------------------------------------------------------------------


def torch_class(module: nn.Module, classes: tuple[type, ...]) -> type | None:
    """The one of these classes that a module is an instance of, if it has the class's forward and
    what this calls, or None."""

    def inherits(kind, method):  # or neither has it
        own = getattr(module, method, None)
        return getattr(own, '__func__', None) is getattr(kind, method, None)

    for kind in classes:
        if isinstance(module, kind) and inherits(kind, 'forward'):
            inner = inherits(kind, '_conv_forward') and inherits(kind, 'dirac_weight')
            return kind if inner else None
    return None


def is_plain(layer: nn.Module, classes: tuple[type, ...]) -> bool:
    """Whether a layer computes what one of these classes does, from ordinary parameters."""
    return (
        torch_class(layer, classes) is not None
        and 'bias' in layer._parameters
        and type(layer.weight) is nn.Parameter
        and layer.weight.is_floating_point()
    )


def is_wrapper(module: nn.Module) -> bool:
    """Whether a module computes what its attribute `module` does."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return torch_class(module, WRAPPERS) is not None and not hooks


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a module is a batch norm of torch, or has running statistics, as a frozen one."""
    return isinstance(module, AnyBatchNorm) or getattr(module, 'running_var', None) is not None


# --- which batch norm follows which layer ----------------------------------------------------


def foldable_norms(model: nn.Module) -> tuple[dict, str]:
    """The batch norms of a model in evaluation mode that can be folded.

    Each call of such a norm follows one of its layers, and each call of these layers is followed
    by the norm alone, in all paths that are traced.

    Args:
        model: a copy, because its code runs with proxies as inputs, and may store them.

    Returns:
        foldable: a dict {norm: (layers, statistics)} with (mean, var, eps, weight, bias) as
            statistics.
        error: why torch.fx cannot trace the model as a whole; '' if it can.
    """
    # In both, None stands for a call that cannot be folded.
    layers_before, norms_after = defaultdict(set), defaultdict(set)
    statistics, errors = {}, {}
    for part, graph in _traced_parts(model, errors):
        norm_after = {}
        for node in graph.nodes:
            norm, values = _batch_norm(part, node)
            if norm:
                layer = _layer_before(part, node, norm, values)
                layers_before[norm].add(layer)
                statistics[norm] = values
                if layer:
                    norm_after[node.all_input_nodes[0]] = norm
        for node in graph.nodes:
            if node.op == 'call_module':
                norms_after[part.get_submodule(node.target)].add(norm_after.get(node))
            elif node.op == 'get_attr':
                for owner in _owners(part, node):
                    if owner is not part.get_submodule(_module_name(node)):
                        # Code of another module reads a tensor of a layer or norm.
                        layers_before[owner].add(None)
                        norms_after[owner].add(None)
    foldable = {
        norm: (layers, statistics[norm])
        for norm, layers in layers_before.items()
        if None not in layers and all(norms_after[layer] == {norm} for layer in layers)
    }
    return foldable, errors.get(model, '')


def _traced_parts(model, errors):
    """The largest parts of a model that torch.fx can trace, each with the graph of each path. Adds
    to `errors` why others cannot be traced."""
    called = set()
    try:
        paths = _paths(model)
    except Exception as error:  # tracing runs the model's own code
        reason = str(error).partition('\n')[0].partition('. ')[0]
        errors[model] = f'torch.fx cannot trace {type(model).__name__}: {reason}'
    else:
        yield from ((model, path.graph) for path in paths)
        called = called.union(*(path.called for path in paths))
    for part in _uncalled_parts(model, called):
        if part not in errors:
            yield from _traced_parts(part, errors)


def _uncalled_parts(model, called):
    """The largest submodules of a model of which no part is among the modules `called`, and which
    the code around them, as far as it knows them, only calls as a whole."""
    reads = _attributes_read(model)
    for name, child in model.named_children():
        if name in reads or not called.isdisjoint(child.modules()):
            yield from _uncalled_parts(child, called)
        else:
            yield child


def _attributes_read(module):
    """The names of all attributes that a module's own code reads, except to call them at once."""
    classes = itertools.takewhile(lambda kind: kind is not nn.Module, type(module).__mro__)
    functions = [f for kind in classes for name, f in vars(kind).items() if name != '__init__']
    functions.append(vars(module).get('forward'))
    codes = [getattr(inspect.unwrap(f), '__code__', None) for f in functions]
    names = set()
    for code in filter(None, codes):
        codes.extend(constant for constant in code.co_consts if isinstance(constant, CodeType))
        names.update(
            instruction.argval
            for instruction in dis.get_instructions(code)
            # Until Python 3.11, calls of attributes have an instruction of their own.
            if instruction.opname == 'LOAD_ATTR'
            and not (sys.version_info >= (3, 12) and instruction.arg & 1)
        )
    return names


def _paths(model):
    """The paths through a model's code that are traced, as tracers. Each branch on a value is
    followed both ways, and optional arguments are given or not, in all combinations."""
    if 'forward' in vars(model):
        raise RuntimeError('its forward is not that of its class')
    arguments = inspect.signature(model.forward).parameters.values()
    defaults = {each.name: each.default for each in arguments if each.default is not each.empty}
    choices = [
        [(name, value), (name, not value) if isinstance(value, bool) else None]
        for name, value in defaults.items()
    ]
    pending = [
        (dict(filter(None, constants)) or None, ()) for constants in itertools.product(*choices)
    ]
    paths, n_traced, refusal = [], 0, None
    while pending:
        constants, decisions = pending.pop()
        tracer = _Tracer(decisions)
        try:
            with _proxies_as_tensors():
                tracer.trace(model, constants)
            for module in model.modules():
                map_aggregate(vars(module), _read)  # what the code stored has one more reader
            paths.append(tracer)
        except TraceError:
            raise
        except (AssertionError, ValueError) as error:
            refusal = error  # the model's own code refuses such an input
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
        if is_wrapper(module):
            return module.module(*args, **kwargs)
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
    """Passes for a tensor where code asks what it is given: for an attribute, or by isinstance.
    Membership of a set cannot be followed, because it begins with the hash."""

    def __hash__(self):
        raise TypeError('whether a set has a value is not known')

    def __getattr__(self, name):
        if not hasattr(Tensor, name):
            raise AttributeError(f'a tensor has no attribute {name}')
        return super().__getattr__(name)


@contextlib.contextmanager
def _proxies_as_tensors():
    """isinstance(proxy, Tensor) is true meanwhile, for Python code. C code would crash if it took
    a proxy for a tensor, so __class__ stays as it is."""
    original = builtins.isinstance

    def patched(obj, kinds):
        return original(obj, kinds) or (type(obj) is _TensorProxy and issubclass(Tensor, kinds))

    builtins.isinstance = patched
    try:
        yield
    finally:
        builtins.isinstance = original


def _owners(model, node):
    """The modules that have the tensor that a node gets, under any name."""
    tensor = attrgetter(node.target)(model)
    for module in model.modules():
        own = (*module._parameters.values(), *module._buffers.values())
        if any(each is tensor for each in own):
            yield module


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
    has_hooks = layer._forward_hooks or layer._forward_pre_hooks  # which may change the weight
    return layer if len(readers) == 1 and has_size and not has_hooks else None


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
    try:
        paths = _paths(norm)
    except Exception:  # its code needs the arguments that the network passes
        return None
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

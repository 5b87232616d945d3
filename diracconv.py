"""The Dirac weight, and convolution layers that use it.

A Dirac convolution learns the difference from the identity. The identity is part of the weight,
not a skip connection around the layer:

    W_hat = diag(alpha) * I + diag(beta) * W / ||W||

DiracConv1d, DiracConv2d and DiracConv3d are the convolutions of `torch.nn` with this effective
weight; `fold()` turns one into the equivalent plain convolution.

Source: Zagoruyko and Komodakis, arXiv 1706.00388, section 3. This file needs torch alone.
"""

import functools
from operator import index

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function

ALPHA, BETA = 1.0, 0.1  # initial values of the learned scales, as in version 2 of the paper


# --- the formula -----------------------------------------------------------------------------


def textbook_dirac_weight(weight: Tensor, alpha: Tensor, beta: Tensor, groups: int = 1) -> Tensor:
    """The weight of a Dirac convolution as the paper writes it, for readers, tests and all that
    traces or transforms functions; see `dirac_weight`."""
    delta = dirac_delta(weight, groups)  # I
    norms = filter_norms(weight)  # ||W||
    return per_filter(alpha, weight) * delta + per_filter(beta / norms, weight) * weight


def dirac_delta(weight: Tensor, groups: int = 1) -> Tensor:
    """The weight I with conv(x, I) = x, in the shape of `weight`, as `torch.nn.init.dirac_`.

    If a group has more outputs than inputs, the remaining rows are zero. Even kernels have no
    center: there, conv(x, I) is shifted by up to a pixel.
    """
    # torch.jit.trace records sizes as tensors; ONNX needs the numbers.
    out, in_per_group, *kernel = map(index, weight.shape)
    # Not torch.eye, which torch.export cannot decompose for more than 255 channels (torch 2.14).
    outputs = torch.arange(out, device=weight.device) % (out // groups)  # numbered in each group
    inputs = torch.arange(in_per_group, device=weight.device)
    is_one = outputs[:, None] == inputs  # (out, in / groups)
    for size in kernel:  # not F.pad, whose output torch.compile would keep for the backward pass
        is_one = is_one[..., None] & (torch.arange(size, device=weight.device) == size // 2)
    return is_one.to(weight.dtype)


def filter_norms(weight: Tensor) -> Tensor:
    """The l2 norms of the filters, (out,); 1 for a filter of zeros."""
    norms = torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.ndim)))
    return torch.where(norms > 0, norms, 1)  # so that such a filter stays zero


def per_filter(values: Tensor, weight: Tensor) -> Tensor:
    """View (out,) as (out, 1, ...), to multiply each filter of a weight."""
    return values.view(-1, *[1] * (weight.ndim - 1))


def dirac_weight(weight: Tensor, alpha: Tensor, beta: Tensor, groups: int = 1) -> Tensor:
    """`textbook_dirac_weight`, computed faster. Differentiable in all three tensors.

    Args:
        weight: (out, in / groups, *kernel), with any number of kernel dimensions.
        alpha: (out,), scales the identity.
        beta: (out,), scales the normalized weight.
        groups: the number of groups of the convolution; each has its own identity.

    Returns:
        (out, in / groups, *kernel). Row i is alpha[i] times row i of the delta, plus beta[i] times
        filter i divided by its l2 norm. An all-zero filter stays zero; its gradient is that of a
        filter with norm 1.

    To compute several ungrouped weights of one shape at once, concatenate them and make each a
    group.
    """
    if has_torch_function((weight, alpha, beta)):  # in a graph of torch.fx, this is one node
        tensors = (weight, alpha, beta)
        return handle_torch_function(dirac_weight, tensors, *tensors, groups)
    if _is_transformed():
        return textbook_dirac_weight(weight, alpha, beta, groups)
    return _FastDiracWeight.apply(weight, alpha, beta, groups)


def _is_transformed():
    """Whether torch traces, compiles or transforms this computation. `_FastDiracWeight` does not
    support all of that, and a compiler makes one kernel of the formula, and one of its gradient."""
    return (
        torch.jit.is_tracing()
        or torch.compiler.is_compiling()  # also torch.export
        or torch._C._are_functorch_transforms_active()  # torch.func: vmap, jacrev, ...
        or forward_ad._current_level >= 0  # forward-mode derivatives
    )


# --- the layers ------------------------------------------------------------------------------


def refuse_script(module: nn.Module) -> None:
    """The `__prepare_scriptable__` of a module, which torch.jit.script calls before it compiles."""
    raise NotImplementedError(
        f'torch.jit.script cannot compile {type(module).__name__}: compile the network that '
        'diracify.fold returns, or use torch.jit.trace, torch.export or torch.compile'
    )


class DiracConv:
    """What the three layers share; a base class listed before the `torch.nn` convolution."""

    plain_class: type[nn.Module]  # the convolution of torch.nn
    __prepare_scriptable__ = refuse_script

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if 'plain_class' in vars(cls) and '__init__' not in vars(cls):

            @functools.wraps(cls.plain_class.__init__)  # help() shows torch's arguments
            def __init__(self, *args, **kwargs):
                super(cls, self).__init__(*args, **kwargs)

            cls.__init__ = __init__

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        like_weight = {'device': self.weight.device, 'dtype': self.weight.dtype}
        self.alpha = nn.Parameter(torch.empty(self.out_channels, **like_weight))
        self.beta = nn.Parameter(torch.empty(self.out_channels, **like_weight))
        self._reset_scales()

    def reset_parameters(self) -> None:
        """Initialize weight and bias as torch does, alpha to 1.0 and beta to 0.1."""
        super().reset_parameters()
        if hasattr(self, 'alpha'):  # the base class calls this before the scales exist
            self._reset_scales()

    def _reset_scales(self):
        nn.init.constant_(self.alpha, ALPHA)
        nn.init.constant_(self.beta, BETA)

    def dirac_weight(self) -> Tensor:
        """The effective weight, (out, in / groups, *kernel)."""
        return dirac_weight(self.weight, self.alpha, self.beta, self.groups)

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.dirac_weight(), self.bias)

    @torch.no_grad()
    def fold(self) -> nn.Module:
        """The equivalent plain convolution: same arguments, device, dtype, mode, requires_grad."""
        # A layer is folded once and used often, so double precision is worth its cost here.
        tensors = map(in_double, (self.weight, self.alpha, self.beta))
        weight = dirac_weight(*tensors, self.groups).to(self.weight)
        # The meta device allocates nothing: the tensors are replaced right away.
        plain = like_conv(self.plain_class, self, device='meta', dtype=weight.dtype)
        with torch.enable_grad():  # the weight may be computed, by a parametrization
            plain.weight = nn.Parameter(weight, self.weight.requires_grad)
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.clone(), self.bias.requires_grad)
        return plain.train(self.training)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # The original code's modules store the identity as a buffer. Here it is implicit.
        stored = state_dict.pop(prefix + 'delta', None)
        own = dirac_delta(self.weight.detach(), self.groups)
        if stored is not None and not torch.equal(stored, own.to(stored)):
            error_msgs = args[-1]
            error_msgs.append(f'{prefix}delta is not the identity of this layer')
        super()._load_from_state_dict(state_dict, prefix, *args)


class DiracConv1d(DiracConv, nn.Conv1d):
    """A 1-d convolution with the Dirac weight. Takes the arguments of `torch.nn.Conv1d`.

    Input (N, in, L), output (N, out, L'). Parameters: weight, bias, and alpha and beta, (out,)
    each. Do not apply weight decay to alpha and beta: both would collapse to zero (paper,
    section 3).
    """

    plain_class = nn.Conv1d


class DiracConv2d(DiracConv, nn.Conv2d):
    """A 2-d convolution with the Dirac weight. Takes the arguments of `torch.nn.Conv2d`.

    Input (N, in, H, W), output (N, out, H', W'). Parameters as in DiracConv1d.
    """

    plain_class = nn.Conv2d


class DiracConv3d(DiracConv, nn.Conv3d):
    """A 3-d convolution with the Dirac weight. Takes the arguments of `torch.nn.Conv3d`.

    Input (N, in, D, H, W), output (N, out, D', H', W'). Parameters as in DiracConv1d.
    """

    plain_class = nn.Conv3d


class DiracParametrization(nn.Module):
    """The Dirac weight for `torch.nn.utils.parametrize`, for any convolution.

        register_parametrization(conv, 'weight', DiracParametrization(conv))
        remove_parametrizations(conv, 'weight')  # leaves the folded weight

    The convolution still computes the same function (see `split_weight`). With fresh=True, alpha
    and beta start at 1.0 and 0.1 and the weight is kept, so the function changes.
    """

    __prepare_scriptable__ = refuse_script

    def __init__(self, conv: nn.Module, fresh: bool = False) -> None:
        super().__init__()
        self.groups, self.fresh = conv.groups, fresh
        weight = conv.weight.detach()
        scales = (weight.new_full(weight.shape[:1], value) for value in (ALPHA, BETA))
        self.alpha, self.beta = (nn.Parameter(s, conv.weight.requires_grad) for s in scales)

    def forward(self, weight: Tensor) -> Tensor:
        return dirac_weight(weight, self.alpha, self.beta, self.groups)

    @torch.no_grad()
    def right_inverse(self, weight: Tensor) -> Tensor:
        """Split an ordinary weight. torch calls this at registration and when one is assigned."""
        if self.fresh:
            self.fresh = False  # only at registration: a weight that is assigned later is kept
            return weight
        weight, alpha, beta = split_weight(weight, self.groups)
        self.alpha.copy_(alpha)
        self.beta.copy_(beta)
        return weight


def like_conv(kind: type[nn.Module], conv: nn.Module, **kwargs) -> nn.Module:
    """A new convolution of class `kind` with the arguments of `conv`."""
    sizes = ('in_channels', 'out_channels', 'kernel_size', 'stride', 'padding', 'dilation')
    names = (*sizes, 'groups', 'padding_mode')
    arguments = {name: getattr(conv, name) for name in names}
    return kind(**arguments, bias=conv.bias is not None, **kwargs)


def in_double(tensor: Tensor) -> Tensor:
    """A tensor in double precision, on the CPU if its device may lack that."""
    return (tensor.cpu() if tensor.device.type in ('mps', 'xpu') else tensor).double()


@torch.no_grad()
def split_weight(weight: Tensor, groups: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """The (weight, alpha, beta) of the Dirac convolution that is equivalent to an ordinary one.

    Args:
        weight: (out, in / groups, *kernel), the weight of the ordinary convolution.

    Returns:
        (weight, alpha, beta). alpha, (out,), is the diagonal of the central tap; weight is the
        rest; beta, (out,), has the norms of the filters of this rest. From these three,
        `dirac_weight` computes the ordinary weight again, up to rounding. A filter that is exactly
        an identity has no rest: its weight and beta are 0, and get no gradient.
    """
    weight = weight.detach().clone()
    alpha = torch.zeros(weight.shape[0], device=weight.device, dtype=weight.dtype)
    diagonal = _central_diagonal(weight, groups)  # a view: writing to it changes the weight
    alpha.unflatten(0, (groups, -1))[:, : diagonal.shape[1]] = diagonal
    diagonal.zero_()
    return weight, alpha, torch.linalg.vector_norm(weight.flatten(1), dim=1)


# --- the formula, computed faster ------------------------------------------------------------


class _FastDiracWeight(torch.autograd.Function):
    """`textbook_dirac_weight` without a delta in memory, and with a backward pass by hand, which
    reads the weight fewer times than autograd's."""

    @staticmethod
    def forward(weight, alpha, beta, groups):
        effective = weight * per_filter(beta / filter_norms(weight), weight)
        diagonal = _central_diagonal(effective, groups)  # a view
        diagonal.add_(alpha.unflatten(0, (groups, -1))[:, : diagonal.shape[1]])
        return effective

    @staticmethod
    def setup_context(ctx, inputs, output):
        weight, _, beta, ctx.groups = inputs
        ctx.save_for_backward(weight, beta)

    @staticmethod
    def backward(ctx, grad):
        weight, beta = ctx.saved_tensors
        diagonal = _central_diagonal(grad, ctx.groups)
        missing = weight.shape[0] // ctx.groups - diagonal.shape[1]  # outputs without identity
        grad_alpha = F.pad(diagonal, (0, missing)).reshape(-1)
        norms = filter_norms(weight)
        grad_beta = torch.linalg.vecdot(_rows(grad, weight), _rows(weight, weight)) / norms
        # d W / d weight = beta / n * (grad - weight * <grad, weight> / n^2), with the norms n
        factor = beta / norms
        along_filters = per_filter(grad_beta * factor / norms, weight)
        grad_weight = (grad * per_filter(factor, weight)).addcmul_(weight, along_filters, value=-1)
        return grad_weight, grad_alpha, grad_beta, None


def _rows(tensor, like):
    """The filters of a tensor as rows, (out, taps), in the memory order of `like`."""
    return (tensor if like.is_contiguous() else tensor.movedim(1, -1)).reshape(len(tensor), -1)


def _central_diagonal(weight, groups):
    """View of the taps where the delta is one, (groups, min(out, in) / groups)."""
    center = tuple(size // 2 for size in weight.shape[2:])
    taps = weight[(slice(None), slice(None), *center)]  # (out, in / groups)
    return taps.view(groups, -1, taps.shape[1]).diagonal(dim1=1, dim2=2)

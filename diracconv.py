"""The Dirac weight, and convolutions that carry it.

A Dirac convolution learns the difference from the identity, in the weight instead of in the data flow:

    W_hat = diag(alpha) * I + diag(beta) * W / ||W||

(Zagoruyko and Komodakis, DiracNets, arXiv 1706.00388, section 3). `dirac_weight` is that formula; the layers
DiracConv1d, DiracConv2d and DiracConv3d are `torch.nn` convolutions whose effective weight it is, and
`fold()` turns each into the plain convolution that computes the same. Depends on torch alone.
"""

import inspect

import torch
from torch import nn

ALPHA, BETA = 1.0, 0.1  # where the learned scales start (version 2 of the paper)


def dirac_weight(weight, alpha, beta, groups=1):
    """The weight of a Dirac convolution, differentiable in all three tensors.

    Args:
        weight: (out, in / groups, *kernel), any number of kernel dimensions.
        alpha: (out,), the scale of the identity; beta: (out,), the scale of the normalized weight.
        groups: as of the convolution; the identity is then one block per group.

    Returns:
        (out, in / groups, *kernel): row i of the delta, as `torch.nn.init.dirac_` builds it, times alpha[i], plus
        beta[i] times the filter i divided by its l2 norm. Where out > in (per group), the rows beyond have no
        delta. A filter of zeros stays zeros, and its gradient is that of a filter of norm 1.

    Weights of one shape are best computed together: concatenated, they are the groups of one weight.
    """
    out, inside = weight.shape[:2]
    # Rows of taps, in the order in which they lie in memory, so that nothing is copied.
    channels_last = (
        weight.ndim == 4
        and not weight.is_contiguous()
        and weight.is_contiguous(memory_format=torch.channels_last)
    )
    ordered = weight.movedim(1, -1) if channels_last else weight
    flat = ordered.flatten(1)  # (out, taps)
    effective = _normalized(flat, beta) if torch.jit.is_tracing() else _Normalized.apply(flat, beta)
    # Only the diagonal of the central tap receives alpha: that saves building and reading a delta tensor. (index_put_, since
    # autograd would copy all of the gradient for an addition to a view.)
    n = min(out // groups, inside)
    rows = torch.arange(out, device=weight.device).view(groups, -1)[:, :n].reshape(-1)
    columns = torch.arange(n, device=weight.device).repeat(groups)
    centre, kernel = _centre(weight.shape[2:])
    taps = centre * inside + columns if channels_last else columns * kernel + centre
    effective.index_put_((rows, taps), alpha.view(groups, -1)[:, :n].reshape(-1), accumulate=True)
    effective = effective.view(ordered.shape)
    return effective.movedim(-1, 1) if channels_last else effective


def _norms(rows):
    norms = torch.linalg.vector_norm(rows, dim=1)
    return torch.where(norms > 0, norms, 1)


def _normalized(rows, scale):
    """Each row of (out, taps) divided by its l2 norm and times its scale, (out,). Rows of zeros stay."""
    return rows * (scale / _norms(rows))[:, None]


class _Normalized(torch.autograd.Function):
    """`_normalized`, with a backward pass in half as many passes over the weight as autograd's. (A trace can't be saved with it.)"""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows, scale):
        return _normalized(rows, scale)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        rows, scale = ctx.saved_tensors
        norms = _norms(rows)
        grad_scale = torch.linalg.vecdot(grad, rows) / norms
        factor = scale / norms
        grad_rows = (grad * factor[:, None]).addcmul_(
            rows, (grad_scale * factor / norms)[:, None], value=-1
        )
        return grad_rows, grad_scale


def _centre(sizes):
    """Index of the central tap in a flat kernel, and the number of its taps."""
    centre, kernel = 0, 1
    for size in sizes:
        centre, kernel = centre * size + size // 2, kernel * size
    return centre, kernel


@torch.no_grad()
def split_weight(weight, groups=1):
    """The (weight, alpha, beta) of a Dirac convolution that computes what an ordinary `weight` does.

    alpha is the part of the identity that is in it, the diagonal of the central tap; the rest is the weight, and beta the
    norm of its filters. `dirac_weight` of the three gives the argument back, up to rounding.
    """
    weight = weight.detach().clone()
    alpha = torch.zeros(weight.shape[0], device=weight.device, dtype=weight.dtype)
    diagonal = _diagonal(weight, groups)  # (groups, n)
    alpha.unflatten(0, (groups, -1))[:, : diagonal.shape[1]] = diagonal
    diagonal.zero_()
    return weight, alpha, torch.linalg.vector_norm(weight.flatten(1), dim=1)


def _diagonal(weight, groups):
    """View of the taps where the delta is one, (groups, min(out, in) / groups)."""
    centre = tuple(size // 2 for size in weight.shape[2:])
    taps = weight[(slice(None), slice(None), *centre)]  # (out, in / groups)
    return taps.unflatten(0, (groups, -1)).diagonal(dim1=1, dim2=2)


def plain_conv(kind, conv, weight):
    """A torch.nn.Conv1d, 2d or 3d (`kind`) with the arguments, bias and mode of `conv`, and a weight of its own."""
    plain = kind(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        conv.bias is not None,
        conv.padding_mode,
        device='meta',
        dtype=weight.dtype,
    )
    plain.weight = nn.Parameter(weight.detach())
    if conv.bias is not None:
        plain.bias = nn.Parameter(conv.bias.detach().clone())
    return plain.train(conv.training)


class _DiracConv:
    """What the three layers share; comes before the `torch.nn` convolution among the bases."""

    def __init_subclass__(cls):
        cls.__signature__ = inspect.signature(
            cls.plain_class
        )  # the arguments are torch's, and help() says so

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        like_weight = {'device': self.weight.device, 'dtype': self.weight.dtype}
        self.alpha = nn.Parameter(torch.empty(self.out_channels, **like_weight))
        self.beta = nn.Parameter(torch.empty(self.out_channels, **like_weight))
        self._reset_scales()

    def reset_parameters(self):
        """Initialize as torch's convolutions are, and the scales to 1.0 and 0.1."""
        super().reset_parameters()
        if hasattr(self, 'alpha'):  # the base class calls this before there are scales
            self._reset_scales()

    def _reset_scales(self):
        nn.init.constant_(self.alpha, ALPHA)
        nn.init.constant_(self.beta, BETA)

    def dirac_weight(self):
        """The effective weight, (out, in / groups, *kernel)."""
        return dirac_weight(self.weight, self.alpha, self.beta, self.groups)

    def forward(self, input):
        return self._conv_forward(input, self.dirac_weight(), self.bias)

    @torch.no_grad()
    def fold(self):
        """The plain convolution of the same arguments, device, dtype and mode that computes the same."""
        # Folding happens once and is read for ever: double precision costs nothing here.
        weight = dirac_weight(
            self.weight.double(), self.alpha.double(), self.beta.double(), self.groups
        )
        return plain_conv(self.plain_class, self, weight.to(self.weight.dtype))

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        # The original's modules keep the identity as a buffer. Ours is implied, so a stored one must agree with it.
        delta = state_dict.pop(prefix + 'delta', None)
        if delta is not None and not self._is_delta(delta):
            error_msgs.append(
                f'{prefix}delta is not the identity of this layer, a Dirac delta of shape {tuple(self.weight.shape)}'
            )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _is_delta(self, delta):
        if delta.shape != self.weight.shape:
            return False
        return delta.is_meta or torch.equal(
            delta, nn.init.dirac_(torch.empty_like(delta), self.groups)
        )

    def extra_repr(self):
        text = super().extra_repr()
        if not self.alpha.is_meta:
            text += (
                f', alpha={self.alpha.detach().mean():.3g}, beta={self.beta.detach().mean():.3g}'
            )
        return text


class DiracConv1d(_DiracConv, nn.Conv1d):
    """A 1-d convolution with the Dirac weight. Arguments, in their order, are those of `torch.nn.Conv1d`.

    Input (N, in, L), output (N, out, L'). Parameters: weight, bias, and alpha and beta, (out,) each; give the last
    two no weight decay (with it both collapse to zero, paper section 3). repr shows their means.
    """

    plain_class = nn.Conv1d


class DiracConv2d(_DiracConv, nn.Conv2d):
    """A 2-d convolution with the Dirac weight. Arguments, in their order, are those of `torch.nn.Conv2d`.

    Input (N, in, H, W), output (N, out, H', W'). Parameters as of DiracConv1d.
    """

    plain_class = nn.Conv2d


class DiracConv3d(_DiracConv, nn.Conv3d):
    """A 3-d convolution with the Dirac weight. Arguments, in their order, are those of `torch.nn.Conv3d`.

    Input (N, in, D, H, W), output (N, out, D', H', W'). Parameters as of DiracConv1d.
    """

    plain_class = nn.Conv3d


class DiracParametrization(nn.Module):
    """The Dirac weight as a parametrization of `torch.nn.utils.parametrize`, for any convolution:

        register_parametrization(conv, 'weight', DiracParametrization(conv))
        remove_parametrizations(conv, 'weight')     # leaves the folded weight

    The convolution goes on computing what it does (`split_weight`); with `fresh`, alpha and beta start at 1.0 and 0.1 instead.
    """

    def __init__(self, conv, fresh=False):
        super().__init__()
        self.groups, self.fresh = conv.groups, fresh
        self.alpha = nn.Parameter(torch.full_like(conv.weight.detach().flatten(1)[:, 0], ALPHA))
        self.beta = nn.Parameter(torch.full_like(self.alpha.detach(), BETA))

    def forward(self, weight):
        return dirac_weight(weight, self.alpha, self.beta, self.groups)

    @torch.no_grad()
    def right_inverse(self, weight):
        """Called where a weight is given: at registration, and when one is assigned."""
        if self.fresh:
            self.fresh = False
            return weight
        weight, alpha, beta = split_weight(weight, self.groups)
        self.alpha.copy_(alpha)
        self.beta.copy_(beta)
        return weight

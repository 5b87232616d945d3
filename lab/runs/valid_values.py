"""Checks of single values from a file, before anything uses them."""

import reprlib
import sys


def is_count(value, least=0, most=2**63 - 1):
    """Whether this is a whole number in this range."""
    return type(value) is int and least <= value <= most


def is_number(value, least=-sys.float_info.max, most=sys.float_info.max):
    """Whether this is a finite number in this range."""
    return type(value) in (int, float) and least <= value <= most


def short(value):
    """A value in words, of a line's length whatever it is."""
    try:
        return reprlib.repr(value)
    except Exception:  # too many digits, or any error of its own
        return f'a {type(value).__name__}'


def check_tensor(name, tensor, shape=None):
    """Raise ValueError unless this is a dense tensor of finite real numbers, with this shape."""
    import torch  # slow to import, and the checks above do not need it

    floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f'{name} is a {type(tensor).__name__}, not a tensor')
    is_dense = tensor.layout is torch.strided and not tensor.is_nested
    if not is_dense or tensor.device.type != 'cpu' or tensor.dtype not in floats:
        raise ValueError(
            f'{name} ({tensor.dtype}, {tensor.layout}, {tensor.device}) must be a dense tensor of '
            f'{", ".join(map(str, floats))}'
        )
    if shape is not None and tensor.shape != shape:
        raise ValueError(f'{name} is {tuple(tensor.shape)} instead of {tuple(shape)}')
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f'{name} repeats its numbers; save a contiguous copy of it')
    if not tensor.isfinite().all():
        raise ValueError(f'{name} is not finite')


def check_param(key, tensor, shape=None):
    """`check_tensor` for a tensor of a network; variances may not be negative."""
    check_tensor(key, tensor, shape)
    if key.endswith('running_var') and (tensor < 0).any():
        raise ValueError(f'{key} has negative values')

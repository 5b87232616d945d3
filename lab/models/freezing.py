"""Freezing the first groups of a network: they keep their parameters and running statistics."""

import re


def freeze(params, last):
    """Let the parameters of the first groups require no gradients. Returns params.

    Args:
        params: flat dict of any model, changed in place.
        last: name of the last part to freeze: stem (what comes before the first group), group0,
            group1, ..., or layer1, layer2, ... in residual networks. None freezes nothing.

    Raises:
        ValueError: the network has no such part.
    """
    if last is None:
        return params
    parts = {key: _part(key) for key in params}
    names = [name for name in dict.fromkeys(parts.values()) if name]
    if last not in names:
        raise ValueError(f'--freeze {last} is impossible: choose one of {", ".join(names)}')
    frozen = names[: names.index(last) + 1]
    for key, name in parts.items():
        if name in frozen:
            params[key].requires_grad_(False)
    return params


def _part(key):
    """The part of a parameter; None for those of the classifier."""
    if key.startswith('fc.'):
        return None
    group = re.match(r'(group|layer)\d+', key)
    return group[0] if group else 'stem'


def with_frozen(norm):
    """A batch norm function that uses the running statistics where its weight is frozen."""

    def frozen_norm(x, mean, var, weight, bias, training, momentum, eps):
        training = training and weight.requires_grad
        return norm(x, mean, var, weight, bias, training, momentum, eps)

    return frozen_norm

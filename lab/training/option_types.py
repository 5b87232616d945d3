"""The types that train.py's options need beyond argparse's own, and an action for pairs of flags.

A type raises ValueError or argparse.ArgumentTypeError for a text that it refuses.
"""

import argparse
import json
import math

from diracparams import bn_scales


def number(kind, at_least=-math.inf, at_most=None, above=-math.inf, below=math.inf, words=()):
    """An argparse type: an int or float (`kind`) in this range, or one of the words. `at_most` is
    what int64 and float32 can hold, unless it is given."""
    if at_most is None:
        at_most = 2**63 - 1 if kind is int else 1e37

    def parse(text):
        if text in words:
            return text
        value = kind(text)
        if not (at_least <= value <= at_most and above < value < below):  # NaN is in no range
            raise argparse.ArgumentTypeError(f'{text} is out of range: {", ".join(limits)}')
        return value

    bounds = {'at least': at_least, 'above': above, 'at most': at_most, 'below': below}
    limits = [f'{name} {bound}' for name, bound in bounds.items() if math.isfinite(bound)]
    parse.__name__ = {int: 'whole number', float: 'number'}[kind]
    return parse


def number_or_share(text):
    """A number of samples, or a share of them such as 20%."""
    if not text.endswith('%'):
        return number(int, at_least=0)(text)
    number(float, above=0, below=100)(text.removesuffix('%'))
    return text


def epoch_list(text):
    try:
        epochs = json.loads(text)
    except (ValueError, RecursionError):
        epochs = None
    valid = isinstance(epochs, list) and all(type(e) is int and e > 0 for e in epochs)
    if not valid or epochs != sorted(set(epochs)):
        raise argparse.ArgumentTypeError(
            f'{text} must be a JSON list of rising epochs such as [60,120,160]'
        )
    return epochs


def warmup(text):
    """A number of steps, ramp:STEPS, or ramp:EPOCHSe."""
    length = text.removeprefix('ramp:')
    try:
        if text.startswith('ramp:') and length.endswith('e'):
            return f'ramp:{number(float, at_least=0)(length.removesuffix("e")):g}e'
        steps = number(int, at_least=0)(length)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f'{text} must be a number of steps, ramp:STEPS, or ramp:EPOCHSe such as ramp:5e'
        ) from None
    return f'ramp:{steps}' if text.startswith('ramp:') else steps


def initial_bn(text):
    """'paper', 'shifted', or two numbers such as 1,0.5: a weight and a bias."""
    if text in ('paper', 'shifted'):
        return text
    try:
        return list(bn_scales([float(scale) for scale in text.strip('[]').split(',')]))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f'{text} must be paper, shifted, or a weight above 0 and a bias, such as 1,0.5'
        ) from None


class Switch(argparse.Action):
    """Two flags for one option: --NAME turns it on, --no_NAME off."""

    def __init__(self, option_strings, dest, **kwargs):
        super().__init__(option_strings, dest, nargs=0, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, option_string == self.option_strings[0])

"""Types of options: functions that turn the text of a command line into a value, for argparse."""

import argparse
import json
import re

import diracparams

LARGEST = 1e37  # of the numbers with a fraction; float32 has little more


def plain_digits(text):
    """The text; ValueError if it has digits that Python reads but nobody means to write."""
    if '_' in text or not text.isascii():
        raise ValueError
    return text


def number(kind, least, exclusive=False, most=None):
    """An argparse type: an int or float of at least, or more than, `least`, and at most `most`,
    by default the largest that training can use."""
    if most is None:
        most = 2**63 - 1 if kind is int else LARGEST

    def parse(text):
        value = kind(plain_digits(text))
        too_small = value < least or (exclusive and value == least)
        if too_small or not value <= most:  # NaN is neither
            bound = 'more than' if exclusive else 'at least'
            raise argparse.ArgumentTypeError(
                f'{text} is out of range: it must be a number of {bound} {least} and at most {most}'
            )
        return value

    parse.__name__ = {int: 'whole number', float: 'number'}[kind]
    return parse


def amount(text):
    """A number of samples, or a share of them such as 20%."""
    share = text.removesuffix('%')
    if share == text:
        return number(int, 0)(text)
    try:
        is_valid = 0 < float(plain_digits(share)) < 100
    except ValueError:
        is_valid = False
    if not is_valid:
        raise argparse.ArgumentTypeError(
            f'{text} must be a number of samples, or a share above 0% and below 100%'
        )
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
    """A number of steps, or ramp:STEPS."""
    name, ramp, steps = text.rpartition('ramp:')
    if name:
        raise argparse.ArgumentTypeError(f'{text} must be a number of steps, or ramp:STEPS')
    steps = number(int, 0)(steps)
    return f'{ramp}{steps}' if ramp else steps


def bn_scales(text):
    """'paper', 'shifted', or two numbers such as 1,0.5."""
    if text in ('paper', 'shifted'):
        return text
    try:
        scales = [float(part) for part in plain_digits(text).strip('[]').split(',')]
        diracparams.bn_scales(scales)
        if max(map(abs, scales)) > LARGEST:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(
            f'{text} must be paper, shifted, or a weight above 0 and a bias, such as 1,0.5'
        ) from None
    return scales


def dirac_scale(text):
    """'depth', or a number above 0."""
    return text if text == 'depth' else number(float, 0, exclusive=True)(text)


def part(text):
    """The name of a part of a network."""
    if not re.fullmatch(r'stem|(group|layer)[0-9]', text):
        raise argparse.ArgumentTypeError(
            f'{text} must be stem, or a group or layer: group0, layer1'
        )
    return text


def decay(text):
    """A number in (0, 1)."""
    value = number(float, 0, exclusive=True)(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f'{text} must be below 1')
    return value


def momentum(text):
    """'cumulative', or a number in (0, 1]."""
    if text == 'cumulative':
        return text
    try:
        value = float(plain_digits(text))
    except ValueError:
        value = 0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(
            f'{text} must be cumulative, or a number above 0 and at most 1'
        )
    return value

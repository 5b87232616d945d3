"""Types of options: functions that turn the text of a command line into a value, for argparse."""

import argparse
import json
import math

import diracnet


def number(kind, least, exclusive=False):
    """An argparse type: a finite int or float of at least, or more than, `least`."""

    def parse(text):
        value = kind(text)
        if not math.isfinite(value) or value < least or (exclusive and value == least):
            bound = 'more than' if exclusive else 'at least'
            raise argparse.ArgumentTypeError(f'{text} must be {bound} {least}')
        return value

    parse.__name__ = {int: 'whole number', float: 'number'}[kind]
    return parse


def epoch_list(text):
    try:
        epochs = json.loads(text)
    except ValueError:
        epochs = None
    valid = isinstance(epochs, list) and all(type(e) is int and e > 0 for e in epochs)
    if not valid or epochs != sorted(epochs):
        raise argparse.ArgumentTypeError(
            f'{text} must be a JSON list of rising epochs such as [60,120,160]'
        )
    return epochs


def bn_scales(text):
    """'paper', 'shifted', or two numbers such as 1,0.5."""
    if text in ('paper', 'shifted'):
        return text
    try:
        scales = [float(part) for part in text.strip('[]').split(',')]
        diracnet.bn_scales(scales)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f'{text} must be paper, shifted, or a weight above 0 and a bias, such as 1,0.5'
        ) from None
    return scales


def dirac_scale(text):
    """'depth', or a number above 0."""
    return text if text == 'depth' else number(float, 0, exclusive=True)(text)


def momentum(text):
    """'cumulative', or a number in (0, 1]."""
    if text == 'cumulative':
        return text
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(
            f'{text} must be cumulative, or a number above 0 and at most 1'
        )
    return value

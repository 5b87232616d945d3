"""Names of classes and data sets, and numbers, for people."""

import os
from functools import cache
from pathlib import Path

from lab.errors import UserError, printable

CLASS_NAMES = 'classes.txt'  # may be next to train/: a line FOLDER<TAB>NAME for each class
# ImageNet's 1,000 classes: WordNet's ids, and the names that torchvision gives them.
IMAGENET = Path(__file__).with_name('imagenet_classes.txt')


def readable(classes, n):
    """The names of n classes, from a list `classes` or None. ImageNet's names replace WordNet's
    ids, such as n01440764, of any of its 1,000 classes, and stand for 1,000 classes without names.
    """
    names = imagenet_names()
    if not classes:
        return list(names.values()) if n == len(names) else classes
    return [names[label] for label in classes] if set(classes) <= names.keys() else classes


@cache
def imagenet_names():
    """{WordNet's id: name}, in the order of the ids, which is that of the classes."""
    return read_names(IMAGENET)


def read_names(path):
    """{folder: name} in a file with a line FOLDER<TAB>NAME for each class; {} if it is missing.
    Raises UserError if it cannot be read, or if a line has another form."""
    try:
        lines = path.read_text('utf-8-sig').splitlines()
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        reason = getattr(error, 'strerror', None) or 'it is not UTF-8'
        raise UserError(f'{printable(str(path))} cannot be read ({reason})') from None
    names = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        label, _, name = (part.strip() for part in line.partition('\t'))
        if not (label and name):
            raise UserError(
                f'{printable(str(path))}, line {number}: {printable(line)!r} is not a folder, a '
                'tab and a name'
            )
        names[label] = name
    return names


def display_name(dataset, root):
    """What to call a data set in `root`: a folder of images has the name of the folder."""
    name = Path(os.path.expanduser(root)).resolve().name
    return name or dataset if dataset == 'folder' else dataset


def rounded(value, decimals=0):
    """A positive number with `decimals`, or with more if it would keep less than two digits."""
    return f'{value:#.2g}' if value < 9.95 / 10**decimals else f'{value:,.{decimals}f}'


def percent(value, decimals=2):
    """A percentage with `decimals`, which is 0 or 100 only if the value is exactly that."""
    least = 10**-decimals
    return f'{value if value in (0, 100) else min(max(value, least), 100 - least):.{decimals}f}'

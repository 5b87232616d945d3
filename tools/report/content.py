"""What a report says: facts about a network, and sections with pictures."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from lab.data.names import readable
from lab.data.preprocessing import Preprocessing, normalize
from lab.errors import UserError, printable
from lab.folded import (
    check_classes,
    compute_logits,
    images_tested,
    load_data,
    preprocessing_of,
    sample_pixels,
)
from lab.models.registry import FOLDABLE
from lab.runs.folder import COMMANDS, read_commands
from lab.runs.log import parse_line
from tools.class_maps import class_maps, draw
from tools.plot import draw_curves
from tools.propagation import IMAGES, is_chain, measure
from tools.report import pictures

MISTAKES = 12  # pictures of them


class Section(NamedTuple):
    title: str
    text: str
    picture: str = ''  # a data URI
    cards: tuple = ()  # (data URI, caption)


def describe(checkpoint, path, dataroot=None):
    """The report of a Checkpoint that was read from `path`.

    Returns:
        facts: (name, value) of each.
        sections: a list of Sections.
        missing: the reason why the images could not be had, or ''.

    Raises:
        UserError: the log in the checkpoint is broken.
    """
    log = [parse_line(line, 'its log') for line in checkpoint.log or []]
    if log:
        figure = draw_curves({'test': [log]}, stacked=True)
        text, curves = 'Loss and error over the epochs.', pictures.figure_uri(figure)
    else:
        text, curves = f'{printable(str(checkpoint.path))} has no log of its training.', ''
    sections, missing = [Section('Training', text, curves)], ''
    tests = None
    try:
        tests = test(checkpoint, dataroot)
    except UserError as error:
        missing = str(error)
        sections.append(Section('Images', f'What needs images is missing: {missing}'))
    if tests:
        sections += [confusion(tests), accuracies(tests), mistakes(checkpoint, tests)]
    sections += weights(checkpoint)
    if tests and is_chain(checkpoint.network['model']) and not checkpoint.folded:
        sections.append(signal(checkpoint, tests))
    return facts(checkpoint, path, log, tests), sections, missing


# --- where it comes from ---------------------------------------------------------------------


def facts(checkpoint, path, log, tests):
    """(name, value) of what the page begins with."""
    rows = {}
    if tests:
        accuracy = 100 * (tests.predicted == tests.targets).mean()
        rows['test accuracy'] = f'{accuracy:.2f} % of {len(tests.targets):,} {tests.kind} images'
    elif log:
        rows['test accuracy'] = f'{log[-1]["test_acc"]:.2f} % (from the log)'
    parameters = (t for key, t in checkpoint.params.items() if 'running_' not in key)
    rows['parameters'] = f'{sum(tensor.numel() for tensor in parameters):,}'
    rows['file'] = printable(str(checkpoint.path))
    if checkpoint.options:
        rows['epochs'] = f'{checkpoint.epoch} of {checkpoint.options["epochs"]}'
        rows['seed'] = checkpoint.options['seed']
    folder = Path(path).expanduser()
    starts = read_commands((folder if folder.is_dir() else folder.parent) / COMMANDS) or [{}]
    for name in ('command', 'commit', 'time', 'device', 'python', 'versions'):
        value = starts[-1].get(name)
        if isinstance(value, dict):
            value = ', '.join(f'{package} {version}' for package, version in value.items())
        if value:
            rows[name] = value
    if len(starts) > 1:
        rows['starts'] = f'{len(starts)}; these are the facts of the last one'
    return list(rows.items())


# --- the test images -------------------------------------------------------------------------


@dataclass
class Tests:
    """A network's answers for test images."""

    pixels: np.ndarray  # uint8 (N, H, W, C)
    targets: np.ndarray  # (N,)
    predicted: np.ndarray  # (N,)
    probabilities: np.ndarray  # (N,), of what is predicted
    kind: str  # 'test' or 'held-out' images
    classes: list
    preprocessing: Preprocessing
    training_images: tuple  # some of the training set: normalized (N, C, H, W), and targets


def test(checkpoint, dataroot):
    """The Tests of a checkpoint.

    Raises:
        UserError: the data set is missing or does not fit the network.
    """
    preprocessing = preprocessing_of(checkpoint, checkpoint.network['dataset'])
    data = load_data(checkpoint, checkpoint.network['dataset'], preprocessing, dataroot)
    check_classes(checkpoint, data)
    pixels, targets = sample_pixels(data.test, preprocessing)
    inputs = normalize(torch.from_numpy(pixels), preprocessing)
    logits = torch.from_numpy(compute_logits(checkpoint.module().float(), inputs))
    probabilities, predicted = logits.softmax(1).max(1)
    training_pixels, training_targets = sample_pixels(data.train, preprocessing, IMAGES)
    return Tests(
        pixels,
        targets,
        predicted.numpy(),
        probabilities.numpy(),
        images_tested(checkpoint),
        readable(list(checkpoint.classes or data.classes), len(data.classes)),
        preprocessing,
        (
            normalize(torch.from_numpy(training_pixels), preprocessing),
            torch.from_numpy(training_targets),
        ),
    )


def confusion(tests):
    counts = np.zeros((len(tests.classes),) * 2, int)
    np.add.at(counts, (tests.targets, tests.predicted), 1)
    return Section(
        'Confusion',
        f'How often a class (row) is taken for another (column), among the {tests.kind} images.',
        pictures.confusion(counts, tests.classes),
    )


def accuracies(tests):
    right = tests.predicted == tests.targets
    percents = [
        100 * right[tests.targets == k].mean() if (tests.targets == k).any() else np.nan
        for k in range(len(tests.classes))
    ]
    many = len(percents) > pictures.MOST_NAMED
    return Section(
        'Accuracy of each class',
        f'Among the {tests.kind} images{"; the worst first" if many else ""}.',
        pictures.accuracies(np.array(percents), tests.classes),
    )


def mistakes(checkpoint, tests):
    """The mistakes of which the network is surest, with their maps if it folds."""
    wrong = np.flatnonzero(tests.predicted != tests.targets)
    surest = wrong[np.argsort(-tests.probabilities[wrong], kind='stable')][:MISTAKES]
    text = f'{len(wrong):,} of {len(tests.targets):,} {tests.kind} images are classified wrongly.'
    if not len(wrong):
        return Section('Surest mistakes', text)
    text += ' These are the mistakes of which the network is surest.'
    pixels, maps = tests.pixels[surest], [None] * len(surest)
    if checkpoint.network['model'] in FOLDABLE:
        text += (
            ' Next to each is its class activation map: red speaks for the predicted class, blue '
            'against it.'
        )
        inputs = normalize(torch.from_numpy(pixels), tests.preprocessing)
        all_maps, _ = class_maps(checkpoint.fold().float(), inputs)
        maps = all_maps[range(len(surest)), tests.predicted[surest]]  # (N, h, w)
    cards = []
    for index, image, class_map in zip(surest, pixels, maps):
        predicted, true = (tests.classes[k[index]] for k in (tests.predicted, tests.targets))
        caption = f'{predicted} ({100 * tests.probabilities[index]:.1f} %), truly {true}'
        cards.append((pictures.image_uri(draw(image, class_map)), printable(caption)))
    return Section('Surest mistakes', text, cards=tuple(cards))


# --- the weights -----------------------------------------------------------------------------


def weights(checkpoint):
    """The Sections about the first filters, and about alpha and beta if the network has them."""
    stem = next(tensor for tensor in checkpoint.params.values() if tensor.ndim == 4)
    text = f'The filters of the first convolution, {" x ".join(map(str, stem.shape))}.'
    sections = [Section('First filters', text, pictures.filters(stem.float().numpy()))]
    lines = {}
    for part in ('alpha', 'beta'):
        scales = [t.float() for key, t in checkpoint.params.items() if key.endswith(f'.{part}')]
        if scales:
            layers = range(2, len(scales) + 2)
            ends = [[getattr(t, end)().item() for t in scales] for end in ('mean', 'min', 'max')]
            lines[part] = (layers, *ends)
    if lines:
        text = (
            'alpha scales the identity, beta the normalized weight: the mean over the channels '
            'of each convolution, and a band from the least to the largest.'
        )
        sections.append(
            Section('Scales of the Dirac weights', text, pictures.lines(lines, 'scale'))
        )
    return sections


def signal(checkpoint, tests):
    images, targets = tests.training_images
    rows = measure(checkpoint, images, targets)
    lines = {}
    for name, meaning in (
        ('active', 'units that ReLU does not set to zero'),
        ('neighbour', 'images whose nearest other image has their class'),
        ('identity', "energy of the weight at the identity's taps"),
    ):
        measured = [row for row in rows if name in row]
        lines[meaning] = [row['layer'] for row in measured], [row[name] for row in measured]
    return Section(
        'Signal over depth',
        f'What is left of the signal at each layer, over {len(images)} training images with the '
        'statistics of this batch. docs/signal.md explains the measurements.',
        pictures.lines(lines, 'share', (0, 1.02)),
    )

"""What a report says: facts, sections with pictures, and options."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from lab.data.names import display_name, readable
from lab.data.preprocessing import normalize
from lab.errors import UserError, printable
from lab.folded import (
    FILE_IMAGES,
    check_classes,
    images_tested,
    load_data,
    preprocessing_of,
    read_pixels,
)
from lab.models.registry import FOLDABLE
from lab.runs.folder import COMMANDS, read_commands
from lab.runs.log import parse_line
from tools.class_maps import class_maps, draw
from tools.plot import draw_curves
from tools.propagation import IMAGES, is_chain, measure
from tools.report.pictures import (
    classes_picture,
    confusion_picture,
    figure_uri,
    filters_picture,
    image_uri,
    lines_picture,
)

MISTAKES = 12  # pictures of them
BATCH = 250  # images


@dataclass
class Section:
    title: str
    text: str
    picture: str = ''  # a data URI
    cards: list = field(default_factory=list)  # (data URI, caption)
    rows: list = field(default_factory=list)  # (name, value)


@dataclass
class Content:
    title: str
    facts: list  # (name, value)
    sections: list
    options: list  # (name, value)
    missing: str = ''  # why the images could not be had


def describe(found, path, dataroot=None):
    """The Content of the report of a Checkpoint that was read from `path`. Raises UserError."""
    network = found.network
    name = display_name(network['dataset'], found.options.get('dataroot', '.'))
    content = Content(
        title=printable(f'{network["model"]}-{network["depth"]}-{network["width"]:g} on {name}'),
        facts=[],
        sections=[],
        options=[(name, _as_text(value)) for name, value in sorted(found.options.items())],
    )
    log = [parse_line(line, 'its log') for line in found.log or []]
    if log:
        content.sections.append(_curves(log))
    else:
        content.sections.append(
            Section('Training', f'{printable(str(found.path))} has no log of its training.')
        )
    tested = None
    try:
        tested = _test(found, dataroot)
    except UserError as error:
        content.missing = str(error)
        content.sections.append(
            Section('Images', f'The images cannot be read, so their pictures are missing: {error}')
        )
    if tested:
        content.sections += _test_sections(found, tested)
    content.sections += _weight_sections(found)
    if tested and is_chain(network['model']) and not found.folded:
        content.sections.append(_signal(found, tested))
    content.facts = _facts(found, path, log, tested)
    return content


def _as_text(value):
    return value if isinstance(value, str) else json.dumps(value)


# --- where it comes from ---------------------------------------------------------------------


def _facts(found, path, log, tested):
    parameters = sum(
        tensor.numel() for key, tensor in found.params.items() if '.running_' not in f'.{key}'
    )
    facts = []
    if tested:
        accuracy = 100 * (tested.predicted == tested.targets).mean()
        of = f'{len(tested.targets):,} {images_tested(found)} images'
        facts.append(('test accuracy', f'{accuracy:.2f} % of {of}'))
    elif log:
        facts.append(('test accuracy', f'{log[-1]["test_acc"]:.2f} % (from the log)'))
    facts += [('parameters', f'{parameters:,}'), ('file', printable(str(found.path)))]
    if found.options:
        epochs = f'{found.epoch} of {found.options["epochs"]}'
        facts += [('epochs', epochs), ('seed', str(found.options['seed']))]
    folder = Path(path).expanduser()
    starts = read_commands((folder if folder.is_dir() else folder.parent) / COMMANDS) or []
    for start in starts[-1:]:
        facts.append(('command', start['command']))
        for name in ('commit', 'time', 'device', 'python'):
            if start.get(name):
                facts.append((name, str(start[name])))
        versions = start.get('versions')
        if isinstance(versions, dict):
            facts.append(('versions', ', '.join(f'{n} {v}' for n, v in versions.items() if v)))
    if len(starts) > 1:
        facts.append(('starts', f'{len(starts)}; these are the facts of the last one'))
    return facts


def _curves(log):
    figure = draw_curves({'test': [log]}, stacked=True)
    return Section('Training', 'Loss and error over the epochs.', figure_uri(figure))


# --- the test images -------------------------------------------------------------------------


@dataclass
class Tested:
    """A network's answers for test images."""

    pixels: np.ndarray  # uint8 (N, H, W, C)
    targets: np.ndarray  # (N,)
    predicted: np.ndarray  # (N,)
    probabilities: np.ndarray  # (N,), of what is predicted
    classes: list
    preprocessing: object
    training_images: tuple  # the first of the training set: normalized (N, C, H, W), and targets


@torch.no_grad()
def _test(found, dataroot):
    """The Tested of a checkpoint. Of a folder of image files, FILE_IMAGES images are tested.

    Raises UserError if the data set is missing or does not fit the network.
    """
    preprocessing = preprocessing_of(found, found.network['dataset'])
    data = load_data(found, found.network['dataset'], preprocessing, dataroot)
    check_classes(found, found.network['dataset'], data)
    pixels, targets = _sample(data.test, FILE_IMAGES, preprocessing)
    module = found.module().float()
    predicted, probabilities = [], []
    for start in range(0, len(pixels), BATCH):
        images = torch.from_numpy(pixels[start : start + BATCH])
        surest = module(normalize(images, preprocessing)).softmax(1).max(1)
        predicted.append(surest.indices)
        probabilities.append(surest.values)
    first, first_targets = _sample(data.train, IMAGES, preprocessing, IMAGES)
    return Tested(
        pixels,
        targets,
        torch.cat(predicted).numpy(),
        torch.cat(probabilities).numpy(),
        readable(list(found.classes or data.classes), len(data.classes)),
        preprocessing,
        (normalize(torch.from_numpy(first), preprocessing), torch.from_numpy(first_targets)),
    )


def _sample(part, files, preprocessing, most=None):
    """Pixels and targets of a training or test set: of `files` images at most if they are files,
    of `most` if they are in memory (None: all)."""
    targets = np.asarray(part[1])
    most = most or len(targets) if torch.is_tensor(part[0]) else files
    chosen = np.linspace(0, len(targets) - 1, min(most, len(targets))).astype(int)
    pixels, chosen = read_pixels(part, chosen, preprocessing)
    return pixels, targets[chosen]


def _test_sections(found, tested):
    k, kind = len(tested.classes), images_tested(found)
    confusion = np.zeros((k, k), int)
    np.add.at(confusion, (tested.targets, tested.predicted), 1)
    counts = confusion.sum(1)
    accuracies = 100 * confusion.diagonal() / np.maximum(counts, 1)
    accuracies[counts == 0] = np.nan
    sections = [
        Section(
            'Confusion',
            f'How often a class (row) is taken for another (column), among the {kind} images.',
            confusion_picture(confusion, tested.classes),
        ),
        Section(
            'Accuracy of each class',
            f'Among the {kind} images{"; the worst first" if k > 20 else ""}.',
            classes_picture(accuracies, tested.classes),
        ),
    ]
    wrong = np.flatnonzero(tested.predicted != tested.targets)
    surest = wrong[np.argsort(-tested.probabilities[wrong], kind='stable')][:MISTAKES]
    text = f'{len(wrong):,} of {len(tested.targets):,} {kind} images are classified wrongly.'
    if len(wrong):
        text += ' These are the mistakes of which the network is surest.'
        text += _how_to_read(found)
    sections.append(Section('Surest mistakes', text, cards=_cards(found, tested, surest)))
    return sections


def _folds(found):
    return found.folded or found.network['model'] in FOLDABLE


def _how_to_read(found):
    if not _folds(found):
        return ''
    return (
        ' Next to each is its class activation map: red speaks for the predicted class, blue '
        'against it.'
    )


def _cards(found, tested, indices):
    """(picture, caption) of some test images, with their maps if the network folds."""
    if not len(indices):
        return []
    pixels = tested.pixels[indices]
    maps = [None] * len(indices)
    if _folds(found):
        images = normalize(torch.from_numpy(pixels), tested.preprocessing)
        all_maps, _ = class_maps(found.fold().float(), images)
        maps = [all_maps[i, tested.predicted[index]] for i, index in enumerate(indices)]
    cards = []
    for index, image, class_map in zip(indices, pixels, maps):
        true, predicted = (tested.classes[c[index]] for c in (tested.targets, tested.predicted))
        caption = f'{predicted} ({100 * tested.probabilities[index]:.1f} %), truly {true}'
        cards.append((image_uri(draw(image, class_map)), printable(caption)))
    return cards


# --- the weights -----------------------------------------------------------------------------


def _weight_sections(found):
    sections = []
    stem = next(tensor for tensor in found.params.values() if tensor.ndim == 4)
    sections.append(
        Section(
            'First filters',
            f'The filters of the first convolution, {" x ".join(map(str, stem.shape))}.',
            filters_picture(stem.float().numpy()),
        )
    )
    lines = {}
    for part in ('alpha', 'beta'):
        tensors = [t.float() for key, t in found.params.items() if key.endswith(f'.{part}')]
        if tensors:
            columns = [[f(t).item() for t in tensors] for f in (torch.mean, torch.min, torch.max)]
            lines[part] = (range(2, len(tensors) + 2), *columns)
    if lines:
        sections.append(
            Section(
                'Scales of the Dirac weights',
                'alpha scales the identity, beta the normalized weight: the mean over the channels '
                'of each convolution, and a band from the least to the largest.',
                lines_picture(lines, 'scale'),
            )
        )
    return sections


def _signal(found, tested):
    rows = measure(found, *tested.training_images)
    meanings = {
        'active': 'units that ReLU does not set to zero',
        'neighbour': 'images whose nearest other image has their class',
        'identity': "energy of the weight at the identity's taps",
    }
    lines = {}
    for name, meaning in meanings.items():
        layers = [row['layer'] for row in rows if name in row]
        lines[meaning] = (layers, [row[name] for row in rows if name in row], None, None)
    return Section(
        'Signal over depth',
        f'What is left of the signal at each layer, over {len(tested.training_images[0])} training '
        'images with the statistics of this batch. docs/signal.md explains the measurements.',
        lines_picture(lines, 'share', (0, 1.02)),
    )

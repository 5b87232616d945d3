"""The sections of a report: each has a title, a text, and a picture, a table, or several pictures
with captions. The browser draws the names of classes, in the scripts that its fonts have."""

import base64
import io
from typing import NamedTuple

import numpy as np
import torch

from lab.data.preprocessing import normalize
from lab.folded import sample_pixels
from lab.models.registry import why_unfoldable
from tools.class_maps import class_maps, draw, encode_png
from tools.figures import new_figure, style_of
from tools.plot import draw_curves
from tools.propagation import IMAGES, measure

MISTAKES = 12  # pictures of them
MOST_NAMED = 20  # classes; more have no room for names


class Section(NamedTuple):
    title: str
    text: str
    picture: str = ''  # a data URI
    matrix: tuple = ()  # rows: name, ((count, share of the row), ...)
    bars: tuple = ()  # (name, percent)
    cards: tuple = ()  # (data URI, class predicted, its probability in percent, true class)


def png_uri(content):
    return f'data:image/png;base64,{base64.b64encode(content).decode()}'


def figure_uri(figure):
    """A data URI of a figure of matplotlib, which is closed."""
    from matplotlib import pyplot

    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', dpi=110)
    pyplot.close(figure)
    return png_uri(buffer.getvalue())


def training(log):
    if not log:
        return Section('Training', 'The file has no log of its training.')
    figure = draw_curves([('test', [log])], stacked=True)
    figure.suptitle('')  # the page has that title
    return Section('Training', 'Loss and error over the epochs.', figure_uri(figure))


# --- test images -----------------------------------------------------------------------------


def confusion(tests):
    """The matrix of how often each class (row) is taken for each other (column)."""
    counts = np.zeros((len(tests.classes),) * 2, int)
    np.add.at(counts, (tests.targets, tests.predicted), 1)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    text = f'How often a class (row) is taken for another (column), among the {tests.kind} images.'
    if len(counts) <= MOST_NAMED:
        cells = [tuple(zip(*row)) for row in zip(counts.tolist(), shares.tolist())]
        return Section('Confusion', text, matrix=tuple(zip(tests.classes, cells)))
    figure, [[ax]] = new_figure(width=5.5, height=5.5)
    ax.grid(False)
    ax.imshow(shares, cmap='Blues', vmin=0, vmax=1)
    ax.set(xlabel='predicted', ylabel='true')
    return Section('Confusion', text, figure_uri(figure))


def accuracies(tests):
    """Bars of the accuracy of each class in percent; of the worst MOST_NAMED of many."""
    k = len(tests.classes)
    n = np.bincount(tests.targets, minlength=k)  # images of each class
    right = np.bincount(tests.targets[tests.targets == tests.predicted], minlength=k)
    percents = np.where(n > 0, 100 * right / np.maximum(n, 1), np.nan)
    order = np.argsort(percents, kind='stable')[:MOST_NAMED]
    bars = tuple((tests.classes[index], percents[index]) for index in order if n[index])
    text = f'In percent of the {tests.kind} images; the worst first.'
    return Section('Accuracy of each class', text, bars=bars)


def mistakes(checkpoint, tests):
    """The mistakes of which the network is surest, with their maps if it folds."""
    wrong = np.flatnonzero(tests.predicted != tests.targets)
    surest = wrong[np.argsort(-tests.probabilities[wrong], kind='stable')][:MISTAKES]
    text = f'{len(wrong):,} of {len(tests.targets):,} {tests.kind} images are classified wrongly.'
    if not len(wrong):
        return Section('Surest mistakes', text)
    text += ' These are the mistakes of which the network is surest.'
    pixels, predicted = tests.pixels[surest], tests.predicted[surest]
    maps = [None] * len(surest)
    if not why_unfoldable(checkpoint.network):
        text += ' Next to each is its class activation map: red speaks for the predicted class, '
        text += 'blue against it.'
        inputs = normalize(torch.from_numpy(pixels), tests.preprocessing)
        maps, _ = class_maps(checkpoint.fold().float(), inputs)
        maps = maps[range(len(maps)), predicted]  # (N, h, w)
    pictures = [png_uri(encode_png(draw(*pair))) for pair in zip(pixels, maps)]
    names = [tests.classes[label] for label in predicted]
    true_names = [tests.classes[label] for label in tests.targets[surest]]
    percents = 100 * tests.probabilities[surest]
    cards = tuple(zip(pictures, names, percents.tolist(), true_names))
    return Section('Surest mistakes', text, cards=cards)


# --- weights and signal ----------------------------------------------------------------------


def filters(params):
    """The filters of the first convolution, each between its own extremes. Those for three channels
    have colors; of other numbers of channels, the first is shown. None without convolutions."""
    weight = next((tensor for tensor in params.values() if tensor.ndim == 4), None)
    if weight is None:
        return None
    weight = weight.float().numpy()
    columns = min(16, len(weight))
    rows = -(-len(weight) // columns)
    figure, axes = new_figure(rows, columns, 7.0 / columns, 7.0 / columns)
    for ax in axes.flat:
        ax.axis('off')
    for ax, one in zip(axes.flat, weight[:, :3] if weight.shape[1] == 3 else weight[:, :1]):
        pixels = (one - one.min()) / max(np.ptp(one), 1e-12)
        ax.imshow(pixels.transpose(1, 2, 0), cmap='gray', vmin=0, vmax=1)
    text = f'The filters of the first convolution, {" x ".join(map(str, weight.shape))}.'
    return Section('First filters', text, figure_uri(figure))


def scales(params):
    """alpha and beta over depth; None for a network without them."""
    curves = {}
    for part in ('alpha', 'beta'):
        tensors = [t.float() for key, t in params.items() if key.endswith(f'.{part}')]
        if not tensors:
            return None
        ends = [[getattr(t, end)().item() for t in tensors] for end in ('mean', 'min', 'max')]
        curves[part] = (range(2, len(tensors) + 2), *ends)
    text = (
        'alpha scales the identity, beta the normalized weight: the mean over the channels of each '
        'convolution, and a band from the least to the largest.'
    )
    return Section('Scales of the Dirac weights', text, draw_layers(curves, 'scale'))


def signal(checkpoint, tests):
    """What tools.propagation measures in a chain that is not folded."""
    pixels, targets = sample_pixels(tests.data.train, tests.preprocessing, IMAGES)
    images = normalize(torch.from_numpy(pixels), tests.preprocessing)
    rows = measure(checkpoint, images, torch.from_numpy(targets))
    curves = {}
    for name, meaning in (
        ('active', 'units that the activation does not set to zero'),
        ('neighbour', 'images whose nearest other image has their class'),
        ('identity', "energy of the weight at the identity's taps"),
    ):
        measured = [row for row in rows if name in row]
        curves[meaning] = [row['layer'] for row in measured], [row[name] for row in measured]
    text = (
        f'What is left of the signal at each layer, over {len(images)} training images with the '
        'statistics of this batch. docs/signal.md explains the measurements.'
    )
    return Section('Signal over depth', text, draw_layers(curves, 'share', ylim=(0, 1.02)))


def draw_layers(curves, label, **limits):
    """A data URI of curves over the layers.

    Args:
        curves: {name: (layers, values)}, or (layers, values, low, high) with the ends of a band.
    """
    figure, [[ax]] = new_figure(width=5.0, height=3.2)
    for g, (name, (layers, values, *band)) in enumerate(curves.items()):
        style, marker, color = style_of(g)
        markers = {'marker': marker, 'markevery': max(1, len(layers) // 10), 'markersize': 4}
        ax.plot(layers, values, linestyle=style, color=color, label=name, **markers)
        if band:
            ax.fill_between(layers, *band, color=color, alpha=0.15, linewidth=0)
    ax.set(xlabel='layer', ylabel=label, **limits)
    ax.legend(fontsize=8)
    return figure_uri(figure)

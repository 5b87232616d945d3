"""The pictures of a report: figures of matplotlib and images, as data URIs for a page."""

import base64
import io

import numpy as np

from tools.class_maps import encode_png
from tools.figures import new_figure, plain, style_of

MOST_NAMED = 20  # more classes have no room for names


def png_uri(content):
    return f'data:image/png;base64,{base64.b64encode(content).decode()}'


def image_uri(pixels):
    """A data URI of an image, uint8 (H, W, 3), RGB."""
    return png_uri(encode_png(pixels))


def figure_uri(figure):
    """A data URI of a figure, which is closed."""
    from matplotlib import pyplot

    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', dpi=110)
    pyplot.close(figure)
    return png_uri(buffer.getvalue())


def confusion(counts, classes):
    """The matrix of how often each class (row) is taken for each other (column), (K, K)."""
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure, [[ax]] = new_figure(width=5.5, height=5.5)
    ax.grid(False)
    ax.imshow(shares, cmap='Blues', vmin=0, vmax=1)
    ax.set_xlabel('predicted')
    ax.set_ylabel('true')
    if len(classes) <= MOST_NAMED:
        names = [plain(name)[:16] for name in classes]
        ax.set_xticks(range(len(classes)), names, rotation=45, ha='right')
        ax.set_yticks(range(len(classes)), names)
        for row, column in np.argwhere(counts):
            color = 'white' if shares[row, column] > 0.5 else 'black'
            style = {'ha': 'center', 'va': 'center', 'color': color, 'fontsize': 8}
            ax.text(column, row, counts[row, column], **style)
    return figure_uri(figure)


def accuracies(percents, classes):
    """Bars of the accuracy of each class in percent, (K,); of the worst MOST_NAMED of many."""
    order = np.argsort(percents, kind='stable')[:MOST_NAMED][::-1]
    figure, [[ax]] = new_figure(width=5.0, height=1.0 + 0.25 * len(order))
    names = [plain(classes[index])[:24] for index in order]
    bars = ax.barh(range(len(order)), percents[order], color='#0b3d91')
    ax.set_yticks(range(len(order)), names)
    ax.bar_label(bars, fmt=' %.1f', fontsize=8)
    ax.set_xlim(0, 110)
    ax.set_xlabel('accuracy, %')
    ax.grid(False)
    return figure_uri(figure)


def filters(weight):
    """The filters of the first convolution, (out, in, h, w), each between its own extremes. Those
    for three channels have colors; of other numbers of channels, the first is shown."""
    weight = weight[:, :3] if weight.shape[1] == 3 else weight[:, :1]
    columns = min(16, len(weight))
    rows = -(-len(weight) // columns)
    figure, axes = new_figure(rows, columns, 7.0 / columns, 7.0 / columns)
    for ax in axes.flat:
        ax.axis('off')
    for ax, one in zip(axes.flat, weight):
        pixels = (one - one.min()) / max(np.ptp(one), 1e-12)
        ax.imshow(pixels.transpose(1, 2, 0), cmap='gray', vmin=0, vmax=1)
    return figure_uri(figure)


def lines(curves, label, limits=None):
    """Curves over the layers.

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
    ax.set_xlabel('layer')
    ax.set_ylabel(label)
    if limits:
        ax.set_ylim(*limits)
    ax.legend(fontsize=8)
    return figure_uri(figure)

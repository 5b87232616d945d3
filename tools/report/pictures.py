"""The pictures of a report: figures of matplotlib and images, as data URIs for a page."""

import base64
import io

import cv2
import numpy as np

from tools.figures import new_figure, plain, style_of

MOST_NAMED = 20  # more classes have no room for names


def png_uri(content):
    """A data URI of the bytes of a PNG."""
    return f'data:image/png;base64,{base64.b64encode(content).decode()}'


def image_uri(pixels):
    """A data URI of an image, uint8 (H, W, 3), RGB."""
    _, content = cv2.imencode('.png', cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
    return png_uri(content.tobytes())


def figure_uri(figure):
    """A data URI of a figure, which is closed."""
    from matplotlib import pyplot

    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', dpi=110)
    pyplot.close(figure)
    return png_uri(buffer.getvalue())


def confusion_picture(confusion, classes):
    """The matrix of how often each class (row) is taken for each other (column).

    Args:
        confusion: whole numbers (K, K).
        classes: K names.
    """
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    figure, [[ax]] = new_figure(width=5.5, height=5.5)
    ax.grid(False)
    ax.imshow(shares, cmap='Blues', vmin=0, vmax=1)
    ax.set_xlabel('predicted')
    ax.set_ylabel('true')
    if len(classes) <= MOST_NAMED:
        names = [plain(name)[:16] for name in classes]
        ax.set_xticks(range(len(classes)), names, rotation=45, ha='right')
        ax.set_yticks(range(len(classes)), names)
        for (row, column), count in np.ndenumerate(confusion):
            if count:
                color = 'white' if shares[row, column] > 0.5 else 'black'
                ax.text(column, row, count, ha='center', va='center', color=color, fontsize=8)
    return figure_uri(figure)


def classes_picture(accuracies, classes):
    """Bars of the accuracy of each class in percent; of the worst MOST_NAMED of many."""
    order = np.argsort(accuracies, kind='stable')[:MOST_NAMED][::-1]
    figure, [[ax]] = new_figure(width=5.0, height=1.0 + 0.25 * len(order))
    ax.barh(range(len(order)), accuracies[order], color='#0b3d91')
    ax.set_yticks(range(len(order)), [plain(classes[index])[:24] for index in order])
    for position, value in enumerate(accuracies[order]):
        ax.text(value, position, f' {value:.1f}', va='center', fontsize=8)
    ax.set_xlim(0, 110)
    ax.set_xlabel('accuracy, %')
    ax.grid(False)
    return figure_uri(figure)


def filters_picture(weight):
    """The filters of the first convolution, (out, in, h, w), each between its own extremes. Those
    for three channels have colors; of other numbers of channels, the first is shown."""
    weight = weight[:, :3] if weight.shape[1] == 3 else weight[:, :1]
    n, columns = len(weight), min(16, len(weight))
    rows = -(-n // columns)
    figure, axes = new_figure(rows, columns, 7.0 / columns, 7.0 / columns)
    for ax in axes.flat:
        ax.axis('off')
    for ax, filters in zip(axes.flat, weight):
        low, high = filters.min(), filters.max()
        pixels = (filters - low) / max(high - low, 1e-12)
        ax.imshow(pixels.transpose(1, 2, 0), cmap='gray', vmin=0, vmax=1)
    return figure_uri(figure)


def lines_picture(lines, label, limits=None):
    """Curves over the layers.

    Args:
        lines: {name: (layers, values, low, high)}; low and high are the ends of a band, or None.
    """
    figure, [[ax]] = new_figure(width=5.0, height=3.2)
    for g, (name, (layers, values, low, high)) in enumerate(lines.items()):
        style, marker, color = style_of(g)
        every = max(1, len(layers) // 10)
        ax.plot(
            layers,
            values,
            style,
            marker=marker,
            markevery=every,
            color=color,
            markersize=4,
            label=name,
        )
        if low is not None:
            ax.fill_between(layers, low, high, color=color, alpha=0.15, linewidth=0)
    ax.set_xlabel('layer')
    ax.set_ylabel(label)
    if limits:
        ax.set_ylim(*limits)
    ax.legend(fontsize=8)
    return figure_uri(figure)

"""The figure of a study over two options: the test errors as tables with colors."""

import textwrap

import numpy as np

from lab.data.names import percent
from tools import figures
from tools.study.table import text_of


def draw_heat_maps(study, rows, out):
    """Draw a panel for each value of the option `panels`, and save. Returns the paths.

    A panel has the values of the option `x` as columns and those of `y` as rows. A cell has the
    median test error in percent; it is empty if there is none.
    """
    x, y, panels = (study.figure[part] for part in ('x', 'y', 'panels'))
    columns, lines, titles = (distinct(rows, name) for name in (x, y, panels))
    errors = {tuple(text_of(row[name]) for name in (panels, x, y)): row['error'] for row in rows}
    highest = max([1, *(error for error in errors.values() if error is not None)])
    width, height = 0.8 * len(columns), 1.3 + 0.45 * len(lines)
    figure, [axes] = figures.new_figure(1, len(titles), width, height)
    for ax, title in zip(axes, titles):
        cells = [[errors.get((title, column, line)) for column in columns] for line in lines]
        draw_cells(ax, cells, highest)
        ax.set_title(f'{panels} {title}', fontsize=10)
        ax.set_xticks(range(len(columns)), columns, rotation=40, ha='right')
        ax.set_yticks(range(len(lines)), lines)
        ax.set_xlabel(x)
    axes[0].set_ylabel(y)
    title = textwrap.fill(f'{figures.plain(study.title)}: median {study.tested} error in %', 110)
    figure.suptitle(title, fontsize=10)
    return figures.save(figure, out)


def distinct(rows, name):
    """The values of an option as texts, in order."""
    return list(dict.fromkeys(text_of(row[name]) for row in rows))


def draw_cells(ax, cells, highest):
    """Draw numbers on a logarithmic color scale, light for small ones. `cells` has rows of numbers
    and of None."""
    from matplotlib.colors import LogNorm

    colors = np.maximum(np.array(cells, float), 0.1)  # NaN for None
    ax.imshow(colors, cmap='YlOrBr', norm=LogNorm(0.5, highest), aspect='auto')
    ax.grid(False)
    for y, row in enumerate(cells):
        for x, error in enumerate(row):
            if error is not None:
                color = 'white' if error > highest / 4 else 'black'
                ax.text(x, y, percent(error, 1), ha='center', va='center', color=color, fontsize=8)

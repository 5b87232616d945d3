"""What all figures share: line styles that differ even in black and white, axes, and saving."""

import re
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from lab.errors import UserError, printable

# Fonts with Chinese, Japanese and Korean characters, which matplotlib's own lacks. Names of classes
# and folders are drawn in the first of these that is installed.
CJK_FONTS = (
    *('Noto Sans CJK SC', 'Noto Sans CJK JP', 'Source Han Sans SC', 'WenQuanYi Micro Hei'),
    *('WenQuanYi Zen Hei', 'PingFang SC', 'Hiragino Sans GB', 'Microsoft YaHei', 'SimHei'),
    *('Arial Unicode MS', 'Droid Sans Fallback'),
)

STYLES = [  # line, marker, color
    ('-', 'o', '#0b3d91'),
    ('--', 's', '#c1440e'),
    (':', '^', '#2e7d32'),
    ('-.', 'D', '#6a1b9a'),
    ((0, (5, 1, 1, 1, 1, 1)), 'v', '#00838f'),
    ((0, (1, 3)), 'P', '#5d4037'),
    ((0, (8, 3)), 'X', '#37474f'),
]


def style_of(g):
    """Line style, marker and color of the g-th line. After seven lines the styles repeat with
    other markers."""
    style, _, color = STYLES[g % len(STYLES)]
    _, marker, _ = STYLES[(g + g // len(STYLES)) % len(STYLES)]
    return style, marker, color


def new_figure(rows=1, columns=1, width=6.0, height=4.0):
    """A figure and its axes, (rows, columns); width and height of one of them in inches."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import font_manager, pyplot

    installed = font_manager.get_font_names()
    cjk = [name for name in CJK_FONTS if name in installed]
    pyplot.rcParams['font.family'] = ['sans-serif', *cjk[:1]]
    size = (width * columns, height * rows)
    figure, axes = pyplot.subplots(rows, columns, figsize=size, layout='constrained', squeeze=False)
    for ax in axes.flat:
        ax.grid(True, color='0.9')
        ax.spines[['top', 'right']].set_visible(False)
    return figure, axes


def plain(text):
    """A text from a file as a label. Otherwise matplotlib would read formulas between two $, and
    leave labels that begin with _ out of legends."""
    text = printable(text).replace('$', r'\$')
    return f' {text}' if text.startswith('_') else text


def use_log_scale(ax):
    """Make the y axis logarithmic, with plain numbers at its ticks.

    Values of 0 leave gaps. If there are no others, the axis stays linear.
    """
    if not np.isfinite(ax.dataLim.minposy):
        return

    def minor_label(y, _):
        bottom, top = ax.get_ylim()
        # Over many decades these labels would overlap.
        fits = top < 6 * bottom or (f'{y:e}'[0] in '235' and top < 300 * bottom)
        return f'{y:.4g}' if fits else ''

    ax.set_yscale('log', nonpositive='mask')
    ax.yaxis.set_major_formatter('{x:g}')
    ax.yaxis.set_minor_formatter(minor_label)


@contextmanager
def naming_missing_glyphs():
    """While a figure is written, replace matplotlib's warnings of missing glyphs by one line."""
    missing = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings('always', 'Glyph ')
        yield
    for one in caught:
        if glyph := re.match(r'Glyph (\d+) ', str(one.message)):
            missing[chr(int(glyph[1]))] = None
        else:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    if missing:
        glyphs = printable(''.join(missing))
        print(f'no installed font has {glyphs}: the figure has squares instead', file=sys.stderr)


def save(figure, out):
    """Write a figure as PNG and as SVG, whatever the suffix of `out`. Returns both paths.

    Raises:
        UserError: a file cannot be written.
    """
    from matplotlib import pyplot

    pyplot.rcParams['svg.hashsalt'] = 'diracnets'  # identical figures give identical files
    png, svg = (Path(out).with_suffix(suffix) for suffix in ('.png', '.svg'))
    try:
        with naming_missing_glyphs():
            figure.savefig(png, dpi=150)
            figure.savefig(svg, dpi=150, metadata={'Date': None})
    except OSError as error:
        raise UserError(f'{out} cannot be written ({error.strerror})') from None
    pyplot.close(figure)
    return [str(png), str(svg)]

"""The figure of a study: test error over an option, with its spread over seeds, or over time."""

import textwrap

from tools import figures
from tools.plot import curves
from tools.study.heat_map import draw_heat_maps
from tools.study.table import text_of


def draw_study(study, rows, runs, out):
    """Draw the figure, and save. Returns its paths."""
    if study.figure['x'] in ('epoch', 'seconds'):
        return curves(logs_by_row(study, runs), out, errors_only=True, x=study.figure['x'])
    if 'panels' in study.figure:
        return draw_heat_maps(study, rows, out)
    return draw_errors(study, rows, out)


def logs_by_row(study, runs):
    """{label of a row of the table: logs of its runs}, without those that diverged."""
    groups = {}
    for one in runs:
        if not one.failed and one.log():
            label = label_of(one.options, study.table) or study.name
            groups.setdefault(label, []).append(one.log())
    return groups


def label_of(options, names):
    """The values of these options, without those that are not set."""
    values = [options.get(name) for name in names]
    return figures.plain(', '.join(text_of(value) for value in values if value not in (None, '')))


def draw_errors(study, rows, out):
    """Draw the median test error over an option, with bars from the minimum to the maximum."""
    figure, [[ax]] = figures.new_figure(height=4.6)
    x = study.figure['x']
    lines = study.figure.get('lines', [])
    lines = lines if isinstance(lines, list) else [lines]
    axis = NumericAxis(rows, x) if is_numeric(rows, x) else NamedAxis(rows, x)
    rows_by_label = {}
    for row in rows:
        if row['error'] is not None:  # not all its runs diverged
            rows_by_label.setdefault(label_of(row, lines), []).append(row)
    for g, (label, group) in enumerate(rows_by_label.items()):
        # Several lines are drawn side by side, or their bars would hide each other.
        shift = g - (len(rows_by_label) - 1) / 2
        places = [axis.place(row, shift) for row in group]
        draw_line(ax, g, label, places, group, axis.linestyle)
    axis.label(ax)
    if spans_decades(rows):
        figures.use_log_scale(ax)
    ax.set_xlabel(x)
    ax.set_ylabel('test error, % (median, min to max)')
    ax.set_title(textwrap.fill(figures.plain(study.title), 60), fontsize=9)
    if lines and rows_by_label:
        figure.legend(title=', '.join(lines), loc='outside lower center', ncols=3, fontsize=8)
    return figures.save(figure, out)


def draw_line(ax, g, label, places, rows, linestyle):
    style, marker, color = figures.style_of(g)
    ax.errorbar(
        places,
        [row['error'] for row in rows],
        yerr=[
            [row['error'] - row['least'] for row in rows],
            [row['most'] - row['error'] for row in rows],
        ],
        color=color,
        linestyle=linestyle or style,
        marker=marker,
        capsize=3,
        label=label,
    )


def spans_decades(rows):
    """Whether the errors differ enough for a logarithmic axis."""
    trained = [row for row in rows if row['error'] is not None]
    errors = [row[name] for row in trained for name in ('least', 'most')]
    return bool(errors) and min(errors) > 0 and max(errors) > 3 * min(errors)


def is_numeric(rows, name):
    return all(isinstance(row[name], (int, float)) for row in rows)


class NumericAxis:
    """A logarithmic x axis for an option whose values are numbers."""

    linestyle = None  # that of the line

    def __init__(self, rows, name):
        self.name = name
        self.ticks = sorted({row[name] for row in rows})

    def place(self, row, shift):
        return row[self.name] * 1.025**shift

    def label(self, ax):
        ticks = [tick for tick in self.ticks if self._has_room(tick)]
        ax.set_xscale('log')
        ax.set_xticks(ticks, [f'{tick:g}' for tick in ticks])
        ax.minorticks_off()

    def _has_room(self, tick):
        """Whether the next tick is more than 20 % above this one."""
        return not any(tick < other <= 1.2 * tick for other in self.ticks)


class NamedAxis:
    """An x axis for an option whose values are names: a place for each."""

    linestyle = 'none'

    def __init__(self, rows, name):
        self.name = name
        self.ticks = list(dict.fromkeys(figures.plain(str(row[name])) for row in rows))

    def place(self, row, shift):
        return self.ticks.index(figures.plain(str(row[self.name]))) + 0.12 * shift

    def label(self, ax):
        ax.set_xticks(range(len(self.ticks)), self.ticks, rotation=20)

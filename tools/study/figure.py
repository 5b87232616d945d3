"""The figure of a study: test error over an option, with its spread over seeds, or over time."""

import textwrap

from tools import figures
from tools.plot import draw_curves
from tools.study.heat_map import draw_heat_maps
from tools.study.table import text_of


def draw_study(study, rows, runs, out):
    """Draw the figure, and save. Returns its paths."""
    if study.figure['x'] in ('epoch', 'seconds'):
        figure = draw_curves(logs_by_row(study, runs), errors_only=True, x=study.figure['x'])
        return figures.save(figure, out)
    if 'panels' in study.figure:
        return draw_heat_maps(study, rows, out)
    return draw_errors(study, rows, out)


def logs_by_row(study, runs):
    """[(label, logs of its runs)] of each row of the table, without runs that diverged. Rows that
    `lines` does not distinguish have the same label."""
    lines = lines_of(study)
    groups = {}
    for one in runs:
        if not one.failed and one.log():
            label = label_of(one.all_options, lines) or label_of(one.options, study.table)
            groups.setdefault((str(one.row), label or study.name), []).append(one.log())
    return [(label, logs) for (_, label), logs in groups.items()]


def lines_of(study):
    """The names of the options that distinguish the lines of the figure."""
    lines = study.figure.get('lines', [])
    return lines if isinstance(lines, list) else [lines]


def label_of(options, names):
    """The values of these options, without those that are not set."""
    values = [options.get(name) for name in names]
    return ', '.join(text_of(value) for value in values if value not in (None, ''))


def draw_errors(study, rows, out):
    """Draw the median test error over an option, with bars from the minimum to the maximum."""
    figure, [[ax]] = figures.new_figure(height=4.6)
    x = study.figure['x']
    lines = lines_of(study)
    values = [row[x] for row in rows]
    is_numeric = all(isinstance(value, (int, float)) for value in values)
    ticks = sorted(set(values)) if is_numeric else list(dict.fromkeys(map(str, values)))
    rows_by_label = {}
    for row in rows:
        if row['error'] is not None:  # not all its runs diverged
            rows_by_label.setdefault(label_of(row, lines), []).append(row)
    for g, (label, group) in enumerate(rows_by_label.items()):
        # Several lines are drawn side by side, or their bars would hide each other.
        shift = g - (len(rows_by_label) - 1) / 2
        if is_numeric:
            places = [row[x] * 1.025**shift for row in group]
        else:
            places = [ticks.index(str(row[x])) + 0.12 * shift for row in group]
        draw_line(ax, g, label, places, group, is_numeric)
    if is_numeric:
        label_numbers(ax, ticks)
    else:
        ax.set_xticks(range(len(ticks)), map(figures.plain, ticks), rotation=20)
    if spans_decades(rows):
        figures.use_log_scale(ax)
    ax.set_xlabel(x)
    ax.set_ylabel(f'{study.tested} error, % (median, min to max)')
    ax.set_title(textwrap.fill(figures.plain(study.title), 60), fontsize=9)
    if lines:
        figure.legend(title=', '.join(lines), loc='outside lower center', ncols=3, fontsize=8)
    return figures.save(figure, out)


def draw_line(ax, g, label, places, rows, is_connected):
    style, marker, color = figures.style_of(g)
    errors = [row['error'] for row in rows]
    below = [row['error'] - row['least'] for row in rows]
    above = [row['most'] - row['error'] for row in rows]
    style = {'ls': style if is_connected else 'none', 'marker': marker, 'color': color}
    label = figures.plain(label)
    ax.errorbar(places, errors, yerr=[below, above], capsize=3, label=label, **style)


def label_numbers(ax, ticks):
    """Make the x axis logarithmic, with those ticks that the next one is not within 20 % of."""
    ticks = [tick for tick in ticks if not any(tick < other <= 1.2 * tick for other in ticks)]
    ax.set_xscale('log')
    ax.set_xticks(ticks, [f'{tick:g}' for tick in ticks])
    ax.minorticks_off()


def spans_decades(rows):
    """Whether the errors differ enough for a logarithmic axis."""
    trained = [row for row in rows if row['error'] is not None]
    least = min(row['least'] for row in trained)
    return least > 0 and max(row['most'] for row in trained) > 3 * least

"""The figure of tools.propagation."""

from lab.runs.log import test_error
from tools import figures

NEIGHBOUR = 'images whose nearest neighbour has their class'


def draw(measured, logs, out):
    """Draw a panel for each measurement, with a line for each chain, and save.

    If there are trained chains, they are in the right column, and the untrained ones in the left.

    Args:
        measured: {label of a chain: {epoch: rows}}, see tools.propagation.
        logs: {label of a chain: its log, empty without training}.

    Returns:
        The paths of the figure.
    """
    styles = {label: g for g, label in enumerate(measured)}
    before = {label: epochs[0] for label, epochs in measured.items()}
    after = {label: epochs[max(epochs)] for label, epochs in measured.items() if max(epochs) > 0}
    figure, axes = figures.new_figure(rows=4 if after else 2, columns=2, width=4.6, height=2.8)
    left, right = (axes[:, 0], axes[:, 1]) if after else (axes.flat, [])

    draw_layers(left[0], styles, before, 'active', 'share of active units')
    draw_layers(left[1], styles, before, 'neighbour', NEIGHBOUR)
    draw_layers(left[2], styles, before, 'kept', 'squared correlation with the first layer')
    draw_layers(left[3], styles, before, 'gradient', 'norm of the gradient')
    left[3].set_yscale('log')
    if after:
        left[0].set_title('Before training\n\nshare of active units', fontsize=12)
        draw_layers(right[0], styles, after, 'active', 'After training\n\nshare of active units')
        draw_layers(right[1], styles, after, 'neighbour', NEIGHBOUR)
        draw_layers(right[2], styles, after, 'identity', "identity's share of the weight")
        draw_errors(right[3], styles, logs)
    handles = left[0].get_legend_handles_labels()
    figure.legend(*handles, loc='outside upper center', ncols=2, frameon=False, fontsize=12)
    return figures.save(figure, out)


def draw_layers(ax, styles, rows_by_label, part, title):
    """Draw one measurement over the layers."""
    for label, rows in rows_by_label.items():
        some = [row for row in rows if part in row]
        draw_line(ax, styles, label, [row['layer'] for row in some], [row[part] for row in some])
    ax.set_xscale('log')
    ax.set_xlim(left=0.9)
    ax.xaxis.set_major_formatter('{x:g}')
    ax.set_title(title, fontsize=12)
    ax.set_xlabel('layer')
    if part != 'gradient':  # a share
        ax.set_ylim(-0.03, 1.03)


def draw_errors(ax, styles, logs):
    """Draw the test error of the trained chains over the epochs."""
    for label, log in logs.items():
        if log:
            errors = [test_error(line) for line in log]
            draw_line(ax, styles, label, [line['epoch'] for line in log], errors)
    figures.use_log_scale(ax)
    ax.set_title('test error, %', fontsize=12)
    ax.set_xlabel('epoch')


def draw_line(ax, styles, label, x, y):
    style, marker, color = figures.style_of(styles[label])
    ax.plot(x, y, linestyle=style, marker=marker, color=color, markevery=0.12, ms=4, label=label)

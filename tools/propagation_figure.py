"""The figure of tools.propagation."""

from tools import figures


def draw(measured, logs, out):
    """Draw two rows of panels, and save.

    The upper row has, over the layers, the scales and the identity's share of the first run at
    several epochs, and the test errors of all runs. The lower row has, for all runs, the units that
    respond before and after training, the histogram of a middle layer, and the gradients.

    Args:
        measured: {label of a run: {epoch: rows}}, see tools.propagation.
        logs: {label of a run: its log}.

    Returns:
        The paths of the figure.
    """
    figure, (upper, lower) = figures.new_figure(rows=2, columns=4, width=4.25, height=3.75)
    label, epochs = next(iter(measured.items()))
    draw_epochs(upper[0], epochs, 'alpha', f'{label}: mean |alpha|')
    draw_epochs(upper[1], epochs, 'beta', f'{label}: mean |beta|')
    draw_epochs(upper[2], epochs, 'identity', f"{label}: identity's share of the folded weight")
    upper[0].legend(fontsize=8)

    draw_runs(upper[3], error_curves(logs), 'test error, %', 'epoch')
    upper[3].set_yscale('log')
    upper[3].legend(fontsize=8)

    before = {label: epochs[min(epochs)] for label, epochs in measured.items()}
    after = {label: epochs[max(epochs)] for label, epochs in measured.items()}
    responding = 'units that respond to the input'
    draw_runs(lower[0], over_layers(before, 'responding'), f'{responding}, before training')
    draw_runs(lower[1], over_layers(after, 'responding'), f'{responding}, after training')
    for ax in lower[:2]:
        ax.set_ylim(-0.02, 1)

    middle = len(next(iter(before.values()))) // 2
    draw_runs(
        lower[2],
        histograms(before, middle),
        f'histogram of units, layer {middle}, before training',
        'correlation of a unit with and without noise in the input',
        drawstyle='steps-mid',
    )
    gradients = over_layers(before, 'gradient')
    draw_runs(lower[3], gradients, 'norm of the gradient, before training')
    lower[3].set_yscale('log')
    return figures.save(figure, out)


def draw_epochs(ax, epochs, part, title):
    """Draw one measurement of a run over the layers, a line per epoch."""
    from matplotlib import pyplot

    for e, (epoch, rows) in enumerate(epochs.items()):
        some = [row for row in rows if part in row]
        style, marker, _ = figures.style_of(e)
        ax.plot(
            [row['layer'] for row in some],
            [row[part] for row in some],
            linestyle=style,
            marker=marker,
            markevery=(e, max(1, len(some) // 6)),
            markersize=4,
            color=pyplot.cm.viridis(0.9 * e / len(epochs)),
            linewidth=1.2,
            label=f'epoch {epoch}',
        )
    ax.set_title(title, fontsize=10)
    ax.set_xlabel('layer')


def draw_runs(ax, lines, title, x_label='layer', **kwargs):
    """Draw {label of a run: (x, y)}, a line per run."""
    for g, (label, (x, y)) in enumerate(lines.items()):
        style, marker, color = figures.style_of(g)
        ax.plot(
            x,
            y,
            linestyle=style,
            marker=marker,
            color=color,
            markevery=(g * max(1, len(x) // 40), max(1, len(x) // 7)),
            markersize=4,
            label=label,
            **kwargs,
        )
    ax.set_title(title, fontsize=10)
    ax.set_xlabel(x_label)


def error_curves(logs):
    """{label: (epochs, test errors)}."""
    return {
        label: ([line['epoch'] for line in log], [100 - line['test_acc'] for line in log])
        for label, log in logs.items()
    }


def over_layers(rows_by_label, part):
    """{label: (layers, one of the measurements)}."""
    return {
        label: ([row['layer'] for row in rows], [row[part] for row in rows])
        for label, rows in rows_by_label.items()
    }


def histograms(rows_by_label, layer):
    """{label: (centers of the bins, share of the units in each)}."""
    found = {}
    for label, rows in rows_by_label.items():
        shares = rows[layer]['correlation']
        centers = [-1 + (b + 0.5) * 2 / len(shares) for b in range(len(shares))]
        found[label] = centers, shares
    return found

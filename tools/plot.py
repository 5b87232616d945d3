"""Draw the training curves of runs, or the graph of a network, readable in black and white.

    python -m tools.plot logs/RUN... --out curves.png           # loss and error, a line per run
    python -m tools.plot logs/RUN... --out curves.png --median  # a line per group of seeds
    python -m tools.plot logs/RUN --graph --out graph.png       # the network of a checkpoint

Each command writes a PNG and an SVG. A run is a folder with a log.txt, or a log.txt itself; logs of
the original code work too. With --median, runs that differ only in their seed are drawn as their
median and a band from the minimum to the maximum.
"""

import json
from itertools import accumulate
from pathlib import Path
from statistics import median

from lab.data.names import display_name
from lab.errors import OneLineParser, OptionError, printable, run
from lab.files import path_argument
from lab.runs.log import read_log, seconds, test_error, test_loss
from tools import figures

# What a panel shows over the epochs: its label, and functions of a line of the log, for the test
# and for the training.
LOSSES = ('loss (thin: training)', test_loss, lambda line: line['train_loss'])
ERRORS = ('error, % (thin: training)', test_error, lambda line: 100 - line['train_acc'])
TEST_ERRORS = ('error, % (test)', test_error, None)


def draw_curves(groups, errors_only=False, stacked=False, x='epoch'):
    """A figure of loss and error over the epochs or the seconds.

    Args:
        groups: pairs (label, logs of some runs). Their median is drawn, and a band from the minimum
            to the maximum. Groups with the same label have the same style.
        errors_only: draw only the test error.
        stacked: one panel below the other, for phones.
        x: 'epoch', or 'seconds' (of training and tests together, the median over the runs).
    """
    panels = [TEST_ERRORS] if errors_only else [LOSSES, ERRORS]
    n = len(panels)
    labels = list(dict.fromkeys(label for label, _ in groups))
    figure, axes = figures.new_figure(n, 1, 5.0, 3.2) if stacked else figures.new_figure(1, n)
    for ax, panel in zip(axes.flat, panels):
        for label, logs in groups:
            draw_group(ax, labels.index(label), label, logs, panel, x)
        ax.set_xlabel(x)
        ax.set_ylabel(panel[0])
        figures.use_log_scale(ax)
        ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    figure.suptitle(title([log for _, logs in groups for log in logs]), fontsize=10)
    add_legend_below(figure, axes)
    return figure


def title(logs):
    """What all logs have in common: the network and the data set."""
    networks, datasets = set(), set()
    for line, *_ in logs:
        if {'model', 'depth', 'width', 'dataset'} <= line.keys():  # not in all original logs
            networks.add(f'{line["model"]}-{line["depth"]}-{line["width"]:g}')
            datasets.add(display_name(line['dataset'], line.get('dataroot', '.')))
    network = networks.pop() if len(networks) == 1 else f'{len(networks)} networks'
    return figures.plain(f'{network} on {" and ".join(sorted(datasets))}' if datasets else network)


def draw_group(ax, g, label, logs, panel, x):
    """Draw the g-th group of runs: its test curve with a band, and its training curve."""
    style, marker, color = figures.style_of(g)
    _, test, train = panel
    values = by_epoch(logs, test)
    places = [median(v) for v in seconds_by_epoch(logs).values()] if x == 'seconds' else [*values]
    every = max(1, len(values) // 8)
    markers = {'color': color, 'marker': marker, 'markevery': (g % every, every)}
    medians = [median(v) for v in values.values()]
    label = figures.plain(label)
    ax.plot(places, medians, ls=style, lw=1.6, ms=4, label=label, **markers)
    if len(logs) > 1:
        low, high = ([end(v) for v in values.values()] for end in (min, max))
        ax.fill_between(places, low, high, color=color, alpha=0.15, linewidth=0)
    if train:
        medians = [median(v) for v in by_epoch(logs, train).values()]
        ax.plot(places, medians, ls=':', lw=1, ms=2.5, **markers)


def by_epoch(logs, measure):
    """{epoch: what `measure` returns for its line in each of the logs}, in the order of epochs."""
    values = {}
    for log in logs:
        for epoch, line in {line['epoch']: line for line in log}.items():
            values.setdefault(epoch, []).append(measure(line))
    return dict(sorted(values.items()))


def seconds_by_epoch(logs):
    """{epoch: the seconds of training and tests in each of the logs, from its beginning}."""
    totals = []
    for log in logs:
        lines = {line['epoch']: line for line in log}
        sums = accumulate(map(seconds, lines.values()))
        totals.append([{'epoch': epoch, 'total': total} for epoch, total in zip(lines, sums)])
    return by_epoch(totals, lambda line: line['total'])


def add_legend_below(figure, axes):
    """Add the legend of the first panel under a figure, and make room for it."""
    handles, labels = axes.flat[0].get_legend_handles_labels()
    labels, handles = zip(*dict(zip(labels, handles)).items())  # each label once
    columns = max(1, min(3, 80 * axes.shape[1] // (8 + max(map(len, labels)))))
    rows = -(-len(labels) // columns)
    figure.set_figheight(figure.get_figheight() + 0.16 * rows)
    figure.legend(handles, labels, loc='outside lower center', fontsize=8, ncols=columns)


def group_by_options(logs):
    """Group runs that differ only in their seed.

    Args:
        logs: {path of a run: its log}.

    Returns:
        {label: [log, ...]}; a label has the options in which the groups differ, or the name of the
        first run if there is one group, and the number of runs.
    """
    options = [options_of(log) for log in logs.values()]
    differing = differing_options(options)
    groups = {}
    for log, own in zip(logs.values(), options):
        label = ', '.join(f'{name} {own[name]}' for name in differing if name in own)
        groups.setdefault(label, []).append(log)
    first = Path(next(iter(logs))).name
    return {f'{label or first} (n = {len(group)})': group for label, group in groups.items()}


def options_of(log):
    """The options of a run that may change its numbers, except the seed."""
    from lab.training.options import CHANGEABLE_ON_RESUME  # imports torch

    measured = {'epoch', 'n_parameters', 'n_multiplications', 'broken_images'}
    ignored = {'seed', *measured, *CHANGEABLE_ON_RESUME} - {'epochs'}
    return {
        name: value
        for name, value in log[-1].items()
        if name not in ignored and not name.startswith(('train_', 'test_'))
    }


def differing_options(dicts):
    """The keys for which these dicts have more than one value."""
    names = dict.fromkeys(name for options in dicts for name in options)
    values = {name: {json.dumps(d[name]) for d in dicts if name in d} for name in names}
    return [name for name in names if len(values[name]) > 1]


def draw_checkpoint(path, out):
    """Draw the network of a checkpoint. Returns the paths of the figure."""
    import torch

    from lab.runs.checkpoint import load
    from tools.network_graph import draw_graph

    checkpoint = load(path)
    usual = {'image_size': 224 if checkpoint.network['form'] == 'imagenet' else 32}
    size = (checkpoint.preprocessing or usual)['image_size']
    images = torch.zeros(2, checkpoint.network['in_channels'], size, size)
    return draw_graph(checkpoint.module(), images, out)


def main(arguments=None):
    parser = OneLineParser(prog='-m tools.plot', description=__doc__)
    parser.add_argument('runs', nargs='+', metavar='RUN', type=path_argument)
    parser.add_argument('--out', type=path_argument, required=True, help='where PNG and SVG go')
    parser.add_argument('--median', action='store_true', help='one line for all seeds')
    parser.add_argument('--graph', action='store_true', help="draw the checkpoint's network")
    args = parser.parse_args(arguments)
    out = Path(args.out)
    if not out.name or out.suffix not in ('', '.png', '.svg'):
        raise OptionError(f'--out {args.out} must end in .png or .svg; both are written')
    if args.graph and (args.median or len(args.runs) > 1):
        raise OptionError('--graph draws the network of one run; --median does not apply')
    if args.graph:
        files = draw_checkpoint(args.runs[0], args.out)
    else:
        logs = {path: read_log(path) for path in args.runs}
        by_path = {path: [log] for path, log in logs.items()}
        groups = group_by_options(logs) if args.median else by_path
        files = figures.save(draw_curves(groups.items()), args.out)
    print(*(printable(str(file)) for file in files))


if __name__ == '__main__':
    run(main, 'tools.plot')

"""Draw the training curves of runs, or the graph of a network. Readable in black and white.

    python -m tools.plot logs/RUN... --out curves.png             # and curves.svg: loss and error over epochs, each run a line
    python -m tools.plot logs/RUN... --out curves.png --median    # runs that differ in their seed alone as median, and band of least to most
    python -m tools.plot logs/RUN --graph --out graph.png         # the network of a checkpoint, as a graph

A run is a folder with a log.txt, or such a file, also of the original code.
"""

import json
import textwrap
from pathlib import Path
from statistics import median

from lab.errors import OneLineParser, OptionError, UserError, run

STYLES = [
    ('-', 'o', '#0b3d91'),
    ('--', 's', '#c1440e'),
    (':', '^', '#2e7d32'),
    ('-.', 'D', '#6a1b9a'),
    ((0, (5, 1, 1, 1, 1, 1)), 'v', '#00838f'),
    ((0, (1, 3)), 'P', '#5d4037'),
    ((0, (8, 3)), 'X', '#37474f'),
]
NOT_TOLD_APART = {
    'seed',
    'save',
    'resume',
    'ngpu',
    'checkpoint_minutes',
    'nthread',
    'dataroot',
    'imagenetpath',
    'device',
    'cuda',
    'gpu_id',
}


def style_of(g):
    """Line style, marker and color of the g-th line; behind the seventh the styles come again with other markers."""
    style, _, color = STYLES[g % len(STYLES)]
    return style, STYLES[(g + g // len(STYLES)) % len(STYLES)][1], color


def logarithmic(ax):
    """A logarithmic y axis whose ticks are plain numbers."""
    ax.set_yscale('log')
    ax.yaxis.set_major_formatter('{x:g}')
    # Over many decades these would hide each other.
    ax.yaxis.set_minor_formatter(
        lambda y, _: (
            f'{y:g}' if f'{y:e}'[0] in '235' and ax.get_ylim()[1] < 300 * ax.get_ylim()[0] else ''
        )
    )


def read_log(path):
    """The lines of a run's log, as dicts; of other lines there (the original prints some) nothing is read. Raises UserError."""
    path = Path(path)
    path = path / 'log.txt' if path.is_dir() else path
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f'{path} can not be read ({getattr(error, "strerror", None) or "no text"})'
        ) from None
    lines = []
    for line in text.splitlines():
        if line.startswith('json_stats: '):
            try:
                stats = json.loads(line.removeprefix('json_stats: '))
            except ValueError:  # cut off
                continue
            lines.append(
                {
                    **stats,
                    **{
                        key: first(stats[key])
                        for key in ('train_loss', 'test_loss', 'train_acc', 'test_acc')
                        if key in stats
                    },
                }
            )
    if not lines or 'test_acc' not in lines[0]:
        raise UserError(f'{path} is no log of train.py: it has no line json_stats with test_acc')
    return lines


def first(value):
    """Some logs hold lists: top-1 and top-5."""
    return value[0] if isinstance(value, list) else value


def new_figure(columns=1, width=6.0, height=4.0):
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, columns, figsize=(width * columns, height), layout='constrained', squeeze=False
    )
    for ax in axes[0]:
        ax.grid(True, color='0.9')
        ax.spines[['top', 'right']].set_visible(False)
    return figure, axes[0]


def save(figure, out):
    """As PNG and as SVG, whatever the suffix."""
    from matplotlib import pyplot

    pyplot.rcParams['svg.hashsalt'] = 'diracnets'  # ids in the SVG: the same for the same picture
    out = Path(out)
    try:
        for suffix in ('.png', '.svg'):
            figure.savefig(
                out.with_suffix(suffix),
                dpi=150,
                **({'metadata': {'Date': None}} if suffix == '.svg' else {}),
            )
    except OSError as error:
        raise UserError(f'{out} can not be written ({error.strerror})') from None
    pyplot.close(figure)
    return [str(out.with_suffix(suffix)) for suffix in ('.png', '.svg')]


def curves(groups, out, errors_only=False):
    """Loss and error over epochs. `groups` maps a label to logs, of which the median is drawn, and a band from least to most."""
    figure, axes = new_figure(1 if errors_only else 2)
    quantities = [
        (lambda line: 100 - line['test_acc'], '-'),
        (lambda line: 100 - line['train_acc'], ':'),
    ]
    losses = [(lambda line: line['test_loss'], '-'), (lambda line: line['train_loss'], ':')]
    for ax, pair in zip(axes, [quantities[:1]] if errors_only else [losses, quantities]):
        for g, (label, logs) in enumerate(groups.items()):
            style, marker, color = style_of(g)
            n = max(map(len, logs))
            for value, kind in pair:
                if value(logs[0][0]) is None:
                    continue
                values = [[value(log[i]) for log in logs if i < len(log)] for i in range(n)]
                epochs = [line['epoch'] for line in max(logs, key=len)]
                first_of_pair = kind == '-'
                ax.plot(
                    epochs,
                    [median(v) for v in values],
                    color=color,
                    linestyle=style if first_of_pair else ':',
                    linewidth=1.6 if first_of_pair else 1,
                    marker=marker,
                    markevery=(g % n, max(1, n // 8)),
                    markersize=4 if first_of_pair else 2.5,
                    label=label if first_of_pair else None,
                )
                if len(logs) > 1 and first_of_pair:
                    ax.fill_between(
                        epochs,
                        [min(v) for v in values],
                        [max(v) for v in values],
                        color=color,
                        alpha=0.15,
                        linewidth=0,
                    )
        ax.set_xlabel('epoch')
        ax.set_ylabel(
            ('loss' if pair is losses else 'error, %')
            + (' (thin: training)' if not errors_only else ' (test)')
        )
        logarithmic(ax)
        ax.xaxis.get_major_locator().set_params(integer=True)
    handles = dict(zip(*reversed(axes[0].get_legend_handles_labels())))
    columns = max(1, min(3, 80 * len(axes) // (8 + max(map(len, handles)))))
    figure.set_figheight(figure.get_figheight() + 0.16 * -(-len(handles) // columns))
    figure.legend(handles.values(), handles, loc='outside lower center', fontsize=8, ncols=columns)
    return save(figure, out)


def draw_study(study, rows, runs, out):
    """The figure that a study asks for: error against an option, with the spread over seeds, or curves."""
    facts = study['figure']
    if facts['x'] == 'epoch':
        groups = {}
        for one in runs:
            if not one.failed and one.log():
                groups.setdefault(
                    ', '.join(str(one.options.get(name, '')) for name in study['table']), []
                ).append(one.log())
        return curves(groups, out, errors_only=True)
    figure, [ax] = new_figure()
    lines = facts.get('lines', [])
    lines = lines if isinstance(lines, list) else [lines]
    numeric = all(isinstance(row[facts['x']], (int, float)) for row in rows)
    ticks = (
        sorted({row[facts['x']] for row in rows})
        if numeric
        else list(dict.fromkeys(str(row[facts['x']]) for row in rows))
    )
    labels = list(dict.fromkeys(', '.join(str(row[name]) for name in lines) for row in rows))
    for g, label in enumerate(labels):
        style, marker, color = style_of(g)
        mine = [
            row
            for row in rows
            if ', '.join(str(row[name]) for name in lines) == label and row['error'] is not None
        ]
        beside = g - (len(labels) - 1) / 2  # else the spreads of several lines hide each other
        x = [
            row[facts['x']] * 1.04**beside
            if numeric
            else ticks.index(str(row[facts['x']])) + 0.12 * beside
            for row in mine
        ]
        spread = [
            [row['error'] - row['least'] for row in mine],
            [row['most'] - row['error'] for row in mine],
        ]
        ax.errorbar(
            x,
            [row['error'] for row in mine],
            yerr=spread,
            color=color,
            linestyle=style if numeric else 'none',
            marker=marker,
            capsize=3,
            label=label,
        )
    if numeric:
        apart = [
            tick for tick in ticks if all(tick >= other or other > 1.2 * tick for other in ticks)
        ]
        ax.set_xscale('log')
        ax.set_xticks(apart, [f'{tick:g}' for tick in apart])
        ax.minorticks_off()
    else:
        ax.set_xticks(range(len(ticks)), ticks, rotation=20)
    errors = [row[name] for row in rows for name in ('least', 'most') if row['error'] is not None]
    if errors and min(errors) > 0 and max(errors) > 3 * min(errors):  # less needs no logarithm
        logarithmic(ax)
    ax.set_xlabel(facts['x'])
    ax.set_ylabel('test error, % (median, least to most)')
    ax.set_title(textwrap.fill(study['title'], 60), fontsize=9)
    if lines:
        figure.legend(title=', '.join(lines), loc='outside right upper')
    return save(figure, out)


def draw_graph(module, inputs, out):
    """The operations that a module does on its inputs, from top to bottom, with the shape of what they give, (C, H, W); what skips over others
    goes around them. What is done to weights alone is left out."""
    import torch
    from matplotlib.patches import Rectangle

    graph = torch.export.export(module, (inputs,)).graph
    nodes = []
    for node in graph.nodes:  # in the order of the computation
        if (
            node.op == 'placeholder'
            and isinstance(node.meta.get('val'), torch.Tensor)
            and node.meta['val'].shape == inputs.shape
            or any(source in nodes for source in node.all_input_nodes)
        ):
            nodes.append(node)
    place, half = {node: i for i, node in enumerate(nodes)}, 0.65  # half of a box's width
    figure, [ax] = new_figure(width=4, height=0.28 * len(nodes) + 0.5)
    for node, i in place.items():
        name = (
            {'placeholder': 'images', 'output': 'logits'}.get(node.op)
            or getattr(node.target, '_opname', None)
            or getattr(node.target, '__name__', str(node.target)).split('.')[0]
        )
        shape = getattr(node.meta.get('val'), 'shape', ())
        ax.text(
            0,
            -i,
            f'{name.strip("_")}   {" x ".join(map(str, shape[1:]))}',
            ha='center',
            va='center',
            fontsize=7,
        )
        ax.add_patch(
            Rectangle(
                (-half, -i - 0.3), 2 * half, 0.6, facecolor='white', edgecolor='0.3', linewidth=0.8
            )
        )
        for source in node.all_input_nodes:
            if source not in place:
                continue
            above, apart = place[source], i - place[source]
            arrow = {'arrowstyle': '->', 'linewidth': 0.7, 'shrinkA': 0, 'shrinkB': 0}
            if apart == 1:
                ax.annotate('', (0, -i + 0.3), (0, -above - 0.3), arrowprops=arrow)
            else:
                reach = half + 0.15 + 0.05 * min(apart, 12) + 0.02 * (above % 3)
                ax.plot([half, reach, reach], [-above, -above, -i], color='0.2', linewidth=0.7)
                ax.annotate('', (half, -i), (reach, -i), arrowprops=arrow)
    figure.set_layout_engine('none')  # its margins are the boxes' own
    ax.set_position([0, 0, 1, 1])
    ax.set_xlim(-0.9, 1.7)
    ax.set_ylim(-len(nodes), 1)
    ax.axis('off')
    return save(figure, out)


def main(arguments=None):
    parser = OneLineParser(prog='-m tools.plot', description=__doc__)
    parser.add_argument('runs', nargs='+', metavar='RUN')
    parser.add_argument(
        '--out', required=True, help='file of the picture; a PNG and an SVG are written'
    )
    parser.add_argument(
        '--median',
        action='store_true',
        help='median and band of the runs that differ in their seed alone',
    )
    parser.add_argument(
        '--graph', action='store_true', help="draw the network of a run's checkpoint instead"
    )
    args = parser.parse_args(arguments)
    if Path(args.out).suffix not in ('', '.png', '.svg'):
        raise OptionError(f'--out {args.out} must end in .png or .svg; both are written')
    if args.graph and (args.median or len(args.runs) > 1):
        raise OptionError('--graph draws the network of one run, without --median')
    if args.graph:
        import torch

        from lab.runs import checkpoint

        found = checkpoint.load(args.runs[0])
        module = found.module()
        size = (found.preprocessing or {}).get('image_size') or (
            224 if (found.network or {}).get('dataset') in ('ImageNet', 'folder') else 32
        )
        return print(
            *draw_graph(module, torch.zeros(2, found.network['in_channels'], size, size), args.out)
        )
    logs = {path: read_log(path) for path in args.runs}
    options = {
        path: {
            key: value
            for key, value in lines[-1].items()
            if key not in NOT_TOLD_APART
            and not key.startswith(('train_', 'test_'))
            and key not in ('epoch', 'n_parameters', 'broken_images')
        }
        for path, lines in logs.items()
    }
    differing = [
        key
        for key in dict.fromkeys(key for one in options.values() for key in one)
        if len({json.dumps(one[key]) for one in options.values() if key in one}) > 1
    ]
    groups = {}
    for path, lines in logs.items():
        label = (
            ', '.join(f'{key} {options[path][key]}' for key in differing if key in options[path])
            if args.median
            else path
        )
        groups.setdefault(label or Path(path).name, []).append(lines)
    print(*curves(groups, args.out))


if __name__ == '__main__':
    run(main, 'tools.plot')

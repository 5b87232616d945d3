"""The graph of a network: its operations from top to bottom."""

import torch

from tools.figures import new_figure, save

HALF_WIDTH, HALF_HEIGHT = 0.8, 0.3  # of a box; the next one is 1 below
NAMES = {'placeholder': 'images', 'output': 'logits'}


def draw_graph(module, inputs, out):
    """Draw what a module does to its inputs, and save.

    A box has the name of an operation and the shape of its result, (C, H, W); that of a convolution
    also has the shape of its weight, and says if this is a Dirac weight. An arrow that skips boxes
    goes around them. Operations on weights alone are left out.

    Args:
        inputs: (N, C, H, W); N must be at least 2.

    Returns:
        The paths of the figure.
    """
    exported = torch.export.export(module, (inputs,))
    rows = {}  # of the operations that depend on the inputs, in the order of the computation
    for node in exported.graph.nodes:
        is_input = node.name in exported.graph_signature.user_inputs
        if is_input or any(source in rows for source in node.all_input_nodes):
            rows[node] = len(rows)
    arrows = [
        (rows[source], row)
        for node, row in rows.items()
        for source in node.all_input_nodes
        if source in rows
    ]
    skips = any(row - above > 1 for above, row in arrows)
    left, right = -HALF_WIDTH - 0.05, HALF_WIDTH + (0.6 if skips else 0.05)
    figure, [[ax]] = new_figure(width=2.4 * (right - left), height=0.28 * len(rows) + 0.5)
    for node, row in rows.items():
        _draw_box(ax, row, _label(node))
    for above, row in arrows:
        _draw_arrow(ax, above, row)
    figure.set_layout_engine('none')  # the axes fill the figure
    ax.set_position([0, 0, 1, 1])
    ax.set_xlim(left, right)
    ax.set_ylim(-len(rows) + 0.5, 0.5)
    ax.axis('off')
    return save(figure, out)


def _label(node):
    name = NAMES.get(node.op) or getattr(node.target, '_opname', node.name).strip('_')
    if name.startswith('conv'):
        weight = node.args[1]
        # A stored weight is an input of the graph; a Dirac weight is computed.
        name = f'{"" if weight.op == "placeholder" else "Dirac "}{name} {_size(weight)}'
    return f'{name}   {_size(node, 1)}'


def _size(node, first=0):
    shape = getattr(node.meta.get('val'), 'shape', ())
    return ' x '.join(map(str, shape[first:]))


def _draw_box(ax, row, label):
    from matplotlib.patches import Rectangle

    corner, width, height = (-HALF_WIDTH, -row - HALF_HEIGHT), 2 * HALF_WIDTH, 2 * HALF_HEIGHT
    ax.add_patch(Rectangle(corner, width, height, facecolor='white', edgecolor='0.3', lw=0.8))
    ax.text(0, -row, label, ha='center', va='center', fontsize=7)


def _draw_arrow(ax, above, row):
    if row - above == 1:
        start, end, bend = (0, -above - HALF_HEIGHT), (0, -row + HALF_HEIGHT), 0
    else:  # to the right of the boxes, in a bow of nearly the same width for all distances
        start, end, bend = (HALF_WIDTH, -above), (HALF_WIDTH, -row), -5 / (row - above)
    style = {'arrowstyle': '->', 'connectionstyle': f'arc3,rad={bend}', 'lw': 0.7}
    ax.annotate('', end, start, arrowprops={**style, 'shrinkA': 0, 'shrinkB': 0})

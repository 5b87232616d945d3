"""The graph of a network: its operations from top to bottom."""

from tools.figures import new_figure, save

HALF_WIDTH, HALF_HEIGHT = 0.8, 0.3  # of a box; the next one is 1 below


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
    import torch

    graph = torch.export.export(module, (inputs,)).graph
    nodes = _nodes_after_inputs(graph, inputs)
    rows = {node: i for i, node in enumerate(nodes)}
    steps = [
        row - rows[source]
        for node, row in rows.items()
        for source in node.all_input_nodes
        if source in rows
    ]
    right = 1.7 if max(steps) > 1 else HALF_WIDTH + 0.05  # room for arrows that skip boxes
    left = -HALF_WIDTH - 0.05
    figure, [[ax]] = new_figure(width=2.4 * (right - left), height=0.28 * len(nodes) + 0.5)
    for node, row in rows.items():
        _draw_box(ax, row, _label(node))
        for source in node.all_input_nodes:
            if source in rows:
                _draw_arrow(ax, rows[source], row)
    figure.set_layout_engine('none')  # the axes fill the figure
    ax.set_position([0, 0, 1, 1])
    ax.set_xlim(left, right)
    ax.set_ylim(-len(nodes) + 0.5, 0.5)
    ax.axis('off')
    return save(figure, out)


def _nodes_after_inputs(graph, inputs):
    """The nodes that depend on the inputs, in the order of the computation."""
    import torch

    nodes = []
    for node in graph.nodes:
        value = node.meta.get('val')
        is_tensor = node.op == 'placeholder' and isinstance(value, torch.Tensor)
        is_input = is_tensor and value.shape == inputs.shape
        if is_input or any(source in nodes for source in node.all_input_nodes):
            nodes.append(node)
    return nodes


def _label(node):
    names = {'placeholder': 'images', 'output': 'logits'}
    if node.op in names:
        name = names[node.op]
    elif hasattr(node.target, '_opname'):
        name = node.target._opname
    else:
        name = getattr(node.target, '__name__', str(node.target)).split('.')[0]
    name = name.strip('_')
    if name.startswith('conv'):
        weight = node.args[1]
        # A stored weight is an input of the graph; a Dirac weight is computed.
        kind = name if weight.op == 'placeholder' else f'Dirac {name}'
        name = f'{kind} {_size(weight)}'
    return f'{name}   {_size(node, 1)}'


def _size(node, first=0):
    shape = getattr(node.meta.get('val'), 'shape', ())
    return ' x '.join(map(str, shape[first:]))


def _draw_box(ax, row, label):
    from matplotlib.patches import Rectangle

    ax.text(0, -row, label, ha='center', va='center', fontsize=7)
    corner, width, height = (-HALF_WIDTH, -row - HALF_HEIGHT), 2 * HALF_WIDTH, 2 * HALF_HEIGHT
    ax.add_patch(
        Rectangle(corner, width, height, facecolor='white', edgecolor='0.3', linewidth=0.8)
    )


def _draw_arrow(ax, above, row):
    arrow = {'arrowstyle': '->', 'linewidth': 0.7, 'shrinkA': 0, 'shrinkB': 0}
    distance = row - above
    if distance == 1:
        ax.annotate('', (0, -row + HALF_HEIGHT), (0, -above - HALF_HEIGHT), arrowprops=arrow)
        return
    # To the right of the boxes, at a distance that separates most arrows.
    x = HALF_WIDTH + 0.15 + 0.05 * min(distance, 12) + 0.02 * (above % 3)
    ax.plot([HALF_WIDTH, x, x], [-above, -above, -row], color='0.2', linewidth=0.7)
    ax.annotate('', (HALF_WIDTH, -row), (x, -row), arrowprops=arrow)

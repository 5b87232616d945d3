"""How far a signal travels through chains of convolutions, before and after training.

    python -m tools.study studies/signal.yaml             # trains four chains, and draws the figure
    python -m tools.propagation RUN... --out signal.png   # the figure of any runs of chains
    python -m tools.propagation --untrained '--dataset digits --depth 1000' \\
        --untrained '--dataset digits --depth 1000 --bn_init shifted' --out signal.png

All write PNG, SVG and CSV. A run is measured before its training, at its kept checkpoints
(epoch1.pt7, ...) and at its newest one. docs/signal.md explains the measurements. For each
convolution of the chain and the batch norm after it, the CSV has

    alpha, beta   means of the absolute scales of the convolution
    identity      share of the energy (sum of squares) of the folded weight at the identity's taps
    active        share of the outputs of the batch norm that the activation does not set to zero;
                  NCReLU keeps all
    neighbour     share of the images whose nearest other image, by the Euclidean distance of the
                  activations of this layer, has their class
    kept          how much of the first layer the identity has carried here: the squared correlation
                  of a channel with the same channel of the first layer, after ReLU, over images and
                  positions; the mean over the channels of the first layer. Max-pooling brings the
                  first layer to this layer's size.
    gradient      norm of the gradient of the loss at the output of the batch norm

Layers count from 1. In chains of more than 100 layers some of them are measured. The batch is the
first 256 training images of the first epoch. Batch norm uses its statistics.
"""

import csv
import io
import shlex
from dataclasses import dataclass, field
from itertools import compress, count
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from diracnet import relu
from diracparams import check
from lab.data import datasets
from lab.errors import OneLineParser, OptionError, UserError, printable, run
from lab.files import path_argument, write_output
from lab.models import registry
from lab.models.diracnet_v1 import ncrelu, tiled_delta
from lab.models.registry import CHAINS, SCALES, VERSION_1
from lab.runs.checkpoint import Checkpoint, load
from lab.runs.log import read_log
from lab.training.network import network_arguments
from lab.training.options import check_combination, complete, parse
from tools.propagation_figure import draw

MODELS = CHAINS + VERSION_1  # which chains can be measured
IMAGES = 256
ALL_LAYERS = 100  # of longer chains, some are measured
COLUMNS = (
    *('run', 'epoch', 'layer', 'name'),
    *('alpha', 'beta', 'identity', 'active', 'neighbour', 'kept', 'gradient'),
)
# Options that a label has if they differ.
DISTINGUISHING = ('width', 'init', 'widen_early', *SCALES, 'seed')


# --- what is measured ------------------------------------------------------------------------


@dataclass
class Chain:
    """A chain before, during and after its training."""

    options: dict
    checkpoints: dict  # Checkpoint by epoch; that of epoch 0 is untrained
    log: list = field(default_factory=list)


def read_run(folder):
    """The Chain of a run. Raises UserError."""
    newest = load(folder)
    reason = why_unmeasurable(newest.network) if newest.is_run else 'it is no run'
    if reason:
        raise UserError(f'{folder} cannot be measured: {reason}')
    kept = [load(path) for path in Path(folder).glob('epoch*.pt7')]
    checkpoints = [untrained(newest.options, newest.network), *kept, newest]
    by_epoch = {checkpoint.epoch: checkpoint for checkpoint in checkpoints}
    return Chain(newest.options, dict(sorted(by_epoch.items())), read_log(folder))


def why_unmeasurable(network):
    """Why the network with these arguments of `registry.define` cannot be measured; '' if it can.

    Only what folds has the activations that are measured.
    """
    if network['model'] not in MODELS:
        return f'it is none of {", ".join(MODELS)}'
    return registry.why_unfoldable(network)


def define_untrained(text, dataroot=None):
    """The Chain that options of train.py define. Raises OptionError."""
    try:
        options = complete(parse(shlex.split(text)))
        check_combination(options)
        network = network_arguments(options, load_data(options, dataroot))
        reason = why_unmeasurable(network)
        check(not reason, reason)
        return Chain(options, {0: untrained(options, network)})
    except ValueError as error:  # an open quote, an impossible depth
        raise OptionError(f'--untrained {text} cannot be used: {error}') from None


def load_data(options, dataroot):
    """The Data of a run's data set, in `dataroot` if it is given."""
    form, image_size = options.get('form'), options.get('image_size')
    root = dataroot or options['dataroot']
    return datasets.load(options['dataset'], root, form=form, image_size=image_size)


def untrained(options, network):
    """The checkpoint before the training with these options."""
    torch.manual_seed(options['seed'])  # as train.py does
    _, params = registry.define(**registry.initialization(options), **network)
    params = {key: tensor.detach() for key, tensor in params.items()}
    return Checkpoint('', params, network=network)


def labels(chains):
    """A name for each chain: its model and depth, and the options in which the chains differ.

    Raises:
        UserError: two chains have the same name.
    """
    options = [{**registry.initial_scales(one.options['model']), **one.options} for one in chains]
    texts = [[option_text(name, one) for name in DISTINGUISHING] for one in options]
    differs = [len(set(values)) > 1 for values in zip(*texts)]
    names = []
    for one, text in zip(options, texts):
        parts = [f'{one["model"]}-{one["depth"]}', *compress(text, differs)]
        names.append(', '.join(filter(None, parts)))
        if names.count(names[-1]) > 1:
            raise UserError(f'two chains are both {names[-1]}: pass one of them')
    return names


def option_text(name, options):
    """An option as part of a label; '' if it has its default."""
    value = options.get(name)
    if value is None:
        return ''
    text = ','.join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return text if name == 'bn_init' else f'{name} {text}'


def first_batch(chains, dataroot):
    """The first training images of the first chain, (N, C, H, W), and their targets, without crops.

    Raises:
        UserError: the chains are not for the same data set.
    """
    options = chains[0].options
    names = sorted({chain.options['dataset'] for chain in chains})
    if len(names) > 1:
        raise UserError(f'{" and ".join(names)} cannot be measured together: pass chains of one')
    data = load_data(options, dataroot)
    return next(iter(data.batches(True, batch_size=IMAGES, seed=options['seed'])))


# --- the measurements ------------------------------------------------------------------------


def measure(checkpoint, images, targets):
    """The measurements of a checkpoint: one dict for each measured layer of its chain."""
    model = checkpoint.network['model']
    version_1 = model in VERSION_1
    params = {key: tensor.float() for key, tensor in checkpoint.params.items()}  # as the images
    rows = weight_rows(model, params)
    layers, stem = count(1), None

    def norm(*args, **kwargs):  # of all layers, in order
        nonlocal stem
        output = F.batch_norm(*args, **kwargs)  # (N, C, H, W)
        layer = next(layers)
        if layer == 1:
            stem = relu(output.detach().clone())  # the next ReLU works in place
        if layer in rows:
            row, values = rows[layer], relu(output.detach().clone())
            units = ncrelu(output.detach()) if version_1 else values
            row['active'] = units.count_nonzero().item() / output.numel()
            row['neighbour'] = neighbour_accuracy(units, targets)
            row['kept'] = kept(values, stem)
            # The hook gets the gradient at the values before the ReLU.
            output.register_hook(lambda gradient: row.update(gradient=gradient.norm().item()))
        return output

    f, _ = registry.define(**checkpoint.network)
    params = {
        key: tensor.clone().requires_grad_('.running_' not in key) for key, tensor in params.items()
    }
    F.cross_entropy(f(images, params, True, norm=norm), targets).backward()
    return list(rows.values())


def measured_layers(n):
    """Numbers of the layers of n that are measured, from 1: all, or some of many.

    These are spread evenly, with more among the first ones, where most changes.
    """
    if n <= ALL_LAYERS:
        return range(1, n + 1)
    spread = np.concatenate([np.linspace(1, n, 60), np.geomspace(1, n, 30)])
    return np.unique(spread.round().astype(int)).tolist()


def weight_rows(model, params):
    """{number of a measured layer: dict of what its weight tells}."""
    names = [key for key in params if key.rpartition('.')[2] == 'conv']
    folded = registry.fold(model, params)
    weights = [weight for key, weight in folded.items() if key.endswith('conv.weight')]
    rows = {}
    for layer in measured_layers(len(names)):
        name, weight = names[layer - 1], weights[layer - 1]
        row = rows[layer] = {'layer': layer, 'name': name}
        if layer > 1:  # the first convolution has no identity
            row['identity'] = identity_share(weight, model in VERSION_1)
            for part in ('alpha', 'beta'):  # plain weights have none
                scale = params.get(f'{name.removesuffix("conv")}{part}')
                if scale is not None:
                    row[part] = scale.abs().mean().item()
    return rows


def identity_share(weight, version_1):
    """Share of the energy of a folded weight, (out, in, *kernel), at the taps of the identity."""
    delta = tiled_delta(weight) if version_1 else torch.nn.init.dirac_(torch.empty_like(weight))
    return ((weight * delta).square().sum() / weight.square().sum()).item()


def neighbour_accuracy(values, targets):
    """Share of the images whose nearest other image has their target.

    Args:
        values: (N, ...), compared by Euclidean distance.
        targets: (N,).
    """
    # Centered, because a common offset costs precision.
    flat = (values - values.mean(0)).flatten(1)
    distances = torch.cdist(flat, flat).fill_diagonal_(torch.inf)
    return (targets[distances.argmin(1)] == targets).double().mean().item()


def kept(values, stem):
    """Mean squared correlation of channels of a layer with the same channels of the first one.

    Args:
        values, stem: (N, C, H, W) of the layer and of the first one, which has not more channels.
            A channel that does not vary counts as 0.
    """
    stem = F.adaptive_max_pool2d(stem, values.shape[2:])
    both = values[:, : stem.shape[1]], stem
    one, other = (part.transpose(0, 1).flatten(1).double() for part in both)  # (C, N H W)
    one, other = (part - part.mean(1, keepdim=True) for part in (one, other))
    energies = one.square().sum(1) * other.square().sum(1)
    return ((one * other).sum(1).square() / energies).nan_to_num(0).mean().item()


# --- the report ------------------------------------------------------------------------------


def csv_text(measured):
    """The table of {label: {epoch: rows}}, a line for each row."""
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(COLUMNS)
    for label, epochs in measured.items():
        for epoch, rows in epochs.items():
            for row in rows:
                values = [label, epoch, *map(row.get, COLUMNS[2:])]
                writer.writerow(f'{v:.4g}' if isinstance(v, float) else v for v in values)
    return file.getvalue()


def report(chains, out, dataroot=None):
    """Measure chains on the same images; write the figure and the CSV next to it.

    Returns:
        The paths.

    Raises:
        UserError: see labels and first_batch; or a file cannot be written.
    """
    measured, logs = {}, {}
    batch = first_batch(chains, dataroot)
    for label, chain in zip(labels(chains), chains):
        logs[label] = chain.log
        measured[label] = {
            epoch: measure(checkpoint, *batch) for epoch, checkpoint in chain.checkpoints.items()
        }
    table = Path(out).with_suffix('.csv')
    write_output(table, csv_text(measured).encode())
    return [*draw(measured, logs, out), str(table)]


def main(arguments=None):
    parser = OneLineParser(prog='-m tools.propagation', description=__doc__)
    parser.add_argument('runs', nargs='*', metavar='RUN', type=path_argument)
    parser.add_argument(
        '--untrained',
        action='append',
        default=[],
        metavar='OPTIONS',
        help='options of train.py for a chain to measure untrained; may be repeated',
    )
    parser.add_argument('--out', required=True, type=path_argument, help='where the figure goes')
    parser.add_argument('--dataroot', help='folder of the data set, if it has moved')
    args = parser.parse_args(arguments)
    if not args.runs and not args.untrained:
        raise OptionError('nothing to measure: pass a RUN, or --untrained OPTIONS')
    chains = [read_run(folder) for folder in args.runs]
    chains += [define_untrained(text, args.dataroot) for text in args.untrained]
    files = report(chains, args.out, args.dataroot)
    print(*(printable(str(file)) for file in files))


if __name__ == '__main__':
    run(main, 'tools.propagation')

"""How far a signal travels through chains of convolutions, with and without the Dirac weight: why DiracNets train.

    python -m tools.study studies/signal.yaml                    # trains four networks, keeps checkpoints, and draws the figure
    python -m tools.propagation RUN... --out signal.png          # the figure of any runs of chains; and signal.svg, signal.csv

A run's kept checkpoints (`epoch1.pt7`, ...) and its newest one are measured, and the network that it began with. For each batch norm, one
behind every convolution of the chain:

    alpha, beta       means of the convolution's scales (absolute values)
    identity          share of the energy (sum of squares) of the folded weight that lies on the taps of the identity
    responding        share of the units, channel x position behind ReLU or NCReLU, that respond to the input: over images, what a unit gives for
                      an image and for the same with noise of a tenth of its standard deviation correlate by more than 0.9. A unit that is
                      always zero doesn't respond, and neither does one that noise tosses about as much as another image does.
    correlation       that correlation's histogram over units, in tenths from -1 to 1; units without variance are in none
    gradient          norm of the loss's gradient by the batch norm's output

Batches are 256 training images, in the order of the first epoch; batch norm takes their statistics.
"""

import csv
import re
from pathlib import Path

import torch
import torch.nn.functional as F

from lab.runs import checkpoint
from lab.data import datasets as data
from lab.models.diracnet_v1 import ncrelu, tiled_delta
from lab.errors import OneLineParser, UserError, run
from lab.models.registry import CHAINS, VERSION_1, define
from tools import plot

IMAGES, NOISE, RESPONDS = 256, 0.1, 0.9
BINS = 20


def kept_checkpoints(folder):
    """The checkpoints of a run, by their epoch, with what it began with as that of epoch 0. Raises UserError."""
    paths = {
        int(match[1]): path
        for path in Path(folder).glob('epoch*.pt7')
        if (match := re.fullmatch(r'epoch(\d+)\.pt7', path.name))
    }
    found = {epoch: checkpoint.load(path) for epoch, path in sorted(paths.items())}
    newest = checkpoint.load(folder)
    if not newest.is_run or newest.network['model'] not in CHAINS + VERSION_1:
        raise UserError(f'{folder} is no run of a chain ({", ".join(CHAINS + VERSION_1)})')
    found[newest.epoch] = newest
    torch.manual_seed(newest.options['seed'])  # as the training did
    _, params = define(init=newest.options.get('init'), **newest.network)
    first = checkpoint.Checkpoint(
        newest.path, {key: tensor.detach() for key, tensor in params.items()}, False, newest.network
    )
    return {0: first, **found}


def layer_outputs(f, params, images, targets=None):
    """What each batch norm gives, (N, C, H, W); with targets, each has the gradient of their cross-entropy."""
    outputs = []

    def norm(*args, **kwargs):
        output = F.batch_norm(*args, **kwargs)
        if targets is not None:
            output.retain_grad()
        outputs.append(output)
        return output.clone()  # the ReLU behind works in place

    with torch.set_grad_enabled(targets is not None):
        logits = f(images, params, True, norm=norm)
        if targets is not None:
            F.cross_entropy(logits, targets).backward()
    return outputs


def correlations(one, other):
    """Of each unit's values over images, (N, ...) both: (units,), NaN where a unit doesn't vary."""
    one, other = ((values - values.mean(0)).flatten(1).double() for values in (one, other))
    lengths = one.norm(dim=0) * other.norm(dim=0)
    return torch.where(lengths > 1e-9 * len(one), (one * other).sum(0) / lengths, torch.nan)


def identity_share(weight, delta):
    return ((weight * delta).square().sum() / weight.square().sum()).item()


def measure(found, images, targets):
    """One dict for each convolution of a checkpoint's chain, from the first on, as this module's docstring says."""
    version_1 = found.network['model'] in VERSION_1
    f, _ = define(**found.network)
    params = {
        key: tensor.clone().requires_grad_(not key.rpartition('.')[2].startswith('running_'))
        for key, tensor in found.params.items()
    }
    clean = layer_outputs(f, params, images, targets)
    noise = (
        NOISE
        * images.std()
        * torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).to(images)
    )
    noisy = layer_outputs(f, params, images + noise)
    activation = ncrelu if version_1 else F.relu
    names = ['', *(re.match(r'(.*)conv$', key)[1] for key in params if key.endswith('.conv'))]
    folded = {
        name: tensor
        for name, tensor in found.fold().named_parameters()
        if name.endswith('conv.weight')
    }
    rows = []
    for layer, (name, weight, one, other) in enumerate(
        zip(names, folded.values(), clean, noisy, strict=True)
    ):
        r = correlations(activation(one.detach()), activation(other))
        row = {
            'layer': layer,
            'name': f'{name}conv',
            'responding': (r > RESPONDS).double().mean().item(),
            'gradient': one.grad.norm().item(),
        }
        if name:
            delta = (
                tiled_delta(weight) if version_1 else torch.nn.init.dirac_(torch.empty_like(weight))
            )
            row['identity'] = identity_share(weight.detach(), delta)
            row.update(
                {
                    part: params[f'{name}{part}'].detach().abs().mean().item()
                    for part in ('alpha', 'beta')
                    if f'{name}{part}' in params
                }
            )
        row['correlation'] = (
            torch.histc(r[r.isfinite()].clamp(-1, 1), BINS, -1, 1) / len(r)
        ).tolist()
        rows.append(row)
    return rows


def measure_runs(folders, dataroot=None):
    """{run's label: {epoch: rows}}, all on the same images."""
    measured, batch = {}, None
    for folder in folders:
        found = kept_checkpoints(folder)
        options = checkpoint.load(folder).options
        if batch is None:
            source = data.load(options['dataset'], dataroot or options['dataroot'])
            batch = next(
                iter(
                    source.batches(
                        True,
                        batch_size=IMAGES,
                        device=torch.device('cpu'),
                        seed=options['seed'],
                        pad=0,
                        workers=0,
                    )
                )
            )
        label = f'{options["model"]}-{options["depth"]}'
        if label in measured:
            raise UserError(f'{folder} is a second run of {label}: give one of each')
        measured[label] = {epoch: measure(one, *batch) for epoch, one in found.items()}
    return measured


def write_csv(measured, path):
    names = [
        'run',
        'epoch',
        'layer',
        'name',
        'alpha',
        'beta',
        'identity',
        'responding',
        'gradient',
        'correlation',
    ]
    with open(path, 'w', newline='') as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for label, epochs in measured.items():
            for epoch, rows in epochs.items():
                for row in rows:
                    writer.writerow(
                        {
                            'run': label,
                            'epoch': epoch,
                            **{
                                key: f'{value:.4g}' if isinstance(value, float) else value
                                for key, value in row.items()
                            },
                            'correlation': ' '.join(f'{share:.3f}' for share in row['correlation']),
                        }
                    )


def draw(measured, logs, out):
    """The figure. Above: the first run's scales and share of the identity over depth, in several epochs, and the error of all runs; below: all runs'
    responding units before and after training, their histograms, and gradients at the beginning."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 4, figsize=(17, 7.5), layout='constrained')
    label, epochs = next(iter(measured.items()))
    parts = [
        ('alpha', 'mean |alpha|'),
        ('beta', 'mean |beta|'),
        ('identity', "identity's share of the folded weight"),
    ]
    for ax, (part, name) in zip(axes[0], parts):
        for e, (epoch, rows) in enumerate(epochs.items()):
            some = [row for row in rows if part in row]
            style, marker, _ = plot.style_of(e)
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
        ax.set_title(f'{label}: {name}', fontsize=10)
        ax.set_xlabel('layer')
    axes[0][0].legend(fontsize=8)

    def lines(ax, value, title, **kwargs):
        for g, (label, epochs) in enumerate(measured.items()):
            style, marker, color = plot.style_of(g)
            x, y = value(label, epochs)
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

    lines(
        axes[0][3],
        lambda label, _: zip(*[(line['epoch'], 100 - line['test_acc']) for line in logs[label]]),
        'test error, %',
    )
    axes[0][3].set_xlabel('epoch')
    axes[0][3].set_yscale('log')
    axes[0][3].legend(fontsize=8)

    def over_depth(part, which):
        return lambda _, epochs: zip(*[(row['layer'], row[part]) for row in epochs[which(epochs)]])

    lines(
        axes[1][0],
        over_depth('responding', min),
        'units that respond to the input, before training',
    )
    lines(
        axes[1][1], over_depth('responding', max), 'units that respond to the input, after training'
    )
    lines(axes[1][3], over_depth('gradient', min), 'norm of the gradient, before training')
    axes[1][3].set_yscale('log')
    for ax in axes[1][:2]:
        ax.set_ylim(-0.02, 1)
    for ax in axes[1][[0, 1, 3]]:
        ax.set_xlabel('layer')
    middle = len(next(iter(measured.values()))[0]) // 2
    centres = [-1 + (b + 0.5) * 2 / BINS for b in range(BINS)]
    lines(
        axes[1][2],
        lambda _, epochs: (centres, epochs[0][middle]['correlation']),
        f'histogram of units, layer {middle}, before training',
        drawstyle='steps-mid',
    )
    axes[1][2].set_xlabel('correlation of a unit with and without noise in the input')
    for ax in axes.flat:
        ax.grid(True, color='0.9')
        ax.spines[['top', 'right']].set_visible(False)
    return plot.save(figure, out)


def report(folders, out, dataroot=None):
    """Measure, and write the figure and beside it the CSV. Returns the files."""
    measured = measure_runs(folders, dataroot)
    logs = dict(zip(measured, map(plot.read_log, folders)))
    table = Path(out).with_suffix('.csv')
    write_csv(measured, table)
    return [*draw(measured, logs, out), str(table)]


def main(arguments=None):
    parser = OneLineParser(prog='-m tools.propagation', description=__doc__)
    parser.add_argument('runs', nargs='+', metavar='RUN')
    parser.add_argument(
        '--out', required=True, type=Path, help='file of the picture; PNG, SVG and CSV are written'
    )
    parser.add_argument(
        '--dataroot', help='folder of the data, where it is another than in training'
    )
    args = parser.parse_args(arguments)
    print(*report(args.runs, args.out, args.dataroot))


if __name__ == '__main__':
    run(main, 'tools.propagation')

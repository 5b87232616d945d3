"""How far a signal travels through chains of convolutions: why DiracNets train.

    python -m tools.study studies/signal.yaml             # trains four chains, and draws the figure
    python -m tools.propagation RUN... --out signal.png   # the figure of any runs of chains

Both write PNG, SVG and CSV. Each run is measured before its training, at its kept checkpoints
(epoch1.pt7, ...) and at its newest one. For each convolution of the chain and the batch norm after
it, the CSV has

    alpha, beta   means of the absolute scales of the convolution
    identity      share of the energy (sum of squares) of the folded weight at the taps of the
                  identity
    responding    share of the units, channel x position after ReLU or NCReLU, that respond to the
                  input: the values of a unit for the images correlate by more than 0.9 with its
                  values for the same images plus noise of a tenth of their standard deviation. A
                  unit does not respond if it is always zero, or if noise changes it as much as
                  another image does.
    correlation   histogram of that correlation over the units, in 20 bins from -1 to 1, without
                  the units that do not vary
    gradient      norm of the gradient of the loss at the output of the batch norm

The batch is the first 256 training images of the first epoch. Batch norm uses its statistics.
"""

import csv
import re
from pathlib import Path

import torch
import torch.nn.functional as F

from lab.data import datasets
from lab.errors import OneLineParser, UserError, run
from lab.models.diracnet_v1 import ncrelu, tiled_delta
from lab.models.registry import CHAINS, VERSION_1, define, initialization
from lab.runs import checkpoint
from lab.runs.log import read_log
from tools.propagation_figure import draw

IMAGES, NOISE, RESPONDS = 256, 0.1, 0.9
BINS = 20
COLUMNS = (
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
)


def checkpoints_by_epoch(folder):
    """The checkpoints of a run, by their epoch; that of epoch 0 has the parameters that the
    training began with. Raises UserError."""
    newest = checkpoint.load(folder)
    if not newest.is_run or newest.network['model'] not in CHAINS + VERSION_1:
        raise UserError(f'{folder} is not a run of a chain ({", ".join(CHAINS + VERSION_1)})')
    found = {0: untrained(newest)}
    for path in Path(folder).glob('epoch*.pt7'):
        match = re.fullmatch(r'epoch(\d+)\.pt7', path.name)
        if match:
            found[int(match[1])] = checkpoint.load(path)
    found[newest.epoch] = newest
    return dict(sorted(found.items()))


def untrained(found):
    """The checkpoint of the same run before its training."""
    torch.manual_seed(found.options['seed'])  # as train.py does
    _, params = define(**initialization(found.options), **found.network)
    params = {key: tensor.detach() for key, tensor in params.items()}
    return checkpoint.Checkpoint(found.path, params, network=found.network)


def layer_outputs(f, params, images, targets=None):
    """The output of each batch norm, (N, C, H, W). With targets, (N,), each has the gradient of
    the cross-entropy."""
    outputs = []

    def norm(*args, **kwargs):
        output = F.batch_norm(*args, **kwargs)
        if targets is not None:
            output.retain_grad()
        outputs.append(output)
        return output.clone()  # the next ReLU works in place

    with torch.set_grad_enabled(targets is not None):
        logits = f(images, params, True, norm=norm)
        if targets is not None:
            F.cross_entropy(logits, targets).backward()
    return outputs


def correlations(one, other):
    """The correlation over images of each unit's values in two outputs.

    Args:
        one, other: (N, ...).

    Returns:
        (units,), NaN for a unit that does not vary.
    """
    one, other = ((values - values.mean(0)).flatten(1).double() for values in (one, other))
    lengths = one.norm(dim=0) * other.norm(dim=0)
    return torch.where(lengths > 1e-9 * len(one), (one * other).sum(0) / lengths, torch.nan)


def identity_share(weight, version_1):
    """Share of the energy of a folded weight, (out, in, *kernel), at the taps of the identity."""
    delta = tiled_delta(weight) if version_1 else torch.nn.init.dirac_(torch.empty_like(weight))
    return ((weight * delta).square().sum() / weight.square().sum()).item()


def histogram(correlation):
    """Share of the units in each bin, from their correlations, which may be NaN."""
    varying = correlation[correlation.isfinite()].clamp(-1, 1)
    return (torch.histc(varying, BINS, -1, 1) / len(correlation)).tolist()


def noise_like(images):
    """Noise of a tenth of the images' standard deviation, always the same."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return NOISE * images.std() * noise.to(images)


def measure(found, images, targets):
    """The measurements of a checkpoint: one dict for each convolution of its chain."""
    version_1 = found.network['model'] in VERSION_1
    activation = ncrelu if version_1 else F.relu
    f, _ = define(**found.network)
    params = {}
    for key, tensor in found.params.items():
        is_running = key.rpartition('.')[2].startswith('running_')
        params[key] = tensor.clone().requires_grad_(not is_running)
    clean = layer_outputs(f, params, images, targets)
    noisy = layer_outputs(f, params, images + noise_like(images))
    names = [key for key in params if key.rpartition('.')[2] == 'conv']
    folded = found.fold().named_parameters()
    weights = [weight.detach() for key, weight in folded if key.endswith('conv.weight')]

    rows = []
    for name, weight, one, other in zip(names, weights, clean, noisy, strict=True):
        correlation = correlations(activation(one.detach()), activation(other))
        row = {
            'layer': len(rows),
            'name': name,
            'responding': (correlation > RESPONDS).double().mean().item(),
            'gradient': one.grad.norm().item(),
            'correlation': histogram(correlation),
        }
        if name != 'conv':  # the first convolution has no identity
            row['identity'] = identity_share(weight, version_1)
            row.update(mean_scales(params, name.removesuffix('conv')))
        rows.append(row)
    return rows


def mean_scales(params, prefix):
    """The mean absolute alpha and beta of a convolution; {} for plain weights."""
    keys = {part: f'{prefix}{part}' for part in ('alpha', 'beta')}
    return {
        part: params[key].detach().abs().mean().item()
        for part, key in keys.items()
        if key in params
    }


def first_batch(options, dataroot):
    """The first training images of a run, (N, C, H, W), and their targets, without crops."""
    source = datasets.load(options['dataset'], dataroot or options['dataroot'])
    return next(iter(source.batches(True, batch_size=IMAGES, seed=options['seed'])))


def measure_runs(folders, dataroot=None):
    """{label of a run: {epoch: rows}}, all on the same images."""
    measured, batch = {}, None
    for folder in folders:
        found = checkpoints_by_epoch(folder)
        options = checkpoint.load(folder).options
        if batch is None:
            batch = first_batch(options, dataroot)
        label = f'{options["model"]}-{options["depth"]}'
        if label in measured:
            raise UserError(f'{folder} is a second run of {label}: pass one run of each network')
        measured[label] = {epoch: measure(one, *batch) for epoch, one in found.items()}
    return measured


def write_csv(measured, path):
    with open(path, 'w', newline='') as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for label, epochs in measured.items():
            for epoch, rows in epochs.items():
                writer.writerows({'run': label, 'epoch': epoch, **as_text(row)} for row in rows)


def as_text(row):
    texts = {}
    for key, value in row.items():
        if key == 'correlation':
            texts[key] = ' '.join(f'{share:.3f}' for share in value)
        else:
            texts[key] = f'{value:.4g}' if isinstance(value, float) else value
    return texts


def report(folders, out, dataroot=None):
    """Measure runs; write the figure and the CSV next to it. Returns the paths.

    Raises:
        UserError: a folder is not a run of a chain, or two have the same network.
    """
    measured = measure_runs(folders, dataroot)
    logs = dict(zip(measured, map(read_log, folders)))
    table = Path(out).with_suffix('.csv')
    write_csv(measured, table)
    return [*draw(measured, logs, out), str(table)]


def main(arguments=None):
    parser = OneLineParser(prog='-m tools.propagation', description=__doc__)
    parser.add_argument('runs', nargs='+', metavar='RUN')
    parser.add_argument(
        '--out', required=True, type=Path, help='file for the figure; PNG, SVG and CSV are written'
    )
    parser.add_argument(
        '--dataroot', help='folder of the data set, if it is not where the training had it'
    )
    args = parser.parse_args(arguments)
    print(*report(args.runs, args.out, args.dataroot))


if __name__ == '__main__':
    run(main, 'tools.propagation')

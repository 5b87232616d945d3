"""Write a page about a trained network: one HTML file that needs nothing else.

    python -m tools.report logs/RUN                   # writes report.html to the run's folder
    python -m tools.report net.pth --out report.html

RUN is a run's folder, or any file with a network that train.py --evaluate reads. The page has the
curves of the training, the confusion matrix, the accuracy of each class, the surest mistakes with
their class activation maps, the first filters, alpha, beta and the signal over depth, and where the
network comes from. Without the data set, the page lacks what needs its images, and says so.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
import torch

from lab.data.datasets import Data
from lab.data.names import display_name, percent, readable
from lab.data.preprocessing import Preprocessing, normalize
from lab.errors import OneLineParser, OptionError, UserError, one_line, printable, run
from lab.files import path_argument, write_output
from lab.folded import (
    check_classes,
    compute_logits,
    images_tested,
    load_data,
    sample_pixels,
    with_preprocessing,
)
from lab.runs import checkpoint
from lab.runs.folder import COMMANDS, REPORT, read_commands
from lab.runs.log import parse_line
from tools import propagation
from tools.checkpoint_arguments import add_dataset
from tools.report import sections

TEMPLATE = Path(__file__).with_name('page.html')


@dataclass
class Tests:
    """A network's answers for test images."""

    data: Data
    preprocessing: Preprocessing
    kind: str  # of the images: 'test' or 'held-out'
    classes: list
    pixels: np.ndarray  # uint8 (N, H, W, C)
    targets: np.ndarray  # (N,)
    predicted: np.ndarray  # (N,)
    probabilities: np.ndarray  # (N,), of what is predicted


def test(loaded, dataroot):
    """The Tests of a Checkpoint. Raises UserError if the data set is missing or does not fit."""
    preprocessing = Preprocessing.from_dict(loaded.preprocessing)
    data = load_data(loaded, loaded.network['dataset'], preprocessing, dataroot)
    check_classes(loaded, data)
    classes = readable(list(loaded.classes or data.classes), len(data.classes))
    classes = list(map(printable, classes))
    pixels, targets = sample_pixels(data.test, preprocessing)
    net, batches = loaded.module().float(), torch.from_numpy(pixels).split(1000)
    logits = [compute_logits(net, normalize(images, preprocessing)) for images in batches]
    answers = torch.from_numpy(np.concatenate(logits)).softmax(1).max(1)
    predicted, probabilities = answers.indices.numpy(), answers.values.numpy()
    kind = images_tested(loaded)
    return Tests(data, preprocessing, kind, classes, pixels, targets, predicted, probabilities)


def describe(loaded, starts, dataset, dataroot):
    """What the page about a Checkpoint says.

    Args:
        starts: the commands of its run, or None.
        dataset, dataroot: as for `with_preprocessing`.

    Returns:
        The variables of page.html, and the reason why the images could not be had, or ''.
    """
    log = [parse_line(line, 'its log') for line in loaded.log or []]
    network, options = loaded.network, sorted(loaded.options.items())
    title = f'{network["model"]}-{network["depth"]}-{network["width"]:g}'
    parts = [sections.training(log)]
    try:
        loaded = with_preprocessing(loaded, dataset, dataroot)
        root = loaded.options.get('dataroot', dataroot or './data')
        name = display_name(loaded.network['dataset'], root)
        title = f'{title} on {name}'
        tests, missing = test(loaded, dataroot), ''
    except UserError as error:
        tests, missing = None, str(error)
        parts += [sections.Section('Images', f'What needs images is missing: {missing}')]
    else:
        parts += [sections.confusion(tests), sections.accuracies(tests)]
        parts += [sections.mistakes(loaded, tests)]
    parts += [sections.filters(loaded.params), sections.scales(loaded.params)]
    if tests and not loaded.folded and not propagation.why_unmeasurable(network):
        parts += [sections.signal(loaded, tests)]
    content = {
        'title': printable(title),
        'metadata': metadata(loaded, starts or [{}], log, tests),
        'sections': filter(None, parts),
        'options': [(k, v if isinstance(v, str) else json.dumps(v)) for k, v in options],
    }
    return content, missing


def metadata(loaded, starts, log, tests):
    """{name: value} of what the page begins with, as far as it is known."""
    rows = {}
    if tests:
        accuracy = 100 * (tests.predicted == tests.targets).mean()
        rows['test accuracy'] = (
            f'{percent(accuracy)} % of {len(tests.targets):,} {tests.kind} images'
        )
    elif log:
        rows['test accuracy'] = f'{percent(log[-1]["test_acc"])} % (from the log)'
    parameters = (tensor for key, tensor in loaded.params.items() if 'running_' not in key)
    rows['parameters'] = f'{sum(tensor.numel() for tensor in parameters):,}'
    rows['file'] = printable(str(loaded.path))
    if loaded.options:
        rows['epochs'] = f'{loaded.epoch} of {loaded.options["epochs"]}'
        rows['seed'] = str(loaded.options['seed'])
    start = first_start(starts)
    for name in ('command', 'commit', 'time', 'device', 'python'):
        rows[name] = starts[start].get(name)
    versions = starts[start].get('versions', {}).items()
    rows['versions'] = ', '.join(f'{name} {version}' for name, version in versions if version)
    if later := starts[start + 1 :]:
        last = ', '.join(
            str(later[-1].get(name)) for name in ('command', 'commit', 'time', 'device')
        )
        rows['resumed'] = f'{len(later)} x, last: {last}'
    return {name: value for name, value in rows.items() if value}


def first_start(starts):
    """The index of the start that the others resumed. Earlier ones ended without a checkpoint."""
    anew = [i for i, start in enumerate(starts) if '--resume' not in start.get('command', '')]
    return anew[-1] if anew else 0


def main(arguments=None):
    parser = OneLineParser(prog='-m tools.report', description=__doc__)
    parser.add_argument('checkpoint', metavar='RUN', type=path_argument)
    parser.add_argument(
        '--out', type=path_argument, help='the HTML file to write (default: see above)'
    )
    add_dataset(parser, 'RUN')
    parser.add_argument('--dataroot', help='folder of the data set, if it has moved')
    args = parser.parse_args(arguments)
    loaded = checkpoint.load(args.checkpoint)
    if not args.out and not loaded.is_run:
        raise OptionError(f'{loaded.path} is not in the folder of a run: add --out')
    out = args.out or str(loaded.path.with_name(REPORT))
    starts = read_commands(loaded.path.with_name(COMMANDS))
    content, missing = describe(loaded, starts, args.dataset, args.dataroot)
    template = jinja2.Template(TEMPLATE.read_text('utf-8'), autoescape=True, trim_blocks=True)
    write_output(out, template.render(content, percent=percent).encode())
    if missing:
        print(one_line(f'{out} lacks what needs images: {missing}'), file=sys.stderr)
    print(printable(out))


if __name__ == '__main__':
    run(main, 'tools.report')

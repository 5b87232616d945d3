"""Write a page about a trained network: one HTML file that needs nothing else.

    python -m tools.report logs/RUN --out report.html

RUN is a run's folder, or any file with a network that train.py --evaluate reads. The page has the
curves of the training, the confusion matrix, the accuracy of each class, the surest mistakes with
their class activation maps, the first filters, alpha, beta and the signal over depth, and where the
network comes from. Without the data set, the page lacks what needs its images, and says so.
"""

import json
import sys
from pathlib import Path

import jinja2

from lab.data.names import display_name
from lab.errors import OneLineParser, printable, run
from lab.files import path_argument, write_output
from lab.runs import checkpoint
from tools.report.content import describe

TEMPLATE = Path(__file__).with_name('page.html')


def render(source, facts, sections):
    """The HTML about a Checkpoint. All texts are escaped."""
    network, options = source.network, sorted(source.options.items())
    name = display_name(network['dataset'], source.options.get('dataroot', '.'))
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(TEMPLATE.read_text('utf-8')).render(
        title=printable(f'{network["model"]}-{network["depth"]}-{network["width"]:g} on {name}'),
        facts=facts,
        sections=sections,
        options=[(k, v if isinstance(v, str) else json.dumps(v)) for k, v in options],
    )


def main(arguments=None):
    parser = OneLineParser(prog='-m tools.report', description=__doc__)
    parser.add_argument('checkpoint', metavar='RUN', type=path_argument)
    parser.add_argument('--out', required=True, type=path_argument, help='the HTML file to write')
    parser.add_argument(
        '--dataroot',
        type=path_argument,
        help='folder of the data set, if it is not where the training had it',
    )
    args = parser.parse_args(arguments)
    source = checkpoint.load(args.checkpoint)
    facts, sections, missing = describe(source, args.checkpoint, args.dataroot)
    write_output(args.out, render(source, facts, sections).encode())
    if missing:
        print(
            f'{printable(args.out)} lacks what needs images: {printable(missing)}', file=sys.stderr
        )
    print(printable(args.out))


if __name__ == '__main__':
    run(main, 'tools.report')

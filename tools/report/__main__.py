"""Write a page about a trained network: one HTML file that needs nothing else.

    python -m tools.report logs/RUN --out report.html

RUN is a run's folder, or any file with a network that train.py --evaluate reads. The page has the
curves of the training, the confusion matrix, the accuracy of each class, the surest mistakes with
their class activation maps, the first filters, alpha, beta and the signal over depth, and where the
network comes from. Without the data set, the page lacks what needs its images, and says so.
"""

import sys
from pathlib import Path

from lab.errors import OneLineParser, UserError, printable, run
from lab.files import path_argument, write_atomically
from lab.runs import checkpoint
from tools.report.content import describe
from tools.report.page import render


def write_report(path, out, dataroot=None):
    """Write the page about the checkpoint in `path`.

    Args:
        dataroot: folder of the data set; None for the folder that the training used.

    Returns:
        The reason why the page lacks pictures, or ''.

    Raises:
        UserError: the checkpoint or the data set cannot be read, or `out` cannot be written.
    """
    content = describe(checkpoint.load(path), path, dataroot)
    out = Path(out).expanduser()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, render(content).encode())
    except OSError as error:
        raise UserError(f'{out} cannot be written ({error.strerror})') from None
    return content.missing


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
    missing = write_report(args.checkpoint, args.out, args.dataroot)
    if missing:
        print(
            f'{printable(args.out)} lacks what needs images: {printable(missing)}', file=sys.stderr
        )
    print(printable(args.out))


if __name__ == '__main__':
    run(main, 'tools.report')

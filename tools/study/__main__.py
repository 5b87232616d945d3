"""Run a comparison: train a grid of train.py command lines over seeds; make a table and a figure.

    python -m tools.study studies/depth.yaml --jobs 2
    python -m tools.study studies/depth.yaml --dataset CIFAR10    # with train.py's recipe for it
    python -m tools.study studies/depth.yaml --table              # train nothing

Finished runs are not repeated, so the same command resumes after Ctrl-C. A run that diverged is
finished too: failed.txt in its folder says why; without that file it runs again. If all runs
diverged, no figure is drawn.

Runs, table (Markdown and CSV) and figure (PNG and SVG) go to logs/reference/study-NAME. With a data
set other than the study's own, they go to logs/study-NAME-DATASET; for a file outside studies/, to
logs/study-NAME. The table has all finished runs with the seeds of the study and of --seeds. Runs
in the folder that the study does not define, such as those of an earlier version of the YAML file,
are named on stderr, and are in neither table nor figure.

The YAML file has

    title, note   one line, and what the results show (Markdown); both go into table.md
    seeds         a list
    dataset       the study's own data set
    options       options of train.py for every run
    recipes       more options, by data set
    runs          a list of options for one run each; a list as a value makes one run per element;
                  `seeds` is a list of those of the study's seeds that this one has
    table         names of the options that distinguish the rows
    reported      heading of a column of numbers that others report; a run gives its number as
                  `reported`
    figure        x: the name of an option in the table, for the errors over it; or epoch or
                  seconds, for the course of the errors, with a curve for each row of the table
                  lines: the option that distinguishes the lines, or a list of options; curves that
                  it does not distinguish look the same
                  y, panels: instead of lines, draw heat maps of the error over x and y, one for
                  each value of `panels`
                  signal: true, instead of x and lines, draws the figure of tools.propagation
    keep          epochs whose checkpoints are kept as epochN.pt7 in the run's folder

Other keys, equal runs, and options that the study sets itself (seed, save, ...) are errors.
"""

import math
import os
import shlex
import signal
import sys
from pathlib import Path

from lab.errors import OneLineParser, OptionError, UserError, one_line, run
from lab.files import path_argument
from lab.runs.checkpoint import FILE_NAME
from tools import propagation
from tools.study.definition import read
from tools.study.execution import execute
from tools.study.figure import draw_study
from tools.study.runs import ROOT, all_runs
from tools.study.table import collect, write_tables


def seed_list(text):
    return [int(seed) for seed in text.split(',')]


def parse_arguments(arguments):
    parser = OneLineParser(prog='-m tools.study', description=__doc__)
    parser.add_argument('study', metavar='STUDY.yaml', type=path_argument)
    parser.add_argument('--dataset', help="the data set to use instead of the study's own")
    parser.add_argument('--dataroot', help='folder of the data set')
    parser.add_argument('--device', help='as for train.py')
    parser.add_argument('--jobs', type=int, default=1, help='trainings at once (default 1)')
    parser.add_argument('--seeds', type=seed_list, help="such as 1,2,3, instead of the study's")
    parser.add_argument(
        '--minutes',
        type=float,
        default=math.inf,
        help='stop after this time (the same command resumes), and do not start a run whose log or '
        'other seeds say that it would not end in time',
    )
    parser.add_argument('--out', type=path_argument, help='folder for all output (see above)')
    parser.add_argument('--table', action='store_true', help='train nothing')
    args = parser.parse_args(arguments)
    if args.jobs < 1:
        raise OptionError(f'--jobs {args.jobs} must be at least 1')
    return args


def study_folder(study, dataset):
    """Where runs, table and figure go without --out."""
    if dataset != study.dataset:
        return ROOT / 'logs' / f'study-{study.name}-{dataset}'
    if study.path.resolve().parent == ROOT / 'studies':
        return ROOT / 'logs' / 'reference' / f'study-{study.name}'
    return ROOT / 'logs' / f'study-{study.name}'


def draw(study, rows, runs, folder, dataroot):
    """Draw the figure that the study asks for, if a run did not diverge."""
    out = folder / 'figure'
    trained = [one for one in runs if not one.failed]
    folders = [one.folder for one in trained if one.seed == trained[0].seed]
    if not trained:
        print(f'{out}.png is not drawn: all runs diverged', file=sys.stderr)
    elif 'signal' not in study.figure:
        draw_study(study, rows, runs, out)
    elif all((path / FILE_NAME).exists() for path in folders):
        propagation.report(list(map(propagation.read_run, folders)), out, dataroot)
    else:
        reason = 'it needs the checkpoints of all runs, and the repository has only their logs'
        print(f'{out}.png is not drawn again: {reason}', file=sys.stderr)


def command(args, study, dataset):
    """The command line that makes the table."""
    path = study.path.resolve()
    words = [path.relative_to(ROOT) if path.is_relative_to(ROOT) else study.path]
    if dataset != study.dataset:
        words += ['--dataset', dataset]
    if args.out:
        words += ['--out', args.out]
    return shlex.join(['python', '-m', 'tools.study', *map(str, words)])


def main(arguments=None):
    args = parse_arguments(arguments)
    study = read(args.study)
    dataset = args.dataset or study.dataset
    # A broken link stays: resolving it would make its target.
    folder = Path(os.path.abspath(args.out)) if args.out else study_folder(study, dataset)
    if args.dataroot:
        study.options['dataroot'] = args.dataroot
    seeds = args.seeds or study.seeds
    runs = all_runs(study, seeds, dataset, folder)
    # The table has the study's seeds also if others, or fewer, were asked for.
    of_table = all_runs(study, sorted({*study.seeds, *seeds}), dataset, folder)
    others = sorted({*folder.glob('*/seed*')} - {one.folder for one in of_table})
    if others:
        names = ', '.join(str(path.relative_to(folder)) for path in others)
        message = (
            f'{folder} has runs that {study.path} does not define, and its table lacks: {names}'
        )
        print(one_line(message), file=sys.stderr)
    if not args.table:
        # End as after Ctrl-C, so that `execute` stops the trainings.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        execute(runs, args.jobs, args.device, args.minutes)
    runs = [one for one in of_table if one.is_done()]
    if not runs:
        raise UserError(f'{folder} has no finished runs yet')
    rows = collect(study, runs)
    write_tables(study, rows, dataset, folder, command(args, study, dataset))
    if study.figure:
        draw(study, rows, runs, folder, args.dataroot)
    print((folder / 'table.md').read_text())


if __name__ == '__main__':
    run(main, 'tools.study')

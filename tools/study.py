"""Run a comparison: a grid of train.py command lines over seeds, its table and its figure.

    python -m tools.study studies/depth.yaml --jobs 2              # what is done already is not run again; Ctrl-C, and again, goes on
    python -m tools.study studies/depth.yaml --dataset CIFAR10     # the same on another data set, with train.py's own recipe for it

Runs, table (Markdown and CSV) and figure (PNG and SVG) go to logs/reference/study-NAME, for another data set to logs/study-NAME-DATASET, and those of
a file that is not in studies/ to logs/study-NAME. The table is of all runs that are done. One that diverged is done, too (failed.txt in its folder says why;
without that file it is run again).
The YAML file has

    title, note      one line, and what agrees and what doesn't (both go into the table's file)
    seeds            a list
    dataset          its own data set
    options          of train.py, for every run
    recipes          more options, by data set
    runs             a list of options each; a list as a value stands for one run of each of its elements
    table            names of the options that tell rows apart, and perhaps `reported`, a column of the documents' numbers
    figure           x: an option's name, or epoch; lines: the option that tells lines apart, or a list of them; or signal: true (tools.propagation's)
    keep             epochs whose checkpoints are kept, as epochN.pt7 in the run's folder
"""

import argparse
import csv
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from lab.errors import OneLineParser, OptionError, UserError, run
from tools import plot

ROOT = Path(__file__).resolve().parent.parent
FAILED = 'failed.txt'


def read(path):
    import yaml

    try:
        study = yaml.safe_load(Path(path).read_text())
        missing = [
            name for name in ('title', 'seeds', 'dataset', 'runs', 'table') if name not in study
        ]
    except OSError as error:
        raise UserError(f'{path} can not be read ({error.strerror})') from None
    except (yaml.YAMLError, TypeError) as error:
        raise UserError(f'{path} is no study: {" ".join(str(error).split())}') from None
    if missing:
        raise UserError(f'{path} is no study: it has no {missing[0]}')
    study = {'options': {}, 'recipes': {}, 'note': '', 'keep': [], **study, 'name': Path(path).stem}
    for name, kind in (
        ('seeds', list),
        ('runs', list),
        ('table', list),
        ('keep', list),
        ('options', dict),
        ('recipes', dict),
        ('note', str),
    ):
        if not isinstance(study[name], kind):
            raise UserError(
                f'{path} is no study: {name} is {study[name]!r}, and must be a {kind.__name__}'
            )
    figure = study.get('figure', {'signal': True})
    if (
        not isinstance(figure, dict)
        or not figure.get('signal')
        and figure.get('x') not in ('epoch', *study['table'])
    ):
        raise UserError(
            f'{path} is no study: x of its figure must be epoch, or one of {", ".join(study["table"])}'
        )
    return study


def expand(options):
    """One dict for each combination of elements of the values that are lists. (epoch_step is a list itself.)"""
    lists = [
        [
            (name, value)
            for value in (values if isinstance(values, list) and name != 'epoch_step' else [values])
        ]
        for name, values in options.items()
    ]
    return [dict(combination) for combination in itertools.product(*lists)]


def flags(options):
    return [
        part
        for name, value in options.items()
        if value is not False
        for part in (
            [f'--{name}']
            if value is True
            else [
                f'--{name}',
                json.dumps(value, separators=(',', ':')) if isinstance(value, list) else str(value),
            ]
        )
    ]


class Run:
    """One training of a study. `options` are those of its row; `reported` what the documents say of it."""

    def __init__(self, study, row, seed, dataset, folder):
        self.row, self.seed = (
            {name: value for name, value in row.items() if name != 'reported'},
            seed,
        )
        self.reported = row.get('reported', '')
        self.options = {
            'dataset': dataset,
            **study['options'],
            **study['recipes'].get(dataset, {}),
            **self.row,
            'seed': seed,
        }
        self.options = {
            name: value for name, value in vars(self.parse()).items() if value is not None
        }
        name = '-'.join(str(self.row[key]) for key in self.row) or study['name']
        self.folder = folder / name.replace('/', '_').replace(' ', '') / f'seed{seed}'
        self.keep = study['keep']

    def parse(self):
        """The options as train.py reads them. (YAML takes 1e-2 for a text.) Raises OptionError for what train.py would not take."""
        from lab.training.options import build_parser, complete

        try:
            parsed = build_parser(None).parse_args(flags(self.options))
            complete({name: value for name, value in vars(parsed).items() if value is not None})
        except OptionError as error:
            raise OptionError(f'{" ".join(flags(self.options))}: {error}') from None
        return parsed

    def log(self):
        """The lines of its log, so far."""
        try:
            return plot.read_log(self.folder)
        except UserError:  # none yet
            return []

    @property
    def failed(self):
        """Why it ended without a result; None if it didn't."""
        path = self.folder / FAILED
        return path.read_text().strip() if path.exists() else None

    def epochs(self):
        from lab.training.options import complete

        return complete(dict(self.options))['epochs']

    def stage(self):
        """The epoch to train to next: one whose checkpoint is to be kept, or the last."""
        return min([epoch for epoch in self.keep if epoch > len(self.log())] + [self.epochs()])

    def keep_checkpoint(self):
        """Where a stage has ended, unless that was done. (A process may have been killed between.)"""
        kept = self.folder / f'epoch{len(self.log())}.pt7'
        if len(self.log()) in self.keep and not kept.exists():
            part = kept.with_suffix('.part')
            shutil.copyfile(self.folder / 'model.pt7', part)
            part.rename(kept)

    def is_done(self):
        log = self.log()
        if not log:
            return bool(self.failed)
        from lab.training.options import FREE_ON_RESUME

        for name, value in self.options.items():
            if name not in FREE_ON_RESUME and log[-1].get(name) != value:
                raise UserError(
                    f'{self.folder} was run with --{name} {log[-1].get(name)}, and the study has {value}: move it away, or change the study'
                )
        return bool(self.failed) or log[-1]['epoch'] >= self.epochs()

    def command(self, device):
        options = {**self.options, **({'epochs': self.stage()} if self.keep else {})}
        folder = self.folder.relative_to(ROOT) if self.folder.is_relative_to(ROOT) else self.folder
        return [
            sys.executable,
            'train.py',
            *flags(options),
            *(['--device', device] if device else []),
            '--save',
            str(folder),
            '--resume',
            'auto',
        ]


def all_runs(study, seeds, dataset, folder):
    return [
        Run(study, row, seed, dataset, folder)
        for seed in seeds
        for options in study['runs']
        for row in expand(options)
    ]


def execute(runs, jobs, device):
    """Do what is not done yet, `jobs` at a time, with one progress bar over the epochs of all."""
    from tqdm import tqdm

    waiting = [one for one in runs if not one.is_done()]
    environment = {**os.environ}
    if jobs > 1:
        environment.setdefault('OMP_NUM_THREADS', str(max(1, (os.cpu_count() or 1) // jobs)))
    under_way = {}
    bar = tqdm(
        total=sum(one.epochs() for one in runs), unit='epoch', dynamic_ncols=True, disable=None
    )

    def show():
        bar.n = sum(one.epochs() if one.failed else len(one.log()) for one in runs)
        bar.set_postfix_str(
            ', '.join(
                str(one.folder.relative_to(one.folder.parent.parent)) for one in under_way.values()
            ),
            refresh=False,
        )
        bar.refresh()

    try:
        while waiting or under_way:
            while waiting and len(under_way) < jobs:
                one = waiting.pop(0)
                one.folder.mkdir(parents=True, exist_ok=True)
                one.keep_checkpoint()
                log = open(one.folder / 'output.txt', 'a')
                under_way[
                    subprocess.Popen(
                        one.command(device), cwd=ROOT, stdout=log, stderr=log, env=environment
                    )
                ] = one
            time.sleep(1)
            show()
            for process in [process for process in under_way if process.poll() is not None]:
                one = under_way.pop(process)
                output = (one.folder / 'output.txt').read_text().splitlines()
                if process.returncode == 0:
                    one.keep_checkpoint()
                    if not one.is_done():
                        waiting.insert(0, one)
                    continue
                last = next((line for line in reversed(output) if line.strip()), '')
                if (
                    'the loss is' not in last
                ):  # a result, too: it diverged. All else is a mistake to mend.
                    raise UserError(
                        f'{shlex.join(one.command(device)[1:])} ended with status {process.returncode}: {last}'
                    )
                (one.folder / FAILED).write_text(last + '\n')
    except (KeyboardInterrupt, SystemExit):
        print('\nstopped: the same command goes on', file=sys.stderr)
        raise
    finally:
        for process in under_way:  # they save, and go on next time
            process.send_signal(signal.SIGTERM)
        for process in under_way:
            process.wait()
        bar.close()


def collect(study, runs):
    """One dict for each row: its options, n, test error (median, least, most, in percent) and so on."""
    rows = {}
    for one in runs:
        rows.setdefault(json.dumps(one.row), []).append(one)
    found = []
    for group in rows.values():
        lines = [one.log()[-1] for one in group if one.log() and not one.failed]
        errors = [100 - line['test_acc'] for line in lines]
        times = [
            sum(line['train_time'] + line['test_time'] for line in one.log())
            for one in group
            if not one.failed and one.log()
        ]
        found.append(
            {
                **{
                    name: group[0].options.get(name, (lines or [{}])[0].get(name, ''))
                    for name in study['table']
                },
                'n': len(errors),
                'diverged': sum(bool(one.failed) for one in group),
                'error': median(errors) if errors else None,
                'least': min(errors, default=None),
                'most': max(errors, default=None),
                'train_error': median(100 - line['train_acc'] for line in lines) if lines else None,
                'parameters': lines[0]['n_parameters'] if lines else None,
                'seconds': median(times) if times else None,
                'preprocess': lines[0]['preprocess'] if lines else '',
                'reported': group[0].reported,
                'seeds': ' '.join(str(one.seed) for one in group),
                'errors': ' '.join(f'{error:.2f}' for error in errors),
            }
        )
    return found


def write_tables(study, rows, dataset, folder):
    with open(folder / 'table.csv', 'w', newline='') as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)

    def number(value, digits=2):
        return '' if value is None else f'{value:.{digits}f}'

    diverged, reported = any(row['diverged'] for row in rows), any(row['reported'] for row in rows)
    head = [
        *study['table'],
        'n',
        *(['diverged'] if diverged else []),
        'test error, %: median',
        'least',
        'most',
        'training error, %',
        'parameters',
        'seconds a run',
        *([study.get('reported', 'reported')] if reported else []),
    ]
    lines = [
        f'# {study["title"]}',
        '',
        f'`python -m tools.study studies/{study["name"]}.yaml{"" if dataset == study["dataset"] else f" --dataset {dataset}"}`: {dataset}, '
        f'preprocessing {rows[0]["preprocess"]}, seeds {rows[0]["seeds"]}; errors after the last epoch, medians over n seeds; every run has its log and '
        'command in a folder beside this file.',
        '',
        f'| {" | ".join(head)} |',
        f'|{" --- |" * len(head)}',
    ]
    for row in rows:
        cells = [
            *(str(row[name]) for name in study['table']),
            str(row['n']),
            *([str(row['diverged'])] if diverged else []),
            *(number(row[name]) for name in ('error', 'least', 'most', 'train_error')),
            f'{row["parameters"]:,}' if row['parameters'] else '',
            number(row['seconds'], 0),
            *([str(row['reported'])] if reported else []),
        ]
        lines.append(f'| {" | ".join(cells)} |')
    if study['note'] and dataset == study['dataset']:
        lines += ['', study['note'].strip()]
    (folder / 'table.md').write_text('\n'.join(lines) + '\n')


def seed_list(text):
    try:
        return [int(seed) for seed in text.split(',')]
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text} must be whole numbers, as 1,2,3') from None


def main(arguments=None):
    parser = OneLineParser(prog='-m tools.study', description=__doc__)
    parser.add_argument('study', metavar='STUDY.yaml', type=Path)
    parser.add_argument('--dataset', help='in place of its own')
    parser.add_argument('--dataroot', help='folder of the data')
    parser.add_argument('--device', help='as for train.py')
    parser.add_argument('--jobs', type=int, default=1, help='trainings at once (default 1)')
    parser.add_argument('--seeds', type=seed_list, help='in place of its own: 1,2,3')
    parser.add_argument('--out', type=Path, help='folder for all of it (default: see above)')
    parser.add_argument(
        '--table',
        action='store_true',
        help='only make table and figure anew, of the runs that are done',
    )
    args = parser.parse_args(arguments)
    if args.jobs < 1:
        raise OptionError(f'--jobs {args.jobs} must be at least 1')
    study = read(args.study)
    dataset = args.dataset or study['dataset']
    if args.out:
        folder = args.out.resolve()
    elif dataset == study['dataset']:  # what is committed is of the studies here alone
        folder = (
            ROOT
            / 'logs'
            / ('reference' if args.study.resolve().parent == ROOT / 'studies' else '')
            / f'study-{study["name"]}'
        )
    else:
        folder = ROOT / 'logs' / f'study-{study["name"]}-{dataset}'
    if args.dataroot:
        study['options']['dataroot'] = args.dataroot
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `execute` passes it on
    runs = all_runs(study, args.seeds or study['seeds'], dataset, folder)
    if not args.table:
        execute(runs, args.jobs, args.device)
    # The table is of all that is done, also of other seeds than were asked for now.
    seeds = sorted(
        {
            *study['seeds'],
            *(args.seeds or ()),
            *(
                int(match[1])
                for path in folder.glob('*/seed*')
                if (match := re.fullmatch(r'seed(\d+)', path.name))
            ),
        }
    )
    runs = [
        one
        for one in all_runs(study, seeds, dataset, folder)
        if one.folder.exists() and one.is_done()
    ]
    if not runs:
        raise UserError(f'{folder} has no finished runs yet')
    rows = collect(study, runs)
    write_tables(study, rows, dataset, folder)
    if study.get('figure', {}).get('signal'):
        from tools import propagation

        first = [one for one in runs if one.seed == runs[0].seed and not one.failed]
        if all((one.folder / 'model.pt7').exists() for one in first):
            propagation.report([one.folder for one in first], folder / 'figure', args.dataroot)
        else:  # committed are logs alone
            print(
                f'the figure of {folder} is left as it is: it is drawn of checkpoints, which are not there',
                file=sys.stderr,
            )
    elif 'figure' in study:
        plot.draw_study(study, rows, runs, folder / 'figure')
    print((folder / 'table.md').read_text())


if __name__ == '__main__':
    run(main, 'tools.study')

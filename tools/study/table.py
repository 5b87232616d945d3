"""The table of a study: table.csv and table.md."""

import csv
from statistics import median

from lab.data.names import display_name, percent, rounded
from lab.errors import UserError
from lab.runs.log import seconds, test_error, test_loss


def collect(study, runs):
    """One dict for each row of the table.

    It has the row's options, the test error (median, least and most, in percent) and more, all over
    the n runs that did not diverge; `diverged` counts the others.
    """
    groups = {}
    for one in runs:
        groups.setdefault(str(one.row), []).append(one)
    return [summarize(study, group) for group in groups.values()]


def summarize(study, group):
    """The row of runs that differ only in their seed."""
    logs = [one.log() for one in group if one.log() and not one.failed]
    last = [log[-1] for log in logs]
    first = last[0] if last else {}
    options = {**group[0].all_options, **first, **group[0].options}
    errors = [test_error(line) for line in last]
    return {
        **{name: options.get(name, '') for name in study.table},
        'n': len(errors),
        'diverged': sum(bool(one.failed) for one in group),
        'error': median_or_none(errors),
        'least': min(errors, default=None),
        'most': max(errors, default=None),
        'test_loss': median_or_none(list(map(test_loss, last))),
        'train_error': median_or_none([100 - line['train_acc'] for line in last]),
        'parameters': first.get('n_parameters'),
        'multiplications': first.get('n_multiplications'),
        'seconds': median_or_none([sum(map(seconds, log)) for log in logs]),
        'preprocess': first.get('preprocess', ''),
        'reported': group[0].reported,
        'seeds': ' '.join(str(one.seed) for one in group),
        'errors': ' '.join(f'{error:.2f}' for error in errors),
    }


def median_or_none(values):
    return median(values) if values else None


def write_tables(study, rows, dataset, folder, command):
    """Write table.csv and table.md, which names the command. Raises UserError if they cannot be
    written."""
    try:
        with open(folder / 'table.csv', 'w', newline='') as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        (folder / 'table.md').write_text(page(study, rows, dataset, command))
    except OSError as error:
        raise UserError(f'the table in {folder} cannot be written ({error.strerror})') from None


def page(study, rows, dataset, command):
    """The text of table.md: title, how it was made, table, and the note on the results."""
    dataroot = study.options.get('dataroot')
    name = display_name(dataset, dataroot) if dataroot else dataset
    lines = [
        f'# {study.title}',
        '',
        f'`{command}` makes this page and the files next to it.',
        f'Data set {name}, preprocessing {rows[0]["preprocess"]}, seeds {rows[0]["seeds"]}. '
        'Errors are those after the last epoch.',
        'The folders next to this file have the log and the command of each run.',
        '',
        *markdown_table(study, rows),
    ]
    if study.note and dataset == study.dataset:
        lines += ['', study.note.strip()]
    return '\n'.join(lines) + '\n'


def markdown_table(study, rows):
    """The lines of the table. Diverged runs, multiplications and reported numbers have a column if
    there are any."""
    columns = {name: [text_of(row[name]) for row in rows] for name in (*study.table, 'n')}
    if any(row['diverged'] for row in rows):
        columns['diverged'] = [str(row['diverged']) for row in rows]
    for heading, name, form in (
        (f'{study.tested} error, %: median', 'error', percent),
        ('min', 'least', percent),
        ('max', 'most', percent),
        (f'{study.tested} loss', 'test_loss', '{:.4f}'.format),
        ('training error, %', 'train_error', percent),
        ('parameters', 'parameters', '{:,}'.format),
        ('million multiplications', 'multiplications', lambda n: rounded(n / 1e6)),
        ('seconds per run', 'seconds', rounded),
    ):
        numbers = [row[name] for row in rows]
        if name != 'multiplications' or any(numbers):
            columns[heading] = ['' if value is None else form(value) for value in numbers]
    if any(row['reported'] for row in rows):
        columns[study.reported] = [str(row['reported']) for row in rows]
    lines = [columns, ['---'] * len(columns), *zip(*columns.values())]
    return [f'| {" | ".join(cells)} |' for cells in lines]


def text_of(value):
    """The value of an option as a short text."""
    if isinstance(value, list):
        return ','.join(text_of(one) for one in value)
    return f'{value:g}' if isinstance(value, float) else str('' if value is None else value)

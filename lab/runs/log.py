"""A run's log.txt: one self-contained line of JSON for each epoch."""

import json
from pathlib import Path

from lab.errors import UserError
from lab.files import size_of

LOG = 'log.txt'
PREFIX = 'json_stats: '
MEASURED = ('epoch', 'train_loss', 'train_acc', 'test_loss', 'test_acc')  # in each line


def format_line(stats):
    return PREFIX + json.dumps(stats)


def parse_line(line, place):
    """The dict in a line of a log; None for other lines, and for a truncated one. Raises UserError,
    which names the `place`, for another content.

    If a value is a list of top-1 and top-5, as in logs of the original code, it is top-1.
    """
    if not line.startswith(PREFIX):
        return None
    try:
        stats = json.loads(line.removeprefix(PREFIX))
    except ValueError:
        return None
    if not isinstance(stats, dict):
        raise UserError(f'{place} is not a line of a log: it has no dict after {PREFIX.strip()}')
    for name in MEASURED:
        value = stats.get(name)
        stats[name] = value[0] if isinstance(value, list) and value else value
        if not isinstance(stats[name], (int, float)):
            raise UserError(f'{place} is not a line of a log: {name} is {value!r}')
    return stats


def test_error(stats):
    """The test error of an epoch in percent: that of the moving averages, if there are any."""
    return 100 - stats.get('ema_test_acc', stats['test_acc'])


def test_loss(stats):
    """The test loss of an epoch: that of the moving averages, if there are any."""
    return stats.get('ema_test_loss', stats['test_loss'])


def seconds(stats):
    """The seconds of an epoch: of training and all tests."""
    return sum(stats.get(name, 0) for name in ('train_time', 'test_time', 'ema_test_time'))


# --- a log -----------------------------------------------------------------------------------


def log_file(path):
    """The log.txt of a run folder, or of a path that is a log already."""
    path = Path(path)
    return path / LOG if path.is_dir() else path


def read_lines(path):
    """The lines of a log.txt as pairs: the text, and the dict that `parse_line` finds in it. Raises
    UserError if the file cannot be read, or if a line has another form."""
    path = Path(path)
    try:
        size_of(path)
        lines = path.read_text('utf-8').splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, 'strerror', None) or 'not a text file'
        raise UserError(f'{path} cannot be read ({reason})') from None
    return [(line, parse_line(line, f'{path}, line {i + 1},')) for i, line in enumerate(lines)]


def read_log(path):
    """The epochs of a log as a list of dicts. `path` is a run folder or its log.txt. Raises
    UserError if there is none.

    Logs of the original code can be read too: their other lines are ignored.
    """
    path = log_file(path)
    epochs = [stats for _, stats in read_lines(path) if stats is not None]
    if not epochs:
        raise UserError(f'{path} is not a log of train.py: no line has {PREFIX.strip()} and a dict')
    return epochs

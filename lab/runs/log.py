"""A run's log.txt: one self-contained line of JSON for each epoch."""

import json
from pathlib import Path

from lab.errors import UserError

LOG = 'log.txt'
PREFIX = 'json_stats: '


def format_line(stats):
    return PREFIX + json.dumps(stats)


def parse_line(line):
    """The dict in a line of a log; None for other lines, and for a truncated one."""
    if not line.startswith(PREFIX):
        return None
    try:
        return json.loads(line.removeprefix(PREFIX))
    except ValueError:
        return None


def read_log(path):
    """The epochs of a log as a list of dicts. `path` is a run folder or its log.txt.

    Logs of the original code can be read too: their other lines are ignored, and if a value is a
    list of top-1 and top-5, top-1 is used.

    Raises:
        UserError: the file cannot be read, or has no line with `test_acc`.
    """
    path = Path(path)
    path = path / LOG if path.is_dir() else path
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, 'strerror', None) or 'not a text file'
        raise UserError(f'{path} cannot be read ({reason})') from None
    epochs = [stats for stats in map(parse_line, text.splitlines()) if stats is not None]
    if not epochs or 'test_acc' not in epochs[0]:
        raise UserError(f'{path} is not a log of train.py: no line has json_stats with test_acc')
    for stats in epochs:
        for key in ('train_loss', 'test_loss', 'train_acc', 'test_acc'):
            if isinstance(stats.get(key), list):
                stats[key] = stats[key][0]
    return epochs

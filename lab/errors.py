"""How a program ends on a user's mistake: one line on stderr, exit status 1 or 2, no traceback."""

import argparse
import contextlib
import errno
import os
import sys

LONGEST = 1000  # characters of an error line, which may quote a file
NO_MEMORY = "can't allocate memory"  # in the RuntimeError of PyTorch's allocator for the CPU
# What writing to a full or broken output raises. Errors that name a file are not among them.
FAILED_WRITES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)


class UserError(Exception):
    """Bad data, file or environment. The message is one line: the thing, its value, the remedy."""

    status = 1


class OptionError(UserError):
    """Options that are invalid or do not fit together."""

    status = 2


class OneLineParser(argparse.ArgumentParser):
    """A parser that raises OptionError, refuses abbreviated flags, and prints its description
    as written."""

    def __init__(self, prog, **kwargs):
        super().__init__(
            prog=f'python {prog}',
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **kwargs,
        )

    def parse_args(self, args=None, namespace=None):
        for argument in sys.argv[1:] if args is None else args:
            if argument.startswith('--') and argument.endswith('=--'):
                self.error(f'{argument}: -- is not a value')  # argparse would make it []
        return super().parse_args(args, namespace)

    def error(self, message):
        raise OptionError(f'{message} (see {self.prog} --help)')


def printable(text):
    """A text from outside, such as a file name, on one line: control characters are escaped."""
    return ''.join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def one_line(text):
    """A message as one line without control characters. A long one keeps its beginning, which names
    the thing, and its end, which has the remedy."""
    if len(text) > LONGEST:
        text = f'{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}'
    return printable(' '.join(text.split()))


def is_out_of_memory(error):
    if isinstance(error, MemoryError) or type(error).__name__ == 'OutOfMemoryError':  # of torch
        return True
    return isinstance(error, RuntimeError) and NO_MEMORY in str(error)


def run(main, name):
    """Run a program's `main()` and exit with its status."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors='backslashreplace')  # ASCII cannot print every name
    rank = os.environ.get('RANK', '0')  # set by torchrun
    if rank != '0':
        name += f' (rank {rank})'
    try:
        status = _status(main, name)
        sys.stdout.flush()
    except BrokenPipeError:  # the program that reads our output, such as head, has ended
        status = 1
        _discard_output()
    except OSError as error:
        if error.filename is not None or error.errno not in FAILED_WRITES:
            raise
        _print_error(name, f'the output cannot be written ({error.strerror})')
        status = 1
        _discard_output()
    if 'torch.distributed' in sys.modules and sys.modules['torch.distributed'].is_initialized():
        # The threads of gloo's connections would abort the process while it exits.
        os._exit(status or 0)
    sys.exit(status)


def _status(main, name):
    """The exit status of `main()`; prints the line of an error."""
    try:
        return main()
    except UserError as error:
        _print_error(name, str(error))
        return error.status
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        remedy = 'fewer or smaller images; in training, a smaller --batch_size or --width'
        _print_error(name, f'there is not enough memory: try {remedy}, or --recompute')
        return 1
    except KeyboardInterrupt:
        _print_error(name, 'interrupted')
        return 130
    except SystemExit as end:
        return end.code


def _print_error(name, message):
    # A single write: other processes may write at the same time.
    with contextlib.suppress(OSError):  # stderr cannot be written either
        sys.stderr.write(f'{name}: {one_line(message)}\n')


def _discard_output():
    """Write no more to stdout and stderr. Python would try again when it exits, and complain."""
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

"""How a program ends on a user's mistake: one line on stderr, exit status 1 or 2, no traceback."""

import argparse
import contextlib
import os
import sys


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

    def error(self, message):
        raise OptionError(f'{message} (see {self.prog} --help)')


def run(main, name):
    """Run a program's `main()` and exit with its status."""
    rank = os.environ.get('RANK', '0')  # set by torchrun
    if rank != '0':
        name += f' (rank {rank})'
    try:
        status = main()
    except UserError as error:
        # A single write: other processes may write at the same time.
        sys.stderr.write(f'{name}: {" ".join(str(error).split())}\n')
        status = error.status
    except BrokenPipeError:  # the program that reads our output, such as head, has ended
        sys.stderr.close()
        status = 1
    except KeyboardInterrupt:
        print(f'{name}: interrupted', file=sys.stderr)
        status = 130
    except SystemExit as end:
        status = end.code
    if _is_distributed():
        # The threads of gloo's connections would abort the process while it exits.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status or 0)
    sys.exit(status)


def _is_distributed():
    module = sys.modules.get('torch.distributed')  # do not import it just for this
    return module is not None and module.is_initialized()

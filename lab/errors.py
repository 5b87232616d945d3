"""How a user's mistake ends: one line on standard error, exit status 1 or 2, no traceback."""

import argparse
import os
import sys


class UserError(Exception):
    """Bad data, file or environment. The message names the thing, its value and the remedy, in one line."""

    status = 1


class OptionError(UserError):
    """A command line that can't be done."""

    status = 2


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are OptionErrors, and which takes no abbreviated flags; its description keeps its lines."""

    def __init__(self, **kwargs):
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs
        )

    def error(self, message):
        raise OptionError(f'{message} (see python {self.prog} --help)')


def run(main, name):
    """Run a program's `main()` and exit with its status."""
    if os.environ.get('RANK', '0') != '0':  # one of several processes that torchrun started
        name += f' (rank {os.environ["RANK"]})'
    try:
        status = main()
    except UserError as error:
        sys.stderr.write(
            f'{name}: {" ".join(str(error).split())}\n'
        )  # at once: other processes may write, too
        status = error.status
    except BrokenPipeError:  # the reader of our output (head, say) has seen enough
        sys.stderr.close()
        status = 1
    except KeyboardInterrupt:
        print(f'{name}: interrupted', file=sys.stderr)
        status = 130
    except SystemExit as end:
        status = end.code
    if 'torch.distributed' in sys.modules and sys.modules['torch.distributed'].is_initialized():
        # Threads of the connections to other processes, which nothing ends in time, would abort the process on its way out.
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                pass
        os._exit(status or 0)
    sys.exit(status)

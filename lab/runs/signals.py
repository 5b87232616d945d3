"""The signals that stop a run, and output that may go nowhere."""

import os
import signal
import time

from lab.distributed import say, under_torchrun
from lab.errors import UserError


class Stop:
    """Inside its `with`, SIGTERM, SIGINT and SIGHUP only leave their number in `signal`.

    A repetition is left unheard for some seconds: torchrun, and programs that pass signals on, send them twice. After that it ends the process.
    """

    DEAF = 5  # seconds

    def __enter__(self):
        self.signal, self.before, self.heard = 0, {}, None
        self.parent = os.getppid()
        for name in ('SIGTERM', 'SIGINT', 'SIGHUP'):
            number = getattr(signal, name, None)
            if number and signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
                try:
                    self.before[number] = signal.signal(number, self._note)
                except ValueError:  # not the main thread: signals are somebody else's
                    break
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        if self.heard is None:
            self.signal, self.heard = number, time.monotonic()
        elif time.monotonic() > self.heard + self.DEAF:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def leaving(self):
        """From now on no signal is heard: all is saved, and then the process ends."""
        for number in self.before:
            signal.signal(number, signal.SIG_IGN)

    def say(self, text):
        """Print, whatever becomes of the output: where nobody reads it any more, the run stops, as at a signal; a full disk is no reason to."""
        try:
            say(text)
        except BrokenPipeError:
            self.signal = self.signal or signal.SIGPIPE
        except OSError:
            pass

    def check_parent(self):
        """Raises UserError where torchrun, which started this process, is gone: another run may begin in this folder any time."""
        if under_torchrun() and os.getppid() != self.parent:
            raise UserError('torchrun is gone: the run stops')


def tell(text, file):
    """Print, if it can be."""
    try:
        print(text, file=file, flush=True)
    except OSError:
        pass

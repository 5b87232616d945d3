"""Signals that stop a run, and printing to an output that may have been closed."""

import contextlib
import os
import signal
import time

from lab.distributed import rank, say


class Stop:
    """From `listen()` to the end of its `with` block, SIGTERM, SIGINT and SIGHUP only set `signal`;
    the loop checks it. Before that they end the program.

    torchrun and other programs may send a signal twice, so a repeated signal is ignored for
    IGNORE_REPETITION seconds. After that, it ends the process.

    The first one is answered at once, because a step can take long. At the end of the block,
    `last_words` is printed: the progress bar has gone by then.
    """

    IGNORE_REPETITION = 5  # seconds

    def __enter__(self):
        self.signal, self.handlers, self.received_at = 0, {}, None
        self.last_words, self.lost_output = '', None
        return self

    def listen(self):
        for name in ('SIGTERM', 'SIGINT', 'SIGHUP'):
            number = getattr(signal, name, None)
            # nohup ignores a signal: leave it ignored.
            if number and signal.getsignal(number) is not signal.SIG_IGN:
                self.handlers[number] = signal.signal(number, self._receive)

    def __exit__(self, *_):
        if self.last_words:
            self.say(self.last_words)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _receive(self, number, frame):
        if self.received_at is None:
            self.signal, self.received_at = number, time.monotonic()
            if rank() == 0:
                with contextlib.suppress(OSError):  # print() may be what the signal interrupted
                    line_end = b'\n' if os.isatty(2) else b''  # of the progress bar
                    os.write(1, line_end + b'stopping after this step ...\n')
        elif time.monotonic() > self.received_at + self.IGNORE_REPETITION:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def ignore_signals(self):
        """From now on ignore all signals: the run saves, and then the process ends."""
        for number in self.handlers:
            signal.signal(number, signal.SIG_IGN)

    def say(self, text):
        """Print, in rank 0 only.

        If the program that reads the output has ended, the run stops as after a signal. A full disk
        does not stop it, but is remembered in `lost_output`.
        """
        try:
            say(text)
        except BrokenPipeError:
            self.signal = self.signal or signal.SIGPIPE
        except OSError as error:
            self.lost_output = error.strerror

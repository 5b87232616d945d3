"""A run's folder: its lock, and writing to it so that nothing is lost.

model.pt7       the newest checkpoint; previous.pt7: the one before it (see checkpoint.py)
log.txt         a line of JSON per epoch (see log.py)
run.json        the command, versions and machine of each start of the run
parameters.txt  name, shape and weight decay of all parameters
report.html     a page about the network, with --report
output.txt      what the run prints, if tools.study started it
"""

import contextlib
import json
import os
import shlex
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

from lab.data.names import display_name
from lab.distributed import from_first, rank
from lab.errors import OptionError, UserError, printable
from lab.files import make_folder, size_of, write_atomically
from lab.runs import checkpoint
from lab.runs.log import LOG, read_lines
from lab.runs.provenance import CHECKOUT, describe_start
from lab.runs.tensorboard import write_events
from lab.training.optimizers import parameter_table

COMMANDS, OUTPUT, PARAMETERS = 'run.json', 'output.txt', 'parameters.txt'
REPORT = 'report.html'
# Files that may be there before a run starts; volumes have hidden ones and lost+found.
NOT_OTHERS = (OUTPUT, f'{COMMANDS}.', '.', 'lost+found')


class RunFolder:
    """The folder of a run. Only rank 0 writes to it, and only one training at a time.

    Use it in this order: `lock` an existing folder before reading from it, `choose_path` which
    folder it is, `open` it once nothing else can go wrong, write to it, `finish`.

    A failed write is reported. It ends the run only if there is no checkpoint yet.
    """

    PATIENCE = 15  # seconds to wait for the processes of a run that was just killed

    def __init__(self, cli_options):
        """cli_options: the options of the command line; `save` or `resume` names the folder."""
        self.path = None
        if 'save' in cli_options:
            self.path = Path(cli_options['save']).expanduser()
        elif 'resume' in cli_options:
            path = Path(cli_options['resume']).expanduser()
            self.path = path if path.is_dir() else path.parent
        self.faults = []  # messages about files that could not be written
        self.last_save = None  # the newest good checkpoint, in words
        self.keep_previous = True
        self.handle = None  # of the locked folder

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    # --- which folder, and whether this process may write to it ---

    def lock(self):
        """Lock the folder if it exists. Raises UserError if another process trains in it."""
        if rank() > 0 or self.handle is not None or not self.path or not self.path.is_dir():
            return
        try:
            self.handle = os.open(self.path, os.O_RDONLY)
        except OSError:
            return  # the first write will report the missing permission
        deadline = time.monotonic() + self.PATIENCE
        while not _try_to_lock(self.handle):
            if time.monotonic() > deadline:
                raise UserError(
                    f'another process is training in {self.path}: wait for it, or stop it'
                )
            time.sleep(0.1)

    def choose_path(self, options, resumed):
        """Choose the folder for these options, and put it into them as `save`.

        Raises OptionError if it has another run, or files that are no run's.
        """
        own = _own_folder(resumed)
        if 'save' in options:
            path = Path(options['save']).expanduser()
        elif own and (own / COMMANDS).exists():  # a copied checkpoint has none next to it
            path = own
        else:
            path = Path('logs') / _new_name(options)
        if path != self.path:
            self.close()
            self.path = path
        self.continues = own is not None and path.exists() and path.samefile(own)
        if resumed and resumed.is_run:
            self.last_save = f'{resumed.path}, saved after {resumed.position}'
            # A broken newest checkpoint must not replace the good previous one.
            self.keep_previous = resumed.path.name != checkpoint.PREVIOUS
        from_first(self._check_content)
        options.pop('resume', None)
        options['save'] = str(self.path)

    def _check_content(self):
        if rank() > 0 or self.continues or not self.path.is_dir():
            return
        try:
            names = set(os.listdir(self.path))
        except OSError as error:
            raise UserError(f'--save {self.path} cannot be read ({error.strerror})') from None
        # A run that was stopped before its first checkpoint has one line in its log at most, and
        # starts anew.
        has_log = LOG in names and (self.path / LOG).read_bytes().count(b'\n') > 1
        if has_log or {checkpoint.FILE_NAME, checkpoint.PREVIOUS} & names:
            raise OptionError(
                f'{self.path} already has a run; resume it with --resume {self.path}, or choose '
                'another --save'
            )
        # run.json is the first file that a run writes.
        others = sorted(name for name in names if not name.startswith(NOT_OTHERS))
        if others and read_commands(self.path / COMMANDS) is None:
            raise OptionError(
                f'--save {self.path} has other files than those of a run, such as {others[0]}: '
                'choose a new or empty folder'
            )

    def open(self, arguments, device, module, options, resumed):
        """Make the folder, lock it, and begin to write: how the run was started, the table of its
        parameters, and its log up to where it resumes. Returns the lines of that log."""
        if rank() == 0:
            self._make()
            earlier = read_commands(self.path / COMMANDS) or []
            starts = [*earlier, describe_start(arguments, device)]
            self.write(COMMANDS, json.dumps(starts, indent=1) + '\n')
        table = parameter_table(module, options['weight_decay'], options['model'])
        self.write(PARAMETERS, '\n'.join(table) + '\n')
        log = log_lines(resumed)
        self.write_log(log)
        return log

    def _make(self):
        try:
            make_folder(self.path)
        except OSError as error:
            raise UserError(f'--save {self.path} cannot be created ({error.strerror})') from None
        if self.handle is None:
            self.lock()
            self._check_content()  # another process may have started one in the meantime
        for name in (checkpoint.FILE_NAME, LOG, COMMANDS):  # left by a killed process
            for leftover in self.path.glob(f'{name}.*.tmp'):
                self._try(leftover.name, leftover.unlink)

    def close(self):
        if self.handle is not None:
            os.close(self.handle)
            self.handle = None

    # --- writing ---

    def _try(self, name, write):
        """Call write() in rank 0; report and record an OSError. Returns whether it succeeded."""
        if rank() > 0:
            return False
        try:
            write()
        except OSError as error:
            fault = f'{self.path / name} cannot be written ({error.strerror})'
            if not self.last_save:
                raise UserError(f'{fault}, and there is no checkpoint yet: the run stops') from None
            self.faults.append(fault)
            message = f'{fault}; training continues; the last checkpoint is {self.last_save}'
            with contextlib.suppress(OSError):  # the output may be on the same disk
                print(message, file=sys.stderr, flush=True)
            return False
        return True

    def write(self, name, text):
        self._try(name, lambda: write_atomically(self.path / name, text.encode()))

    def write_log(self, lines):
        self.write(LOG, ''.join(f'{line}\n' for line in lines))

    def save(self, content, position):
        """Write a checkpoint of this position in the training."""
        path = self.path / checkpoint.FILE_NAME
        if self._try(path.name, lambda: checkpoint.save(path, content, self.keep_previous)):
            self.last_save, self.keep_previous = f'{path}, saved after {position}', True

    def write_events(self, stats):
        """Write the numbers of an epoch for TensorBoard."""
        self._try('events.out.tfevents', lambda: write_events(self.path, stats))

    def finish(self, stop):
        """Say that the run is done. Raises UserError if anything could not be written."""
        if self.faults:
            raise UserError(
                f'{len(self.faults)} writes failed; the first: {self.faults[0]}; '
                f'the last checkpoint is {self.last_save}'
            )
        curves = f'python -m tools.plot {shlex.quote(str(self.path))} --out curves.png'
        stop.say(f'done: {printable(str(self.path))}; to draw its curves: {curves}')
        if stop.lost_output:
            raise UserError(f'the output cannot be written ({stop.lost_output}); the run is done')


def read_commands(path):
    """The content of a run.json; None if it is missing or has another form."""
    try:
        size_of(path)
        entries = json.loads(path.read_text('utf-8'))
        return entries if all('command' in entry for entry in entries) else None
    except (OSError, ValueError, TypeError):
        return None


def write_report(path, dataroot):
    """Write the report.html of a finished run. Returns its path. Raises UserError.

    tools/ may import this package, and not the other way round, so this starts a process.
    """
    out = path / REPORT
    command = [sys.executable, '-m', 'tools.report', str(path.resolve()), '--out']
    command += [str(out.resolve()), '--dataroot', str(Path(dataroot).expanduser().resolve())]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().rpartition('\n')[2]
        raise UserError(f'{out} cannot be written ({reason}); the run is done')
    return out


def _try_to_lock(handle):
    """Whether the folder is locked now, or cannot be locked on this system."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        pass
    return True


def _own_folder(resumed):
    """The folder of a run's checkpoint; None if its name shows that it is a copy, or no run's."""
    names = (checkpoint.FILE_NAME, checkpoint.PREVIOUS)
    is_own = resumed and resumed.is_run and resumed.path.name in names
    return resumed.path.parent if is_own else None


def _new_name(options):
    """DATASET-MODEL-DEPTH-WIDTH-TIME."""
    data = display_name(options['dataset'], options['dataroot'])
    name = f'{data}-{options["model"]}-{options["depth"]}-{options["width"]:g}'
    return f'{name}-{datetime.now():%Y%m%d-%H%M%S}'


def log_lines(resumed):
    """The lines of a resumed run's log, up to where it resumes."""
    if not resumed or not resumed.is_run:
        return []
    if resumed.log is not None:
        return list(resumed.log)
    path = resumed.path.parent / LOG  # checkpoints of the original code do not contain the log
    lines = read_lines(path) if path.exists() else []
    return [line for line, stats in lines if (stats or {}).get('epoch', 0) <= resumed.epoch]

"""A run's folder, written so that nothing is lost, and the signals that stop a run.

    model.pt7     the newest checkpoint; previous.pt7 the one before it (see checkpoint.py)
    log.txt       a line of JSON for each epoch
    run.json      how the run was called, each time, and on what
"""
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import torch

import checkpoint
from distributed import launched_here, local_world, rank, say, world
from errors import OptionError, UserError

LOG, COMMANDS = 'log.txt', 'run.json'


def find(given):
    """The checkpoint that --resume asks for; None for none, and where `--resume auto` finds none under --save."""
    if 'resume' not in given:
        return None
    if given['resume'] != 'auto':
        return checkpoint.load(given['resume'])
    if 'save' not in given:
        raise OptionError('--resume auto looks for a run in the folder of --save: give --save, too')
    folder = Path(given['save']).expanduser()
    there = any((folder / name).exists() for name in (checkpoint.FILE_NAME, checkpoint.PREVIOUS))
    return checkpoint.load(folder) if there else None


def resume_command(options, folder):
    """The command line that goes on with a run, on the devices that it had."""
    flags = ['--resume', str(folder.path)]
    for name in ('device', 'gpu_id'):
        if options.get(name) is not None:
            flags += [f'--{name}', str(options[name])]
    if options.get('cuda'):
        flags.append('--cuda')
    if world() == 1:
        return shlex.join(['python', 'train.py', *flags])
    if launched_here():
        return shlex.join(['python', 'train.py', *flags, '--ngpu', str(world())])
    nodes = world() // local_world()
    return ('torchrun ' + (f'--nnodes={nodes} (and the same rendezvous) ' if nodes > 1 else '') + f'--nproc_per_node={local_world()} '
            + shlex.join(['train.py', *flags]))


class RunFolder:
    """The folder of a run, where only rank 0 writes. What can't be written is said, and ends the run only if it has no checkpoint to go
    back to; `faults` has all such."""
    PATIENCE = 15  # seconds, for the processes of a run that was just killed to be gone

    def __init__(self, options, resumed, auto=False):
        name = f'logs/{options["dataset"]}-{options["model"]}-{options["depth"]}-{options["width"]:g}-{datetime.now():%Y%m%d-%H%M%S}'
        self.path = Path(options.get('save') or (resumed.path.parent if resumed and resumed.is_run else name)).expanduser()
        self.faults, self.stands, self.keep = [], None, True
        if resumed and resumed.is_run:
            self.stands = f'{resumed.path}, saved after {resumed.place}'
            self.keep = resumed.path.name != checkpoint.PREVIOUS  # else the newest is broken, and must not take the good one's place
        if rank() > 0:
            return
        own = resumed and resumed.is_run and self.path.exists() and self.path.samefile(resumed.path.parent)
        if not own:
            for file in ((checkpoint.FILE_NAME,) if auto else (LOG, checkpoint.FILE_NAME)):  # killed before its first checkpoint: begun anew
                if (self.path / file).exists():
                    raise OptionError(f'{self.path} holds a run already; --resume {self.path} goes on with it, another --save makes a new one')

    def open(self):
        """Make the folder, and see that no other process trains in it."""
        if rank() > 0:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f'--save {self.path} can not be made ({error.strerror})') from None
        try:
            import fcntl
        except ImportError:  # not on this system
            return
        self.handle = os.open(self.path, os.O_RDONLY)
        for attempt in range(int(10 * self.PATIENCE)):
            try:
                return fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.1)
            except OSError:  # a file system without locks
                return
        raise UserError(f'another process is training in {self.path}; wait for it, or stop it')

    def close(self):
        if hasattr(self, 'handle'):
            os.close(self.handle)

    def _try(self, name, write):
        try:
            write()
            return True
        except OSError as error:
            fault = f'{self.path / name} can not be written ({error.strerror})'
            if not self.stands:
                raise UserError(f'{fault}, and there is no checkpoint yet: the run stops') from None
            self.faults.append(fault)
            print(f'{fault}; training goes on, and {self.stands} stands', file=sys.stderr, flush=True)
            return False

    def write(self, name, text):
        if rank() == 0:
            self._try(name, lambda: checkpoint.write(self.path / name, text.encode()))

    def save(self, content, place):
        if rank() == 0:
            path = self.path / checkpoint.FILE_NAME
            if self._try(path.name, lambda: checkpoint.save(path, content, self.keep)):
                self.stands, self.keep = f'{path}, saved after {place}', True

    def read_log(self, resumed):
        """The lines of the run that goes on, up to where it does."""
        if not resumed or not resumed.is_run:
            return []
        if resumed.log is not None:
            return list(resumed.log)
        path = resumed.path.parent / LOG  # a checkpoint that doesn't hold them
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if json.loads(line.removeprefix('json_stats: '))['epoch'] <= resumed.epoch]

    def record_command(self, arguments, device):
        """Append to run.json how this run was called, and on what: command, versions, commit, device, processes and threads of each."""
        if rank() > 0:
            return
        here = Path(__file__).resolve().parent
        try:
            commit = subprocess.run(['git', 'describe', '--always', '--dirty', '--abbrev=40'], cwd=here, capture_output=True,
                                    text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            commit = None  # not a checkout, or no git
        from importlib.metadata import version
        packages = ('torch', 'torchvision', 'torchnet', 'opencv-python', 'tqdm', 'numpy')
        entry = {'command': shlex.join(['python', 'train.py', *arguments]), 'time': datetime.now().isoformat(timespec='seconds'),
                 'commit': commit, 'python': platform.python_version(), 'versions': {name: version(name) for name in packages},
                 'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else f'{device.type} ({platform.machine()})',
                 'processes': world(), 'threads': torch.get_num_threads()}
        path = self.path / COMMANDS
        try:
            entries = json.loads(path.read_text())
        except (OSError, ValueError):
            entries = []
        self.write(COMMANDS, json.dumps([*entries, entry], indent=1) + '\n')

    def finish(self):
        """Say that the run is at its end. Raises UserError where something could not be written."""
        if self.faults:
            raise UserError(f'{len(self.faults)} times a file could not be written, at first: {self.faults[0]}; {self.stands} stands')
        say(f'done: {self.path}')


class Stop:
    """Inside its `with`, SIGTERM and SIGINT only leave their number in `signal`; a second one is not waited with."""

    def __enter__(self):
        self.signal = 0
        self.before = {}
        self.parent = os.getppid()
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self.before[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread: signals are somebody else's
                break
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        self.signal = number
        signal.signal(number, self.before[number])

    def check_parent(self):
        """Raises UserError where torchrun, which started this process, is gone: another run may begin in this folder any time."""
        if world() > 1 and os.getppid() != self.parent:
            raise UserError('torchrun is gone: the run stops')

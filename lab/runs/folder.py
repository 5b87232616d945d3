"""A run's folder, written so that nothing is lost, and the signals that stop a run.

model.pt7     the newest checkpoint; previous.pt7 the one before it (see checkpoint.py)
log.txt       a line of JSON for each epoch
run.json      how the run was called, each time, and on what
"""

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import torch

from lab.runs import checkpoint
from lab.runs.signals import tell
from lab.distributed import launched_here, local_world, rank, world
from lab.errors import OptionError, UserError
from lab.files import write_atomically

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
    return (
        'torchrun '
        + (f'--nnodes={nodes} (and the same rendezvous) ' if nodes > 1 else '')
        + f'--nproc_per_node={local_world()} '
        + shlex.join(['train.py', *flags])
    )


class RunFolder:
    """The folder of a run, where only rank 0 writes, and no other training meanwhile. What can't be written is said, and ends the run only if it
    has no checkpoint to go back to; `faults` has all such.

    First of all it is locked, if it is there, then what it holds is looked at (`lock`, `settle`); it is made when all else is clear (`open`).
    """

    PATIENCE = 15  # seconds, for the processes of a run that was just killed to be gone

    def __init__(self, given):
        resume = given.get('resume')
        self.path = Path(given['save']).expanduser() if 'save' in given else None
        if not self.path and resume:
            self.path = Path(resume).expanduser()
            self.path = self.path if self.path.is_dir() else self.path.parent
        self.faults, self.stands, self.keep, self.handle = [], None, True, None

    def lock(self):
        """See that no other process trains in the folder, if there is one. Raises UserError."""
        if rank() > 0 or self.handle is not None or not self.path or not self.path.is_dir():
            return
        try:
            import fcntl

            self.handle = os.open(self.path, os.O_RDONLY)
        except (
            ImportError,
            OSError,
        ):  # not on this system; or not for this user, which will be said when something is written
            return
        for attempt in range(1 + int(10 * self.PATIENCE)):
            try:
                return fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.1)
            except OSError:  # a file system without locks
                return
        raise UserError(f'another process is training in {self.path}; wait for it, or stop it')

    def settle(self, options, resumed, auto):
        """The folder that it is, for these options. Raises OptionError where it holds another run."""
        own = (
            resumed
            and resumed.is_run
            and resumed.path.name in (checkpoint.FILE_NAME, checkpoint.PREVIOUS)
        )
        if 'save' in options:
            path = Path(options['save']).expanduser()
        elif (
            own and (resumed.path.parent / COMMANDS).exists()
        ):  # not a copy, which may lie anywhere
            path = resumed.path.parent
        else:
            path = Path(
                f'logs/{options["dataset"]}-{options["model"]}-{options["depth"]}-{options["width"]:g}-{datetime.now():%Y%m%d-%H%M%S}'
            )
        if path != self.path:
            self.close()
            self.path = path
        self.goes_on = own and path.exists() and path.samefile(resumed.path.parent)
        self.auto = auto
        if resumed and resumed.is_run:
            self.stands = f'{resumed.path}, saved after {resumed.place}'
            self.keep = (
                resumed.path.name != checkpoint.PREVIOUS
            )  # else the newest is broken, and must not take the good one's place
        self.refuse_another()

    def refuse_another(self):
        """Raises OptionError where the folder holds another run. (One that was killed before its first checkpoint is begun anew by auto.)"""
        if rank() == 0 and not self.goes_on:
            for file in (checkpoint.FILE_NAME,) if self.auto else (LOG, checkpoint.FILE_NAME):
                if (self.path / file).exists():
                    raise OptionError(
                        f'{self.path} holds a run already; --resume {self.path} goes on with it, another --save makes a new one'
                    )

    def open(self):
        """Make the folder."""
        if rank() > 0:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f'--save {self.path} can not be made ({error.strerror})') from None
        if self.handle is None:
            self.lock()
            self.refuse_another()  # which another process may have made, and finished, since

    def close(self):
        if self.handle is not None:
            os.close(self.handle)
            self.handle = None

    def _try(self, name, write):
        try:
            write()
            return True
        except OSError as error:
            fault = f'{self.path / name} can not be written ({error.strerror})'
            if not self.stands:
                raise UserError(f'{fault}, and there is no checkpoint yet: the run stops') from None
            self.faults.append(fault)
            tell(f'{fault}; training goes on, and {self.stands} stands', sys.stderr)
            return False

    def write(self, name, text):
        if rank() == 0:
            self._try(name, lambda: write_atomically(self.path / name, text.encode()))

    def save(self, content, place):
        if rank() == 0:
            path = self.path / checkpoint.FILE_NAME
            if self._try(path.name, lambda: checkpoint.save(path, content, self.keep)):
                self.stands, self.keep = f'{path}, saved after {place}', True

    def write_events(self, stats):
        """The numbers of an epoch for TensorBoard."""
        if rank() > 0:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                '--tensorboard needs a package that is not there; pip install tensorboard'
            ) from None

        def write():
            # Opened for each epoch: of a run that was killed, what is behind the epoch that it goes on with is hidden.
            with SummaryWriter(str(self.path), purge_step=stats['epoch']) as writer:
                for part in ('train', 'test'):
                    for name in ('loss', 'acc', 'top5', 'time'):
                        writer.add_scalar(f'{name}/{part}', stats[f'{part}_{name}'], stats['epoch'])

        self._try('events.out.tfevents', write)

    def read_log(self, resumed):
        """The lines of the run that goes on, up to where it does."""
        if not resumed or not resumed.is_run:
            return []
        if resumed.log is not None:
            return list(resumed.log)
        path = resumed.path.parent / LOG  # a checkpoint that doesn't hold them
        lines = path.read_text().splitlines() if path.exists() else []
        return [
            line
            for line in lines
            if json.loads(line.removeprefix('json_stats: '))['epoch'] <= resumed.epoch
        ]

    def record_command(self, arguments, device):
        """Append to run.json how this run was called, and on what: command, versions, commit, device, processes and threads of each."""
        if rank() > 0:
            return
        here = Path(__file__).resolve().parent.parent.parent
        try:
            commit = subprocess.run(
                ['git', 'describe', '--always', '--dirty', '--abbrev=40'],
                cwd=here,
                capture_output=True,
                text=True,
                check=True,
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            commit = None  # not a checkout, or no git
        from importlib.metadata import PackageNotFoundError, version

        def version_of(name):
            try:
                return version(name)
            except PackageNotFoundError:  # under another name
                return None

        packages = ('torch', 'torchvision', 'torchnet', 'opencv-python', 'tqdm', 'numpy')
        entry = {
            'command': shlex.join(['python', 'train.py', *arguments]),
            'time': datetime.now().isoformat(timespec='seconds'),
            'commit': commit,
            'python': platform.python_version(),
            'versions': {name: version_of(name) for name in packages},
            'device': torch.cuda.get_device_name(device)
            if device.type == 'cuda'
            else f'{device.type} ({platform.machine()})',
            'processes': world(),
            'threads': torch.get_num_threads(),
        }
        path = self.path / COMMANDS
        try:
            entries = json.loads(path.read_text())
        except (OSError, ValueError):
            entries = []
        self.write(COMMANDS, json.dumps([*entries, entry], indent=1) + '\n')

    def finish(self):
        """Raises UserError where something could not be written."""
        if self.faults:
            raise UserError(
                f'{len(self.faults)} times a file could not be written, at first: {self.faults[0]}; {self.stands} stands'
            )

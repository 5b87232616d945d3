"""Where a run comes from: its command, the commit, the versions, the machine."""

import platform
import shlex
import subprocess
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from lab.distributed import world

CHECKOUT = Path(__file__).resolve().parents[2]
PACKAGES = ('torch', 'torchvision', 'torchnet', 'opencv-python', 'tqdm', 'numpy')


def describe_start(arguments, device):
    """The entry of run.json for a start of train.py with these arguments."""
    name = f'{device.type} ({platform.machine()})'
    if device.type == 'cuda':
        name = torch.cuda.get_device_name(device)
    return {
        'command': shlex.join(['python', 'train.py', *arguments]),
        'time': datetime.now().isoformat(timespec='seconds'),
        'commit': _commit(),
        'python': platform.python_version(),
        'versions': versions(PACKAGES),
        'device': name,
        'processes': world(),
        'threads': torch.get_num_threads(),
    }


def versions(packages):
    """{package: its version, or None if it is not installed under this name}."""
    return {package: _version(package) for package in packages}


def _commit():
    """The commit of this checkout, with -dirty if tracked files outside logs/ differ from it; None
    without git."""
    try:
        commit = _git('rev-parse', 'HEAD')
        changed = _git('status', '--porcelain', '--untracked-files=no', '--', '.', ':!logs')
    except (OSError, subprocess.CalledProcessError):
        return None
    return f'{commit}-dirty' if changed else commit


def _git(*arguments):
    """What a git command prints."""
    command = ['git', *arguments]
    return subprocess.check_output(
        command, cwd=CHECKOUT, text=True, stderr=subprocess.DEVNULL
    ).strip()


def _version(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None

"""Paths on a command line, reading regular files only, writing files atomically, and where to
cache what was computed."""

import argparse
import contextlib
import errno
import os
import stat
from hashlib import sha256
from pathlib import Path

from lab.errors import UserError


def path_argument(text):
    """The path of a file or folder, as written."""
    try:
        if not text.strip():
            raise ValueError('it is empty')
        os.lstat(Path(text).expanduser())
    except (ValueError, RuntimeError) as error:  # a NUL character; no such user after ~
        raise argparse.ArgumentTypeError(f'{text!r} is not a path: {error}') from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise argparse.ArgumentTypeError(f'{text} is too long for a path') from None
    return text


def size_of(path):
    """The size of a regular file in bytes. Raises OSError if it is missing, or is a folder, a pipe
    or a device.

    Ask for it before opening a file that a user names: opening a pipe would wait for its writer.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, 'not a regular file', str(path))
    return status.st_size


def write_atomically(path, content, keep_previous_as=None):
    """Write bytes to a file so that at any moment it has its old or its new content.

    The bytes go to a temporary file in the same folder, which is synced to disk and then renamed.
    After an OSError, the file is unchanged, and the temporary file is removed.

    Args:
        keep_previous_as: the path to rename the existing file to, just before; for a moment, only
            that path exists.
    """
    path = Path(path)
    # Several processes may write the same file at once.
    temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
    try:
        with open(temporary, 'wb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep_previous_as and path.exists():
            os.replace(path, keep_previous_as)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # not every system can sync a folder
        handle = os.open(path.parent, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def make_folder(path):
    """Make a folder and those above it. Raises OSError, whose `strerror` names what is in the way
    if that is a file or a broken link."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        taken = Path(error.filename)
        what = 'not a folder' if taken.exists() else f'a broken link to {os.readlink(taken)}'
        raise FileExistsError(error.errno, f'{taken} is {what}', str(taken)) from None


def write_output(path, content):
    """`write_atomically` to a file that a user named; its folders are made. Raises UserError."""
    path = Path(path).expanduser()
    try:
        make_folder(path.parent)
        write_atomically(path, content)
    except OSError as error:
        raise UserError(f'{path} cannot be written ({error.strerror})') from None


def cache_path(root, name):
    """Where to cache what was computed from the data in `root`: in that folder, or in the user's
    cache if the folder is missing or read-only."""
    if os.access(root, os.W_OK):
        return Path(root) / name
    cache = Path(os.environ.get('XDG_CACHE_HOME', '~/.cache')).expanduser() / 'diracnets'
    return cache / f'{sha256(os.fsencode(Path(root).resolve())).hexdigest()[:16]}-{name}'

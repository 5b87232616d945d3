"""Writing files atomically, and where to cache what was computed from data."""

import contextlib
import os
from hashlib import sha256
from pathlib import Path


def write_atomically(path, content, keep_previous_as=None):
    """Write bytes to a file so that at any moment it has its old or its new content.

    The bytes go to a temporary file in the same folder, which is synced to disk and then renamed.

    Args:
        keep_previous_as: the path to rename the existing file to, just before; for a moment, only
            that path exists.

    Raises:
        OSError: the file is unchanged, and the temporary file is removed.
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
        _sync_folder(path.parent)


def _sync_folder(folder):
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cache_path(root, name):
    """Where to cache what was computed from the data in `root`: in that folder, or in the user's
    cache if the folder is missing or read-only."""
    if os.access(root, os.W_OK):
        return Path(root) / name
    cache = Path(os.environ.get('XDG_CACHE_HOME', '~/.cache')).expanduser() / 'diracnets'
    return cache / f'{sha256(os.fsencode(Path(root).resolve())).hexdigest()[:16]}-{name}'

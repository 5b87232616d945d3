"""Files that are written whole or not at all, and where computed ones are kept."""

import os
from pathlib import Path


def write_atomically(path, content, previous=None):
    """Write a file's bytes whole or not at all: to a temporary file beside it, flushed to the disk, then renamed. What was there
    before becomes `previous`, if given."""
    path = Path(path)
    temporary = path.with_name(path.name + '.tmp')
    try:
        with open(temporary, 'wb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)  # a full disk has room again for others
        raise
    try:  # the renaming to the disk, too, where a system can
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError:
        pass


def cache_path(root, name):
    """Where to keep what was computed from the data at root: beside the data, or in the user's cache if that is read-only."""
    if os.access(root, os.W_OK):
        return Path(root) / name
    from hashlib import sha256

    folder = Path(os.environ.get('XDG_CACHE_HOME', '~/.cache')).expanduser() / 'diracnets'
    return folder / f'{sha256(os.fsencode(Path(root).resolve())).hexdigest()[:16]}-{name}'

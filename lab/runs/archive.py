"""Reading a file that torch.save or safetensors wrote, without trusting it: no code runs, the
checksums of torch.save must fit (safetensors has none)."""

import errno
import os
import re
import warnings
from zipfile import ZIP_STORED, ZipFile, is_zipfile

import torch

from lab.errors import UserError
from lab.files import size_of

# What torch.load says of a file that contains more than tensors and plain values.
REFUSED = 'GLOBAL |Can only (create|build)|unrecognized function'
LOADABLE = (
    'pass a run folder, a .pth or .safetensors file, digits or fashion (only tools.predict reads '
    '.onnx)'
)


class BrokenFile(UserError):
    """A file that is missing, damaged, or of another kind."""


def read_archive(path):
    """The content of a file in PyTorch's zip format, in its older format, or of safetensors.

    Raises:
        BrokenFile: the file is missing, truncated or damaged, or of another kind.
        UserError: loading the file could run code, or needs a package that is not installed.
    """
    try:
        size_of(path)
        with open(path, 'rb') as file, warnings.catch_warnings():
            warnings.simplefilter('ignore')  # about tensors that are refused later
            if is_zipfile(file):
                _check_zip(file)
            file.seek(0)
            if file.read(9)[8:] == b'{':  # after the length of its header, which is JSON
                return _read_safetensors(file)
            file.seek(0)
            return torch.load(file, map_location='cpu', weights_only=True)
    except (MemoryError, UserError):
        raise
    except FileNotFoundError:
        raise BrokenFile(f'{path} does not exist; {LOADABLE}') from None
    except Exception as error:  # there are many types for truncated or random files
        if re.search(REFUSED, str(error)):
            raise UserError(
                f'{path} is refused: it contains more than tensors and plain values, so loading it '
                'could run code'
            ) from None
        reason = getattr(error, 'strerror', None) or type(error).__name__
        raise BrokenFile(
            f'{path} cannot be read as a PyTorch checkpoint ({reason}): it may be truncated, '
            f'damaged or of another kind; {LOADABLE}'
        ) from None


def _read_safetensors(file):
    try:
        from safetensors.torch import load
    except ImportError:
        raise UserError(
            f'{file.name} is a file of safetensors: install the package safetensors to read it'
        ) from None
    file.seek(0)
    return load(file.read())


def _check_zip(file):
    """Raise OSError unless a zip archive can be from torch.save, and fits its checksums, which
    torch.load does not compare."""
    with ZipFile(file) as archive:
        parts = archive.infolist()
        # torch.save does not compress. An archive whose parts are larger than the file is not from
        # torch.save, and could fill the memory.
        compressed = any(part.compress_type != ZIP_STORED for part in parts)
        size = sum(part.file_size for part in parts)
        if compressed or size > os.fstat(file.fileno()).st_size:
            raise OSError(errno.EINVAL, 'it is compressed')
        if wrong := archive.testzip():
            raise OSError(errno.EINVAL, f'the checksum of its part {wrong} is wrong')

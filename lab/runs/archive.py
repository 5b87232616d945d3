"""Reading a file that torch.save wrote, without trusting it: no code runs, checksums must fit."""

import os
import re
import warnings
from pathlib import Path
from zipfile import ZIP_STORED, ZipFile, is_zipfile

import torch

from lab.errors import UserError
from lab.files import size_of

# Ends of names in the other archives that PyTorch writes: torch.export's (the second before
# PyTorch 2.8) and torch.jit's.
PROGRAM_PARTS = ('/models/model.json', 'serialized_exported_program.json', '/constants.pkl')
# What torch.load says of a file that contains more than tensors and plain values.
REFUSED = 'GLOBAL |Can only (create|build)|unrecognized function'


class BrokenFile(UserError):
    """A file that is missing, damaged, or not from torch.save."""


def read_archive(path):
    """The content of a file in PyTorch's zip format or in its older format.

    Raises:
        BrokenFile: the file is missing, truncated or damaged, or not from torch.save.
        UserError: loading the file could run code, or it is a program of torch.export or torch.jit.
    """
    path = Path(path)
    if path.suffix == '.onnx':
        raise UserError(f'{path} is an ONNX model: only tools.predict reads those; pass its run')
    try:
        size_of(path)
        with open(path, 'rb') as file, warnings.catch_warnings():
            warnings.simplefilter('ignore')  # about tensors that are refused later
            if is_zipfile(file):
                _check_parts(file, path)
            file.seek(0)
            return torch.load(file, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise BrokenFile(
            f'{path} does not exist: pass a run folder, its model.pt7, a state dict, or digits or '
            'fashion for the networks in weights/'
        ) from None
    except UserError:
        raise
    except MemoryError:
        raise UserError(f'{path} cannot be read: there is not enough memory') from None
    except OSError as error:  # also raised for a truncated archive, by a negative offset
        raise BrokenFile(f'{path} cannot be read ({error.strerror})') from None
    except Exception as error:  # there are many types for truncated or random files
        if re.search(REFUSED, str(error)):
            raise UserError(
                f'{path} is refused: it contains more than tensors and plain values, so loading it '
                'could run code'
            ) from None
        raise BrokenFile(
            f'{path} is not a PyTorch checkpoint, or it is truncated or broken '
            f'({type(error).__name__})'
        ) from None


def _check_parts(file, path):
    """Whether a zip archive is from torch.save, and fits its checksums, which torch.load does not
    compare."""
    with ZipFile(file) as archive:
        parts = archive.infolist()
        if any(part.filename.endswith(PROGRAM_PARTS) for part in parts):
            raise UserError(
                f'{path} is a program of torch.export or torch.jit, without the training in it: '
                'pass the run, or the .pth or .onnx file that tools.export writes'
            )
        # torch.save does not compress. An archive whose parts are larger than the file is not from
        # torch.save, and could fill the memory.
        compressed = any(part.compress_type != ZIP_STORED for part in parts)
        size = sum(part.file_size for part in parts)
        if compressed or size > os.fstat(file.fileno()).st_size:
            raise BrokenFile(f'{path} is not a PyTorch checkpoint: it is compressed')
        wrong = archive.testzip()
    if wrong:
        raise BrokenFile(f'{path} is broken: the checksum of its part {wrong} is wrong')

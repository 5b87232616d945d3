"""lab/runs/archive.py: files that are truncated, damaged, not checkpoints, or a danger."""

import io
import resource
import sys
import zipfile

import numpy as np
import pytest
import torch

import train
from conftest import Malicious, same, without_times
from lab.errors import UserError
from lab.runs import checkpoint
from tools import export, predict


def programs_that_load(path, tmp_path):
    return [
        (train.main, '--evaluate', path),
        (train.main, '--resume', path),
        (predict.main, path, __file__),
        (export.main, path, tmp_path / 'out.pth'),
    ]


def test_files_that_are_not_checkpoints(short_run, tmp_path, refused):
    whole = (short_run / 'model.pt7').read_bytes()
    bytes_of = {
        'truncated.pt7': whole[: len(whole) // 2],
        'cut-early.pt7': whole[:10],
        'empty.pt7': b'',
        'random.pt7': np.random.default_rng(0).bytes(5000),
        'text.pt7': b'hello world',
    }
    for name, content in bytes_of.items():
        (tmp_path / name).write_bytes(content)
    torch.save({'a': torch.zeros(3)}, tmp_path / 'other.pt7')
    for name in (*bytes_of, 'other.pt7', 'missing.pt7'):
        for main, *arguments in programs_that_load(tmp_path / name, tmp_path):
            refused(1, tmp_path / name, main, *arguments)
    assert not (tmp_path / 'out.pth').exists()


@pytest.mark.parametrize('zipped', [True, False])
def test_no_code_runs(zipped, tmp_path, refused):
    trap, path = tmp_path / 'trap', tmp_path / 'code.pt7'
    torch.save({'params': Malicious(trap)}, path, _use_new_zipfile_serialization=zipped)
    for main, *arguments in programs_that_load(path, tmp_path):
        refused(1, [path, 'run code'], main, *arguments)
    assert not trap.exists() and not (tmp_path / 'out.pth').exists()
    # It is a real trap: a loader that runs code makes the folder.
    torch.load(path, weights_only=False)
    assert trap.exists()


@pytest.mark.parametrize('fault', ['truncated', 'flipped', 'empty', 'missing'])
def test_broken_newest_gives_way_to_the_previous_one(fault, short_run, stopped, call):
    newest, previous = stopped / 'model.pt7', stopped / 'previous.pt7'
    content = bytearray(newest.read_bytes())
    if fault == 'flipped':  # a bit of a tensor: between tensors there is padding without a sum
        weight = checkpoint.load(stopped).params['fc.weight']
        content[content.index(weight.numpy().tobytes())] ^= 4
    broken = {'truncated': content[: len(content) * 2 // 3], 'empty': b''}
    newest.write_bytes(broken.get(fault, content))
    if fault == 'missing':  # killed between renaming the old and the new file
        newest.unlink()
    good = previous.read_bytes()
    result = call(train.main, '--resume', stopped)
    [line] = result.err.splitlines()
    assert str(newest) in line and str(previous) in line and 'epoch 2' in line
    assert same(short_run, stopped)
    assert without_times(short_run) == without_times(stopped)
    # The first save afterwards did not replace the good file by the broken one: the good one was
    # replaced only by the next good one.
    assert previous.read_bytes() != good and checkpoint.load_file(previous).epoch == 3


def test_both_broken(stopped, refused):
    for name in ('model.pt7', 'previous.pt7'):
        (stopped / name).write_bytes((stopped / name).read_bytes()[:-1000])
    refused(1, ['model.pt7', 'previous.pt7'], train.main, '--resume', stopped)


def test_every_flipped_bit_is_noticed_or_of_no_consequence(short_run, tmp_path):
    content = (short_run / 'model.pt7').read_bytes()
    expected = torch.load(short_run / 'model.pt7', weights_only=True)
    states = expected['optimizer']['state']
    random, noticed = np.random.default_rng(0), 0
    for place in random.integers(0, len(content), 100):
        flipped = bytearray(content)
        flipped[place] ^= 1 << random.integers(0, 8)
        (tmp_path / 'model.pt7').write_bytes(flipped)
        try:
            loaded = checkpoint.load(tmp_path / 'model.pt7')
        except UserError:
            noticed += 1
            continue
        # It was in padding, or in a date.
        for key, tensor in expected['params'].items():
            assert torch.equal(loaded.params[key], tensor)
        for i, state in states.items():
            actual = loaded.optimizer['state'][i]['momentum_buffer']
            assert torch.equal(actual, state['momentum_buffer'])
    assert noticed > 60


def zipped(files, compression=zipfile.ZIP_DEFLATED):
    """The bytes of a zip archive with these files: name to bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w', compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


def test_safetensors_without_its_package(tmp_path, monkeypatch, refused):
    path = tmp_path / 'net.safetensors'
    path.write_bytes(b'\2' + bytes(7) + b'{}')
    monkeypatch.setitem(sys.modules, 'safetensors.torch', None)
    for main, *arguments in programs_that_load(path, tmp_path):
        refused(1, [path, 'package safetensors'], main, *arguments)


def test_bombs(tmp_path, refused):
    """Archives that are far larger once unpacked."""
    zeros = io.BytesIO()
    with (
        zipfile.ZipFile(zeros, 'w', zipfile.ZIP_DEFLATED) as archive,
        archive.open('archive/data.pkl', 'w', force_zip64=True) as entry,
    ):
        for _ in range(100):
            entry.write(bytes(10**7))
    nested = zeros.getvalue()
    for _ in range(3):
        nested = zipped({f'archive/data/{i}': nested for i in range(10)})
    stored = zipped({'archive/data/0': nested}, zipfile.ZIP_STORED)
    limit = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + 2e8
    path = tmp_path / 'bomb.pt7'
    for content in (zeros.getvalue(), nested, stored):
        path.write_bytes(content)
        refused(1, path, train.main, '--resume', path)
        refused(1, path, train.main, '--evaluate', path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < limit

"""lab/runs/folder.py: one training per folder, nothing overwritten, disks that are full."""

import json
import resource
import shutil
import subprocess
import sys
import time

import pytest
import torch

import train
from conftest import ROOT, SHORT_RUN, read_log, same, start, without_times
from lab.runs import checkpoint, provenance
from lab.runs.folder import RunFolder, log_lines
from lab.runs.recorder import Recorder


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_existing_run_is_never_overwritten(short_run, refused):
    before = contents(short_run)
    resume = (train.main, '--resume', short_run)
    refused(2, [short_run, '--resume'], train.main, '--dataset', 'digits', '--save', short_run)
    refused(2, '--depth', *resume, '--depth', 34, '--epochs', 20)
    refused(2, ['--lr', '0.5', '0.2'], *resume, '--lr', 0.5, '--epochs', 20)
    refused(2, ['4 epochs', '--epochs'], *resume)
    assert before == contents(short_run)


def test_folder_of_something_else(tmp_path, refused):
    (tmp_path / 'thesis.tex').write_text('')
    refused(2, [tmp_path, 'thesis.tex'], train.main, *SHORT_RUN, '--save', tmp_path)


def test_folder_that_cannot_be_made(tmp_path, refused):
    """The message names what is in the way."""
    (tmp_path / 'file').write_text('')
    for name, target in (('dangling', 'nowhere'), ('a', 'b'), ('b', 'a'), ('tofile', 'file')):
        (tmp_path / name).symlink_to(target)
    for name, words in (
        ('file', ['not a folder']),
        ('file/run', []),
        ('tofile', ['not a folder']),
        ('dangling', ['link', 'nowhere']),
        ('dangling/run', [f'{tmp_path / "dangling"} is', 'link', 'nowhere']),
        ('a', ['link']),
    ):
        folder = tmp_path / name
        refused(1, [folder, *words], train.main, '--dataset', 'digits', '--save', folder)
    assert not (tmp_path / 'nowhere').exists()


def test_auto(short_run, tmp_path, call, refused):
    auto = ('--resume', 'auto', '--save', short_run)
    refused(2, ['--resume auto', '--save'], train.main, *SHORT_RUN, '--resume', 'auto')
    result = call(train.main, *SHORT_RUN, *auto)
    assert result.status == 0 and str(short_run) in result.out and '4 epochs' in result.out
    refused(2, ['--seed', '3', '4'], train.main, *SHORT_RUN, '--seed', 4, *auto)


@pytest.mark.parametrize(
    'again', [['--resume'], [*SHORT_RUN, '--save'], [*SHORT_RUN, '--resume', 'auto', '--save']]
)
def test_run_that_ended_before_its_first_checkpoint(again, short_run, tmp_path, stop_at):
    """It starts anew, with the options that it had, however it is started again."""

    class Crash(Exception):
        pass

    def crash():
        raise Crash

    folder = tmp_path / 'run'
    for command in ([*SHORT_RUN, '--save'], ['--resume']):  # crashes twice
        stop_at(7, act=crash)
        with pytest.raises(Crash):
            train.main([*command, str(folder)])
        assert not list(folder.glob('*.pt7'))
    train.main([*again, str(folder)])
    assert same(short_run, folder) and without_times(short_run) == without_times(folder)
    assert len(json.loads((folder / 'run.json').read_text())) == 3


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    folder = tmp_path / 'run'
    folder.mkdir()
    for name in ('model.pt7.123.tmp', 'log.txt.123.tmp', 'mine.tmp'):
        (folder / name).write_text('')
    (folder / 'run.json').write_text('[]')
    train.main([*SHORT_RUN, '--epochs', '1', '--save', str(folder)])
    names = {file.name for file in folder.iterdir()}
    assert {name for name in names if name.endswith('.tmp')} == {'mine.tmp'}


def test_one_training_in_a_folder(tmp_path, refused, monkeypatch):
    folder = tmp_path / 'run'
    process = start('train.py', *SHORT_RUN, '--epochs', 1000, '--save', folder)
    try:
        while not (folder / 'model.pt7').exists():
            assert process.poll() is None
            time.sleep(0.05)
        monkeypatch.setattr(RunFolder, 'PATIENCE', 0.3)
        refused(1, ['another process', folder], train.main, '--resume', folder)
    finally:
        process.kill()
        process.communicate()


def test_resume_into_another_folder_and_further(short_run, tmp_path):
    train.main(['--resume', str(short_run), '--epochs', '5', '--save', str(tmp_path / 'more')])
    assert [line['epoch'] for line in read_log(tmp_path / 'more')] == [1, 2, 3, 4, 5]
    assert len(read_log(short_run)) == 4


def test_log_of_a_checkpoint_without_one(short_run, tmp_path):
    """Checkpoints of the first code have no log: it continues the one next to it."""
    shutil.copytree(short_run, tmp_path / 'run')
    content = torch.load(short_run / 'model.pt7', weights_only=True)
    del content['log']
    torch.save({**content, 'epoch': 3}, tmp_path / 'run' / 'model.pt7')
    lines = (short_run / 'log.txt').read_text().splitlines()
    assert log_lines(checkpoint.load(tmp_path / 'run')) == lines[:3]


def test_copied_checkpoint_trains_elsewhere(short_run, tmp_path, monkeypatch):
    shutil.copytree(short_run, tmp_path / 'a')
    shutil.copy(short_run / 'model.pt7', tmp_path / 'a' / 'b.pt7')
    shutil.copy(short_run / 'model.pt7', tmp_path / 'model.pt7')
    before = contents(tmp_path / 'a')
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / 'a' / 'b.pt7', tmp_path / 'model.pt7'):
        train.main(['--resume', str(path), '--epochs', '5'])
        [folder] = (tmp_path / 'logs').iterdir()
        assert [line['epoch'] for line in read_log(folder)] == [1, 2, 3, 4, 5]
        shutil.rmtree(folder)
    assert before == contents(tmp_path / 'a')
    assert not (tmp_path / 'log.txt').exists()


# --- a disk that is full --------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB, if this user may mount one."""
    folder = tmp_path / 'disk'
    folder.mkdir()
    command = ['mount', '-t', 'tmpfs', '-o', 'size=4m', 'none', folder]
    if sys.platform != 'linux' or subprocess.run(command, capture_output=True).returncode:
        pytest.skip('needs the right to mount')
    yield folder
    subprocess.run(['umount', '-l', folder], check=True)


def fill(disk):
    with pytest.raises(OSError), open(disk / 'other', 'wb') as file:
        file.write(bytes(5_000_000))


def test_disk_that_is_full(short_run, small_disk, call, monkeypatch):
    """From the end of epoch 2: training continues, but the run is not a success. It resumes
    before the test of that epoch once there is space."""
    record_epoch = Recorder.record_epoch

    def fill_disk_and_record(self, train_pass, *args):
        if train_pass.epoch == 2:
            fill(small_disk)
        return record_epoch(self, train_pass, *args)

    monkeypatch.setattr(Recorder, 'record_epoch', fill_disk_and_record)
    folder = small_disk / 'run'
    result = call(train.main, *SHORT_RUN, '--save', folder)
    assert result.status == 1
    assert 'epoch 4/4' in result.out and 'done' not in result.out
    for word in (folder / 'model.pt7', 'No space left', 'epoch 2'):
        assert str(word) in result.err
    assert checkpoint.load(folder).epoch == 1 and not list(folder.glob('*.tmp'))

    monkeypatch.undo()
    (small_disk / 'other').unlink()
    train.main(['--resume', str(folder)])
    assert same(short_run, folder)
    assert without_times(short_run) == without_times(folder)


def test_checkpoint_that_is_too_large(tmp_path):
    """A write that fails midway, without the right to mount: a limit on the size of files."""
    folder = tmp_path / 'run'
    result = subprocess.run(
        [sys.executable, 'train.py', *SHORT_RUN, '--save', folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)),
    )
    assert result.returncode == 1 and 'Traceback' not in result.stderr
    assert str(folder / 'model.pt7') in result.stderr and 'File too large' in result.stderr
    assert {file.name for file in folder.iterdir()} - {'parameters.txt'} == {'log.txt', 'run.json'}


# --- what run.json says of the code ----------------------------------------------------------


def test_commit(tmp_path, monkeypatch):
    """It is dirty if the code differs, and not if a log does."""
    monkeypatch.setattr(provenance, 'CHECKOUT', tmp_path)
    assert provenance.describe_start([], torch.device('cpu'))['commit'] is None

    def git(*arguments):
        identity = ('-c', 'user.name=me', '-c', 'user.email=me@localhost')
        command = ['git', *identity, *arguments]
        return subprocess.check_output(command, cwd=tmp_path, text=True).strip()

    git('init', '-q')
    for name in ('train.py', 'logs/table.md'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('old')
    git('add', '.')
    git('commit', '-qm', 'Begin')
    commit = git('rev-parse', 'HEAD')
    (tmp_path / 'logs/table.md').write_text('new')
    (tmp_path / 'notes.txt').write_text('not tracked')
    assert provenance.describe_start([], torch.device('cpu'))['commit'] == commit
    (tmp_path / 'train.py').write_text('new')
    assert provenance.describe_start([], torch.device('cpu'))['commit'] == f'{commit}-dirty'

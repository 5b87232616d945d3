"""Training in several real processes: the numbers of one, whatever happens to them."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from lab.runs import checkpoint
import train
from conftest import ROOT, read_log, same, without_times

DIGITS = ['--dataset', 'digits', '--depth', '10', '--device', 'cpu']


def torchrun(*arguments, nodes=('--standalone',), n=2, path=''):
    """A running torchrun, its processes with one thread each."""
    return subprocess.Popen(
        [
            sys.executable,
            '-m',
            'torch.distributed.run',
            *nodes,
            f'--nproc_per_node={n}',
            *map(str, arguments),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(path)},
    )


def end(process, status=0, timeout=120):
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()  # its workers notice
        raise
    assert process.returncode == status, err
    return out + err


def until(condition, process, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


def processes_of(folder):
    """Ids of the training processes of a run, by rank."""
    found = {}
    for entry in os.listdir('/proc'):
        try:
            with open(f'/proc/{entry}/cmdline', 'rb') as file:
                command = file.read().split(b'\0')
            if os.fsencode(str(folder)) in command and b'torch.distributed.run' not in command:
                with open(f'/proc/{entry}/environ', 'rb') as file:
                    environment = dict(
                        line.split(b'=', 1) for line in file.read().split(b'\0') if b'=' in line
                    )
                if b'RANK' in environment:
                    found[int(environment[b'RANK'])] = int(entry)
        except (OSError, ValueError):
            continue
    return found


needs_proc = pytest.mark.skipif(not os.path.isdir('/proc/self'), reason='finds processes in /proc')


def test_losses_and_tests_do_not_depend_on_how_many(tmp_path):
    """20 steps of 437 samples at once, in uneven shares. In double precision: in single, one process is off by 5e-3 after eight
    steps, from itself in double."""
    options = [
        *DIGITS,
        '--width',
        '0.5',
        '--holdout',
        '1000',
        '--batch_size',
        '437',
        '--epochs',
        '20',
        '--sync_bn',
        '--lr',
        '0.05',
        '--dtype',
        'double',
    ]
    train.main([*options, '--save', str(tmp_path / '1')])
    expected = read_log(tmp_path / '1')
    for n in (2, 3):
        text = end(torchrun('train.py', *options, '--save', tmp_path / str(n), n=n))
        assert (
            text.count('done: ') == 1 and f'{n} processes' in text and text.count('epoch 2/') == 1
        )
        compare(read_log(tmp_path / str(n)), expected, n)
    assert expected[-1]['train_loss'] < expected[0]['train_loss'] - 0.2  # it learns


def compare(log, expected, n):
    assert len(log) == len(expected) and all(line['ngpu'] == n for line in log)
    for line, wanted in zip(log, expected):
        assert line['train_loss'] == pytest.approx(wanted['train_loss'], abs=1e-9)
        assert line['test_loss'] == pytest.approx(wanted['test_loss'], abs=1e-9)
        assert (line['train_acc'], line['test_acc']) == (wanted['train_acc'], wanted['test_acc'])


def test_gradients_of_synchronized_batch_norm(tmp_path):
    """In double precision, in shares of 1, 2 and 4 images, against batch norm of all seven."""
    script = tmp_path / 'script.py'
    script.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
import torch.nn.functional as F
from lab import distributed
from lab.errors import run
distributed.start(torch.device('cpu'))
torch.manual_seed(0)
def leaves():
    return [torch.randn(7, 5, 3, 4, dtype=torch.double).add_(10).requires_grad_(), torch.rand(5, dtype=torch.double).requires_grad_(),
            torch.randn(5, dtype=torch.double).requires_grad_()]
x, weight, bias = leaves()
target = torch.randn(7, 5, 3, 4, dtype=torch.double)
shares = [slice(0, 1), slice(1, 3), slice(3, 7)]
mine = shares[distributed.rank()]
running = [torch.zeros(5, dtype=torch.double), torch.ones(5, dtype=torch.double)]
expected_running = [tensor.clone() for tensor in running]
whole = F.batch_norm(x, *expected_running, weight, bias, True, 0.1, 1e-5)
expected = torch.autograd.grad((whole * target).square().sum(), (x, weight, bias))
own = distributed.sync_batch_norm(x[mine], *running, weight, bias, True, 0.1, 1e-5)
found = list(torch.autograd.grad((own * target[mine]).square().sum(), (x, weight, bias)))
found = [distributed.total(tensor) for tensor in found]
for actual, wanted in zip([*found, *running, own], [*expected, *expected_running, whole[mine]]):
    torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)
torch.testing.assert_close(distributed.sync_batch_norm(x, *running, weight, bias, False, 0.1, 1e-5),
                           F.batch_norm(x, *running, weight, bias, False, 0.1, 1e-5))
run(lambda: distributed.say('as it should be'), 'script')
""")
    assert 'as it should be' in end(torchrun(script, n=3))


def test_ngpu_stops_at_a_signal_and_goes_on_in_one_process(tmp_path):
    """python train.py --ngpu 2, its signals, and a checkpoint that moves from two processes to one and is tested by three."""
    folder = tmp_path / 'run'
    process = subprocess.Popen(
        [sys.executable, 'train.py', *DIGITS, '--epochs', '300', '--save', folder, '--ngpu', '2'],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until(lambda: (folder / 'log.txt').exists() and len(read_log(folder)) >= 2, process)
    process.send_signal(signal.SIGTERM)
    text = end(process, 143)
    assert (
        f'    python train.py --resume {folder} --device cpu --ngpu 2\n' in text
        and text.count('stopped by SIGTERM') == 1
    )
    found = checkpoint.load(folder)
    assert found.progress and found.epoch >= 2
    train.main(['--resume', str(folder), '--epochs', str(found.epoch + 1), '--device', 'cpu'])
    train.main(
        ['--resume', str(folder), '--epochs', str(found.epoch + 2), '--device', 'cpu', '--sync_bn']
    )  # of one process, the same
    log = read_log(folder)
    assert [line['epoch'] for line in log] == list(range(1, found.epoch + 3)) and (
        log[0]['ngpu'],
        log[-1]['ngpu'],
    ) == (2, 1)
    text = end(torchrun('train.py', '--evaluate', folder, '--device', 'cpu', n=3))
    [line] = [line for line in text.splitlines() if line.startswith('json_stats')]
    assert f'"test_acc": {log[-1]["test_acc"]}' in line and '"n": 360' in line


def test_two_agents(tmp_path):
    """Two machines, as far as torchrun can tell, which meet over the loopback interface; batches of 64 crops, of 29 at an epoch's end."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    nodes = [
        (
            '--nnodes=2',
            f'--node_rank={rank}',
            '--rdzv_backend=c10d',
            f'--rdzv_endpoint=127.0.0.1:{port}',
            '--rdzv_id=test',
        )
        for rank in range(2)
    ]
    options = [
        *DIGITS,
        '--epochs',
        '2',
        '--sync_bn',
        '--lr',
        '0.05',
        '--randomcrop_pad',
        '1',
        '--dtype',
        'double',
    ]
    agents = [
        torchrun('train.py', *options, '--save', tmp_path / 'run', nodes=node, n=1)
        for node in nodes
    ]
    for text in [end(agent) for agent in agents]:
        assert 'Traceback' not in text
    train.main([*options, '--save', str(tmp_path / 'one')])
    compare(read_log(tmp_path / 'run'), read_log(tmp_path / 'one'), 2)


@needs_proc
def test_restart_of_a_killed_worker(tmp_path):
    """With --max-restarts: as if nothing had happened."""
    options = [*DIGITS, '--epochs', '6', '--resume', 'auto', '--checkpoint_minutes', '0.005']
    end(torchrun('train.py', *options, '--save', tmp_path / 'whole'))
    process = torchrun('--max-restarts=1', 'train.py', *options, '--save', tmp_path / 'killed')
    until(
        lambda: (
            (tmp_path / 'killed' / 'log.txt').exists() and len(read_log(tmp_path / 'killed')) >= 2
        ),
        process,
    )
    os.kill(processes_of(tmp_path / 'killed')[1], signal.SIGKILL)
    end(process)
    assert (
        len([*(tmp_path / 'killed' / 'run.json').read_text().split('"command"')]) == 3
    )  # it was begun twice
    assert same(tmp_path / 'whole', tmp_path / 'killed')
    assert without_times(tmp_path / 'whole') == without_times(tmp_path / 'killed')


@needs_proc
@pytest.mark.parametrize('rank', [0, 1])
def test_a_rank_that_dies_ends_the_others(rank, tmp_path):
    process = torchrun('train.py', *DIGITS, '--epochs', '5000', '--save', tmp_path / 'run')
    until(lambda: (tmp_path / 'run' / 'model.pt7').exists(), process)
    found = processes_of(tmp_path / 'run')
    os.kill(found[rank], signal.SIGKILL)
    text = end(process, 1, timeout=60)
    assert not processes_of(tmp_path / 'run')
    assert (
        f'train.py{" (rank 1)" if rank == 0 else ""}: the connection to another process broke'
        in text
        or 'Signal 9' in text
    )
    assert checkpoint.load(tmp_path / 'run').epoch >= 1


@needs_proc
def test_a_signal_to_one_rank_saves_all(tmp_path):
    """With a disk that is slow: the others wait for rank 0, and torchrun, which repeats the signal, doesn't cut its save short."""
    (tmp_path / 'slow').mkdir()
    (tmp_path / 'slow' / 'sitecustomize.py').write_text(
        'import os, time\nfsync = os.fsync\nos.fsync = lambda file: (time.sleep(0.5), fsync(file))\n'
    )
    process = torchrun(
        'train.py', *DIGITS, '--epochs', '5000', '--save', tmp_path / 'run', path=tmp_path / 'slow'
    )
    until(lambda: (tmp_path / 'run' / 'model.pt7').exists(), process)
    time.sleep(1)
    os.kill(processes_of(tmp_path / 'run')[0], signal.SIGTERM)
    text = end(process, 1, timeout=60)
    assert (
        text.count('stopped by SIGTERM') == 1
        and f'torchrun --nproc_per_node=2 train.py --resume {tmp_path / "run"}' in text
    )
    assert checkpoint.load(tmp_path / 'run').progress and not list((tmp_path / 'run').glob('*.tmp'))


@needs_proc
def test_workers_do_not_outlive_torchrun(tmp_path):
    process = torchrun('train.py', *DIGITS, '--epochs', '5000', '--save', tmp_path / 'run')
    until(lambda: (tmp_path / 'run' / 'model.pt7').exists(), process)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 30
    while processes_of(tmp_path / 'run'):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_batch_too_small_for_all(tmp_path):
    text = end(
        torchrun('train.py', *DIGITS, '--batch_size', 718, '--save', tmp_path / 'run'), 1
    )  # 718 + 718 + 1
    assert 'train.py: --batch_size 718: the last' in text and '2 processes' in text
    assert not (tmp_path / 'run').exists()

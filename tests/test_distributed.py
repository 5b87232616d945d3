"""lab/distributed.py: several real processes give the numbers of one."""

import socket

import pytest
from torchrun_helpers import DIGITS, end, torchrun

import train
from conftest import read_log


def test_losses_and_tests_do_not_depend_on_the_number_of_processes(tmp_path):
    """20 steps of 437 samples each, in three uneven shares.

    In double precision: in single precision, even one process differs by 5e-3 after eight steps
    from itself in double.
    """
    options = (
        '--width 0.5 --holdout 1000 --batch_size 437 --epochs 20 --sync_bn --lr 0.05 --dtype double'
    )
    command = [*DIGITS, *options.split(), '--save']
    train.main([*command, str(tmp_path / '1')])
    expected = read_log(tmp_path / '1')
    text = end(torchrun('train.py', *command, tmp_path / '3', n=3))
    assert '3 processes' in text and text.count('done: ') == 1 and text.count('epoch 2/') == 1
    compare(read_log(tmp_path / '3'), expected, 3)
    assert expected[-1]['train_loss'] < expected[0]['train_loss'] - 0.2  # it learns


def compare(log, expected, n):
    assert len(log) == len(expected) and all(line['ngpu'] == n for line in log)
    for line, wanted in zip(log, expected):
        assert line['train_loss'] == pytest.approx(wanted['train_loss'], abs=1e-9)
        assert line['test_loss'] == pytest.approx(wanted['test_loss'], abs=1e-9)
        assert (line['train_acc'], line['test_acc']) == (wanted['train_acc'], wanted['test_acc'])


def test_two_agents(tmp_path):
    """Two machines, for torchrun, which meet over loopback; batches of 64 crops, the last of 29."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    rendezvous = (
        '--nnodes=2',
        '--rdzv_backend=c10d',
        f'--rdzv_endpoint=127.0.0.1:{port}',
        '--rdzv_id=test',
    )
    options = '--epochs 2 --sync_bn --lr 0.05 --randomcrop_pad 1 --dtype double --save'
    command = ['train.py', *DIGITS, *options.split()]
    agents = [
        torchrun(*command, tmp_path / 'run', nodes=(*rendezvous, f'--node_rank={rank}'), n=1)
        for rank in range(2)
    ]
    for text in [end(agent) for agent in agents]:
        assert 'Traceback' not in text
    train.main([*command[1:], str(tmp_path / 'one')])
    compare(read_log(tmp_path / 'run'), read_log(tmp_path / 'one'), 2)

"""lab/distributed.py: several real processes give the numbers of one."""

import socket

import pytest
from torchrun_helpers import DIGITS, end, torchrun

import train
from conftest import ROOT, read_log


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


SYNC_BN = """
import sys
import torch
import torch.nn.functional as F
sys.path.insert(0, sys.argv[1])
from lab import distributed
from lab.training.sync_batch_norm import sync_batch_norm
from lab.errors import run

def random(*shape):
    return torch.randn(shape, dtype=torch.double)

distributed.start(torch.device('cpu'))
torch.manual_seed(0)
x, target = random(7, 5, 3, 4).add_(10), random(7, 5, 3, 4)
weight, bias = random(5).abs(), random(5)
leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
mine = [slice(0, 1), slice(1, 3), slice(3, 7)][distributed.rank()]
running = [torch.zeros(5, dtype=torch.double), torch.ones(5, dtype=torch.double)]
expected_running = [tensor.clone() for tensor in running]

whole = F.batch_norm(x, *expected_running, weight, bias, True, 0.1, 1e-5)
expected = torch.autograd.grad((whole * target).square().sum(), leaves)
own = sync_batch_norm(x[mine], *running, weight, bias, True, 0.1, 1e-5)
found = torch.autograd.grad((own * target[mine]).square().sum(), leaves)
found = [distributed.total(tensor) for tensor in found]
for actual, wanted in zip([*found, *running, own], [*expected, *expected_running, whole[mine]]):
    torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)

arguments = (x, *running, weight, bias, False, 0.1, 1e-5)
torch.testing.assert_close(sync_batch_norm(*arguments), F.batch_norm(*arguments))
run(lambda: distributed.say('all equal'), 'script')
"""


def test_gradients_of_synchronized_batch_norm(tmp_path):
    """In double precision, in shares of 1, 2 and 4 images, against batch norm of all seven."""
    (tmp_path / 'script.py').write_text(SYNC_BN)
    assert 'all equal' in end(torchrun(tmp_path / 'script.py', ROOT, n=3))


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

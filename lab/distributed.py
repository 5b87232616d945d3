"""Training in several processes, on torch.distributed: NCCL between GPUs, gloo for all else.

A process that torchrun started finds its place in the environment; one that was started alone is rank 0 of 1, and everything
here does nothing. Of every batch each process has its share (see data.Ordered), so that together they see what one would see.
"""

import os
import sys
import uuid
import warnings
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F

from lab.errors import OptionError, UserError

ENVIRONMENT = 'TORCHELASTIC_RUN_ID'  # set by torchrun (and by launch) in each process
BY_NGPU = 'DIRACNETS_NGPU'


def under_torchrun():
    return ENVIRONMENT in os.environ


def launched_here():
    """Whether --ngpu started the processes, not torchrun."""
    return BY_NGPU in os.environ


def local_rank():
    """Of this process among those of its machine: its GPU's number."""
    return int(os.environ['LOCAL_RANK']) if under_torchrun() else 0


def local_world():
    """How many processes of this training are on this machine."""
    return int(os.environ['LOCAL_WORLD_SIZE']) if under_torchrun() else 1


def world():
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def say(text):
    """Print, once for all processes."""
    if rank() == 0:
        print(text, flush=True)


def start(device):
    """Meet the other processes, if torchrun started this one."""
    if under_torchrun() and not dist.is_initialized():
        if device.type == 'cuda':
            torch.cuda.set_device(device)
        store, number, count = next(dist.rendezvous('env://'))
        if os.environ.get('GROUP_WORLD_SIZE') == '1':
            # torchrun's store outlives a restart (torch 2.14), and with it the addresses of processes that are dead. (On several machines
            # the numbers of restarts may differ; there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives each restart a store of its own.)
            store = dist.PrefixStore(f'restart {os.environ["TORCHELASTIC_RESTART_COUNT"]}', store)
        dist.init_process_group(
            'cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo',
            store=store,
            rank=number,
            world_size=count,
        )


@contextmanager
def one_line_errors():
    """Where another process died, as a UserError: one of these, to which the connection breaks in the midst of a sum, or one that decodes
    images, of which torch tells wherever one is."""
    try:
        yield
    except RuntimeError as error:
        if str(error).startswith('DataLoader worker'):
            raise UserError(
                'a process that decodes images died (out of memory?): fewer --nthread or a smaller --batch_size may help'
            ) from None
        if not under_torchrun() or not (isinstance(error, dist.DistError) or 'gloo' in str(error)):
            raise
        raise UserError(
            'the connection to another process broke: it stopped, or its machine did'
        ) from None


@contextmanager
def first_on_this_machine():
    """One process of each machine goes through the body before the others: it downloads, they find what it left."""
    if local_rank() > 0:
        barrier()
    yield
    if local_rank() == 0:
        barrier()


def barrier():
    """Wait for all processes. (By gloo, which has more patience than NCCL: a download takes its time.)"""
    total(torch.zeros(1))


def total(tensor):
    """The sum over all processes of a tensor on the CPU, the same to the bit in each."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def agree(*numbers):
    """The largest of each number in any process: what one has noticed, all know."""
    if world() == 1:
        return numbers
    found = torch.tensor(numbers)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return tuple(found.tolist())


def union(mapping):
    """All processes' dicts in one, in the order of ranks."""
    if world() == 1:
        return dict(mapping)
    found = [None] * world()
    dist.all_gather_object(found, mapping)
    return {key: value for part in found for key, value in part.items()}


def from_first(function):
    """What function() gives, or the UserError that it raises, in rank 0; the others have perhaps not the files that it reads."""
    found = [None]
    if rank() == 0:
        try:
            found = [function()]
        except UserError as error:
            found = [error]
    if world() > 1:
        dist.broadcast_object_list(found, 0)
    if isinstance(found[0], UserError):
        raise found[0]
    return found[0]


def share_gradients(module, device):
    """The module to train with: it averages the gradients of all processes."""
    if world() == 1:
        return module
    with warnings.catch_warnings():
        warnings.simplefilter(
            'ignore', FutureWarning
        )  # broadcast_buffers has another name in torch 2.14, which earlier ones don't know
        # Running statistics are those of rank 0, as in the original's data_parallel; training doesn't read them, so that it is enough
        # to hand them round before a test (share_statistics).
        return torch.nn.parallel.DistributedDataParallel(
            module,
            [device] if device.type == 'cuda' else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )


def share_statistics(module):
    """Rank 0's running statistics for all."""
    if world() > 1:
        for tensor in module.buffers():
            dist.broadcast(tensor, 0)


class _Sum(torch.autograd.Function):
    """The sum of a tensor over all processes. (A gradient is summed, too: every process's loss depends on every term.)"""

    @staticmethod
    def forward(ctx, tensor):
        tensor = tensor.clone()
        dist.all_reduce(tensor)
        return tensor

    @staticmethod
    def backward(ctx, grad):
        return _Sum.apply(grad.contiguous())


def sync_batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps):
    """F.batch_norm with the statistics of all processes' batches together (torch's SyncBatchNorm is for GPUs alone).

    x: (N, C, H, W), of any N, which may differ between processes.
    """
    if not training or world() == 1:
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    inputs = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    channels, n = x.shape[1], x.numel() // x.shape[1]
    var, mean = torch.var_mean(inputs, (0, 2, 3), correction=0)
    mine = torch.cat([mean, var, mean.new_tensor([n])])
    means, variances, counts = _Sum.apply(
        torch.stack([mine if r == rank() else torch.zeros_like(mine) for r in range(world())])
    ).split([channels, channels, 1], dim=1)  # (world, C), (world, C), (world, 1)
    share = counts / counts.sum()
    mean = (share * means).sum(0)
    var = (share * (variances + (means - mean).square())).sum(0)
    if running_mean is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_(
                (var * (counts.sum() / (counts.sum() - 1))).to(running_var.dtype), momentum
            )
    scale = weight * torch.rsqrt(var + eps)
    shape = (1, channels, 1, 1)
    return ((inputs - mean.view(shape)) * scale.view(shape) + bias.view(shape)).to(x.dtype)


def launch(n, command):
    """Run a Python program, [file, *arguments], in n processes on this machine, as torchrun --nproc_per_node does; returns the exit
    status."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault('OMP_NUM_THREADS', str(max(1, torch.get_num_threads() // n)))
    os.environ[BY_NGPU] = str(n)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=n,
        run_id=uuid.uuid4().hex,
        rdzv_backend='c10d',
        rdzv_endpoint='localhost:0',
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)('-u', *command)
    except SignalException as stopped:
        return 128 + stopped.sigval
    except ChildFailedError as failed:
        status = failed.get_first_failure()[1].exitcode
        return status if status > 0 else 128 - status
    return 0


def check_batches(n, batch_size):
    """Raises OptionError where a process would have no sample of a batch."""
    last = n % batch_size or batch_size
    if last < world():
        raise OptionError(
            f'--batch_size {batch_size}: the last of {n} samples make a batch of {last}, fewer than the {world()} processes; '
            'choose another size'
        )

"""Training in several processes with torch.distributed: NCCL between GPUs, gloo otherwise.

A process that torchrun started reads its rank from the environment. A process that was started
alone is rank 0 of 1, and the functions here then do nothing. Each process takes its share of
every batch (see lab.data.batches), so that together they see what one process would see.
"""

import logging
import os
import signal
import warnings
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from lab import cuda
from lab.errors import OptionError, UserError
from lab.memory import libc_function

UNDER_TORCHRUN = 'TORCHELASTIC_RUN_ID'  # set in each process by torchrun (and by `launch`)
UNDER_LAUNCH = 'DIRACNETS_NGPU'


# --- this process and the others -------------------------------------------------------------


def under_torchrun():
    return UNDER_TORCHRUN in os.environ


def launched_here():
    """Whether --ngpu started the processes, not torchrun."""
    return UNDER_LAUNCH in os.environ


def local_rank():
    """The rank of this process on its machine, which is also the number of its GPU."""
    return int(os.environ['LOCAL_RANK']) if under_torchrun() else 0


def local_world():
    """The number of processes on this machine."""
    return int(os.environ['LOCAL_WORLD_SIZE']) if under_torchrun() else 1


def world():
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def say(text):
    """Print, in rank 0 only."""
    if rank() == 0:
        print(text, flush=True)


def start(device):
    """Connect to the other processes if torchrun started this one."""
    if not under_torchrun():
        return
    prctl = libc_function('prctl')
    if prctl:
        # The death of torchrun, even by SIGKILL, becomes a SIGTERM to this process: the run saves
        # and stops, so that it can be started again (on Linux).
        prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG of sys/prctl.h
    if device.type == 'cuda':
        torch.cuda.set_device(device)
    # torchrun's store is there already, unless torchrun was killed: waiting would not help.
    has_store = os.environ['TORCHELASTIC_USE_AGENT_STORE'] == 'True'
    patience = timedelta(seconds=15) if has_store else dist.default_pg_timeout
    store, number, count = next(dist.rendezvous('env://', timeout=patience))
    store.set_timeout(dist.default_pg_timeout)
    if os.environ['GROUP_WORLD_SIZE'] == '1':
        # torchrun's store outlives a restart (torch 2.14), and with it the addresses of dead
        # processes: the new ones would wait for them. On several machines, restart counts may
        # differ; there, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives each restart its own store.
        store = dist.PrefixStore(f'restart {os.environ["TORCHELASTIC_RESTART_COUNT"]}', store)
    backend = cuda.BACKEND if device.type == 'cuda' else 'gloo'
    dist.init_process_group(backend, store=store, rank=number, world_size=count)


def launch(n, command):
    """Run a Python program, [file, *arguments], in n processes on this machine with torchrun.
    Returns the exit status: that of the first process that failed, or, after a signal, 128 + its
    number."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault('OMP_NUM_THREADS', str(max(1, torch.get_num_threads() // n)))
    os.environ[UNDER_LAUNCH] = str(n)
    logging.disable(logging.ERROR)  # a process that fails prints its own line
    try:
        torchrun.main(['--standalone', f'--nproc_per_node={n}', *command])
    except SignalException as stopped:
        return 128 + stopped.sigval
    except ChildFailedError as failed:
        local_rank, failure = failed.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        raise UserError(
            f'process {local_rank} was ended by {failure.signal_name()}: the run stops'
        ) from None
    return 0


@contextmanager
def one_line_errors():
    """Raise a UserError if another process died: one that trains, or one that decodes images."""
    try:
        yield
    except RuntimeError as error:
        if str(error).startswith('DataLoader worker'):
            raise UserError(
                'a process that decodes images died (out of memory?); '
                'try a smaller --nthread or --batch_size'
            ) from None
        if not under_torchrun() or not (isinstance(error, dist.DistError) or 'gloo' in str(error)):
            raise
        raise UserError(
            'the connection to another process broke: the process or its machine stopped'
        ) from None


# --- what the processes tell each other ------------------------------------------------------


@contextmanager
def first_on_this_machine():
    """Run the body in one process of each machine, then in the others.

    The first one downloads data; the others find it.
    """
    if local_rank() > 0:
        barrier()
    yield
    if local_rank() == 0:
        barrier()


def barrier():
    """Wait for all processes. Uses gloo, whose timeout is long enough for a download."""
    total(torch.zeros(1))


def total(tensor):
    """The sum of a CPU tensor over all processes, bitwise the same in each; works in place."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def agree(*numbers):
    """The maximum of each number over all processes."""
    if world() == 1:
        return numbers
    largest = torch.tensor(numbers)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return tuple(largest.tolist())


def union(mapping):
    """The union of the dicts of all processes, in the order of ranks."""
    if world() == 1:
        return dict(mapping)
    mappings = [None] * world()
    dist.all_gather_object(mappings, mapping)
    return {key: value for part in mappings for key, value in part.items()}


def from_first(function):
    """What `function()` returns in rank 0; all processes raise its UserError.

    The other processes may not have the files that it reads.
    """
    results = [None]
    if rank() == 0:
        try:
            results = [function()]
        except UserError as error:
            results = [error]
    if world() > 1:
        dist.broadcast_object_list(results, 0)
    if isinstance(results[0], UserError):
        raise results[0]
    return results[0]


# --- training together -----------------------------------------------------------------------


def check_batches(n, batch_size):
    """Raise OptionError if a process would have no sample of the last batch."""
    last = n % batch_size or batch_size
    if last < world():
        raise OptionError(
            f'--batch_size {batch_size}: the last batch of {n} samples has {last}, fewer than the '
            f'{world()} processes; choose another size'
        )


def share_gradients(module, device):
    """The module to train: its backward pass averages gradients over all processes."""
    if world() == 1:
        return module
    with warnings.catch_warnings():
        # torch 2.14 renames broadcast_buffers; earlier releases do not know the new name.
        warnings.simplefilter('ignore', FutureWarning)
        # Running statistics are those of rank 0, as in the original's data_parallel. Training
        # does not read them, so they are sent only before a test (share_statistics).
        return torch.nn.parallel.DistributedDataParallel(
            module,
            [device] if device.type == 'cuda' else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )


def share_statistics(module):
    """Give all processes the running statistics of rank 0."""
    if world() > 1:
        for tensor in module.buffers():
            dist.broadcast(tensor, 0)

"""Measurements that need a fresh process:

    python -m tools.benchmark.children NAME ARGUMENTS

calls the function NAME and prints its result as the last line, in JSON. Each function imports what
it uses, so that the memory of an import counts only where it is needed.
"""

import itertools
import json
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

import torch

from tools.benchmark.memory import proportional_memory, resident_memory


def torch_alone():
    """Memory of a process that only imports torch, MB."""
    return resident_memory()


def cifar_loading(root, sums):
    """Memory after two epochs of training batches of the CIFAR-10 under root, MB."""
    batches = cifar_batches(root, sums)
    for _ in range(2):
        batches.epoch += 1
        for _batch in batches:
            pass
    return resident_memory()


def cifar_training(root, sums):
    """Memory after training steps on the CIFAR-10 under root, MB."""
    train_steps(iter(cifar_batches(root, sums)))
    return resident_memory()


def random_training():
    """Memory after training steps on one random batch of CIFAR-10's size, MB."""
    inputs = torch.randn(128, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    train_steps(itertools.repeat((inputs, torch.arange(128) % 10)))
    return resident_memory()


def cifar_batches(root, sums):
    """Training batches of files from made_data.write_cifar; sums: JSON of their MD5 sums."""
    from lab.data.datasets import PREPROCESSING, Data

    train, test, classes = read_made_cifar(json.loads(sums), 'CIFAR10', Path(root), download=False)
    data = Data('CIFAR10', train, test, classes, PREPROCESSING['CIFAR10'], mirrored=True)
    return data.batches(True, batch_size=128, pad=4)


def read_made_cifar(sums, name, root, download):
    """`read_cifar`, which accepts files with these MD5 sums."""
    from torchvision.datasets import CIFAR10

    from lab.data.readers import read_cifar

    for part in (CIFAR10.train_list, CIFAR10.test_list):
        part[:] = [[file, sums[file]] for file, _ in part]
    CIFAR10.meta['md5'] = sums['batches.meta']
    return read_cifar(name, root, download)


def train_steps(batches, steps=30):
    from diracnet import Network, define_diracnet
    from lab.training.optimizers import make_optimizer

    module = Network(*define_diracnet(16, 1, 'CIFAR10'))
    optimizer = make_optimizer(module, {'lr': 0.1, 'weight_decay': 5e-4})
    for _ in range(steps):
        inputs, targets = next(batches)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(inputs), targets).backward()
        optimizer.step()


def folder_loading(root):
    """Memory with two workers after each of 12 epochs of an image folder, MB."""
    from lab.data import datasets

    batches = datasets.load('folder', root).batches(True, batch_size=64, workers=2)
    sizes = []
    for epoch in range(12):
        batches.epoch = epoch
        for _ in batches:
            pass
        workers = [worker.pid for worker in multiprocessing.active_children()]
        sizes.append(sum(proportional_memory(process) for process in ('self', *workers)))
    return sizes


def first_step(folder):
    """Train digits to the first step of the optimizer, then exit. The run is written to folder."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    import train

    def leave(*_):
        os._exit(0)

    register_optimizer_step_post_hook(leave)
    train.main(['--dataset', 'digits', '--save', f'{tempfile.mkdtemp(dir=folder)}/run'])


MEASUREMENTS = {
    function.__name__: function
    for function in (
        torch_alone,
        cifar_loading,
        cifar_training,
        random_training,
        folder_loading,
        first_step,
    )
}

if __name__ == '__main__':
    _, name, *arguments = sys.argv
    print(json.dumps(MEASUREMENTS[name](*arguments)))

"""Processes that run one measurement each, so that they share no allocator, caches or memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def measure_in_child(name, *arguments):
    """The result of a function of tools.benchmark.children in a fresh process."""
    # Without huge pages, which would count as memory in use.
    environment = {key: value for key, value in os.environ.items() if key != 'THP_MEM_ALLOC_ENABLE'}
    result = subprocess.run(
        [sys.executable, '-m', 'tools.benchmark.children', name, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=ROOT,
        env=environment,
    )
    return json.loads(result.stdout.splitlines()[-1])


class Contestant:
    """A process that runs one step of tools.benchmark.contestants whenever it is called.

    Args:
        kind: a name in contestants.BUILDERS.
        network: (depth, width, dataset).
        batch: images in a batch.
    """

    def __init__(self, kind, network, batch=128):
        specification = json.dumps([kind, network, batch])
        self.process = subprocess.Popen(
            [sys.executable, '-m', 'tools.benchmark.contestants', specification],
            text=True,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.ask('ready')

    def ask(self, request):
        self.process.stdin.write(request + '\n')
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def __call__(self):
        return self.ask('step')

    def close(self):
        """End the process. Returns its peak memory, in MB above that without the network."""
        peak = self.ask('peak')
        self.process.stdin.close()
        self.process.wait()
        return peak

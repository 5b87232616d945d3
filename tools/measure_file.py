"""Load an exported file in a new process, and measure its logits and its speed there.

    python -m tools.measure_file FILE INPUTS.npy RESULT.npz

FILE is a .pth, .pt2 or .onnx that tools.export made, INPUTS.npy holds normalized images
(N, C, H, W). RESULT.npz gets `logits` (N, num_classes) and `times`, see `measure`.
tools.export runs this to check what it exports.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from lab.errors import UserError, run
from lab.folded import compute_logits
from lab.onnx_models import OnnxNetwork
from lab.runs import checkpoint

LATENCIES = (1, 64)  # images in a batch
REPEATS = 20
ROOT = Path(__file__).resolve().parent.parent


def load_exported(path):
    """The network in an exported file: a function from images (N, C, H, W) to logits."""
    suffix = Path(path).suffix
    if suffix == '.pth':
        return checkpoint.load(path).module()
    return torch.export.load(path).module() if suffix == '.pt2' else OnnxNetwork(path)


@torch.inference_mode()
def measure(net, inputs):
    """Logits (N, num_classes), and the median time in milliseconds of a batch of each size in
    LATENCIES."""
    logits = compute_logits(net, inputs)
    times = []
    for n in LATENCIES:
        batch = inputs[torch.arange(n) % len(inputs)]
        spent = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            net(batch)
            spent.append(1000 * (time.perf_counter() - start))
        times.append(float(np.median(spent[1:])))
    return logits, times


def measure_content(content, path, inputs):
    """`measure` the content of an exported file in a new process, from a temporary folder.

    Args:
        path: where the file will be; its name chooses the format.

    Raises:
        UserError: the new process cannot load or run the file.
        OSError: the temporary folder cannot be written.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder).resolve() / name for name in (path.name, 'inputs.npy', 'result.npz')]
        files[0].write_bytes(content)
        np.save(files[1], inputs.numpy())
        command = [sys.executable, '-m', 'tools.measure_file', *files]
        child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if child.returncode:
            lines = child.stderr.strip().splitlines() or [f'exit status {child.returncode}']
            raise UserError(f'{path} is not written, as a new process cannot use it: {lines[-1]}')
        with np.load(files[2]) as result:
            return result['logits'], result['times'].tolist()


def main():
    file, inputs_file, result_file = sys.argv[1:]
    inputs = torch.from_numpy(np.load(inputs_file))
    logits, times = measure(load_exported(file), inputs)
    np.savez(result_file, logits=logits, times=times)


if __name__ == '__main__':
    run(main, 'tools.measure_file')

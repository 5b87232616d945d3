"""What only CUDA has. Everything else is the same code on every device."""

import contextlib
import functools

import torch

BACKEND = 'cpu:gloo,cuda:nccl'  # of torch.distributed


def set_up():
    """Let cuDNN choose the fastest convolutions, and let float32 use TF32."""
    torch.backends.cudnn.benchmark = True
    use_tf32(True)


def set_up_for_equal_numbers():
    """Compute in full precision, and the same at each repetition, for tests."""
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    use_tf32(False)


def use_tf32(allowed):
    torch.set_float32_matmul_precision('high' if allowed else 'highest')
    torch.backends.cudnn.allow_tf32 = allowed


def memory(device):
    """The memory of a device in bytes."""
    return torch.cuda.get_device_properties(device).total_memory


def peak_memory(device, restart=True):
    """The most memory in bytes that tensors took on a device since the last restart."""
    peak = torch.cuda.max_memory_allocated(device)
    if restart:
        torch.cuda.reset_peak_memory_stats(device)
    return peak


def send(tensor, device):
    """Start to copy a tensor from the CPU, through pinned memory; the CPU may change it meanwhile,
    because pinning copies, too."""
    return tensor.pin_memory().to(device, non_blocking=True)


@functools.cache
def _side_stream():
    """One stream for all uses: memory that was freed on a stream is reused on it alone."""
    return torch.cuda.Stream()


@contextlib.contextmanager
def beside():
    """A context whose kernels run on another stream, as those before a capture must."""
    stream, current = _side_stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


def capture(function):
    """Capture the kernels of function() as a CUDA graph, without running them.

    The function must not wait for the GPU, and must read its inputs from the same tensors each
    time.

    Returns:
        replay: a function that runs the kernels.
        outputs: what the function returned; each replay overwrites its tensors.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()
    return graph.replay, outputs

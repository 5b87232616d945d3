"""What only CUDA has. Everything else is the same code on every device."""

import contextlib
import functools

import torch

BACKEND = 'cpu:gloo,cuda:nccl'  # of torch.distributed


def set_up(device):
    """Make a device the current one, let cuDNN choose the fastest convolutions, and let float32 use
    TF32."""
    torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = True
    use_tf32(True)


def set_up_for_equal_numbers(device=None):
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


def peak_memory(device):
    """The most memory in bytes that tensors took on a device so far. (Those of a CUDA graph count
    when it is captured.)"""
    return torch.cuda.max_memory_allocated(device)


def send(tensor, device):
    """Start to copy a tensor from the CPU, through pinned memory; the CPU may change it meanwhile,
    because pinning copies, too."""
    return tensor.pin_memory().to(device, non_blocking=True)


@functools.cache
def _side_stream():
    """One stream for the first steps and the capture. Each stream has a memory of its own for what
    was freed on it, and for cuBLAS."""
    return torch.cuda.Stream()


@contextlib.contextmanager
def beside():
    """A context whose kernels run on another stream, as those before a capture must."""
    stream, current = _side_stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        current.wait_stream(stream)


def capture(function):
    """Capture the kernels of function() as a CUDA graph, without running them.

    The function must not wait for the GPU, and must read its inputs from the same tensors each
    time.

    Returns:
        replay: a function that runs the kernels.
        outputs: what the function returned; each replay overwrites its tensors.
    """
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, stream=_side_stream()):
            outputs = function()
    except RuntimeError as error:
        # Ending a capture that failed fails, too, before torch has gone back to this stream.
        torch.cuda.set_stream(current)
        raise error.__context__ or error from None
    return graph.replay, outputs

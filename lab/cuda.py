"""What only CUDA has. Everything else is the same code on every device."""

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


def graphed(step):
    """step() captured as a CUDA graph: a function that launches all its kernels at once.

    It must work on the same tensors each time, and set gradients to None at its beginning.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # capturing needs a step or more on another stream before
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay():
        graph.replay()

    replay.step = step  # its tensors must live as long as the graph
    return replay

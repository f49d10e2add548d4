"""Batch norm's and max pool's kernels under Triton's interpreter, in models that a CPU trains."""

import torch

from fastsiam.kernels import batch_norm, pool


def is_channels_last(x):
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def take_kernels(monkeypatch):
    """Sends channels-last images of any device to the kernels."""
    for module in (batch_norm, pool):
        monkeypatch.setattr(module, "takes", is_channels_last)


class _OnCuda(torch.Tensor):
    is_cuda = True


def as_on_cuda(x: torch.Tensor) -> torch.Tensor:
    """`x`, which says that it is on CUDA."""
    return x.as_subclass(_OnCuda)

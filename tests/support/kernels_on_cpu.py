"""Kernels of batch norm, max pool and 1x1 convolutions under Triton's interpreter, in models that a CPU trains."""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from fastsiam.kernels import batch_norm, batch_norm_numba, pointwise, pool


def is_channels_last(x):
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def take_kernels(monkeypatch):
    """Sends channels-last images of any device to Triton's kernels."""
    leave_numba_out(monkeypatch)
    for module in (batch_norm, pointwise, pool):
        monkeypatch.setattr(module, "takes", is_channels_last)


def leave_numba_out(monkeypatch):
    """Leaves a CPU's images to Triton's kernels where they are taken, else to torch."""
    monkeypatch.setattr(batch_norm_numba, "computes", lambda x: False)


def mend_bfloat16(monkeypatch):
    """The interpreter (Triton 3.8) cuts fp32 off to bf16, and takes matrices of bf16 for those of integers."""
    builder = interpreter.InterpreterBuilder
    cast, dot = builder.cast_impl, builder.create_dot

    def nearest(self, source, kind):
        if source.dtype.scalar != tl.float32 or kind.scalar != tl.bfloat16:
            return cast(self, source, kind)
        bits = source.data.astype(np.float32).view(np.uint32)
        bits = np.where(np.isnan(source.data), bits, bits + 0x7FFF + (bits >> 16 & 1))
        return interpreter.TensorHandle((bits >> 16).astype(np.uint16), tl.bfloat16)

    def of_floats(self, a, b, *others):
        a, b = (cast(self, one, tl.float32) if one.dtype.scalar == tl.bfloat16 else one for one in (a, b))
        return dot(self, a, b, *others)

    monkeypatch.setattr(builder, "cast_impl", nearest)
    monkeypatch.setattr(builder, "create_dot", of_floats)


class _OnCuda(torch.Tensor):
    is_cuda = True


def as_on_cuda(x: torch.Tensor) -> torch.Tensor:
    """`x`, which says that it is on CUDA."""
    return x.as_subclass(_OnCuda)

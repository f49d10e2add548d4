"""A GPU that is not there, as far as torch and Triton ask while Inductor schedules; nothing can run on it."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
import torch._inductor.utils
from torch._dynamo import device_interface
from torch._dynamo.variables.tensor import TensorVariable
from torch._subclasses import fake_tensor
from torch.utils import _triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from benchmarks.traffic.gpus import Gpu

CUDA = torch.device("cuda", 0)


@contextlib.contextmanager
def pretended(gpu: Gpu) -> Iterator[None]:
    """As long as the block lasts, torch and Triton find one `gpu`, and convolutions have the layouts of cuDNN."""
    properties = gpu.properties()
    answers = {
        "is_available": lambda: True,
        "is_initialized": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: gpu.capability,
        "get_device_name": lambda device=None: gpu.name,
        "is_bf16_supported": lambda including_emulation=True: True,
        "synchronize": lambda device=None: None,
        "_lazy_init": lambda: None,
    }
    asked_by_dynamo = ("is_available", "current_device", "device_count", "get_device_properties")
    of_dynamo = {name: staticmethod(answers[name]) for name in asked_by_dynamo}
    with (
        mock.patch.multiple(torch.cuda, **answers),
        mock.patch.multiple(device_interface.CudaInterface, **of_dynamo),
        mock.patch.dict(device_interface.caching_worker_device_properties, {"cuda": [properties]}),
        mock.patch.dict(device_interface.caching_worker_current_devices, {"cuda": 0}),
        mock.patch.object(fake_tensor, "init_gpu_context", create=True),
        mock.patch.object(torch._C, "_conv_determine_backend_memory_format", _layout_of_cudnn),
        mock.patch.object(driver, "_active", _Driver(gpu)),
    ):
        _forget_answers()
        try:
            yield
        finally:
            _forget_answers()


def kernels_chosen():
    """Context in which code that Dynamo traces takes a tensor for one on CUDA, as it asks before it calls a kernel."""

    def is_cuda(self, tx):
        from torch._dynamo.variables.base import VariableTracker

        return VariableTracker.build(tx, True)

    return mock.patch.object(TensorVariable, "method_attr_is_cuda", is_cuda)


def _layout_of_cudnn(images, weight, _backend):
    """Without a driver torch would name its slow backend, whose outputs are contiguous."""
    last = torch.channels_last
    is_last = any(tensor.dim() == 4 and tensor.is_contiguous(memory_format=last) for tensor in (images, weight))
    return last if is_last else torch.contiguous_format


def _forget_answers():
    """Torch keeps what it has once found out about Triton and the GPU."""
    for module in (_triton, torch._inductor.utils):
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


class _Driver:
    """Triton's driver of a `gpu`, for those who ask what it is."""

    def __init__(self, gpu: Gpu):
        major, minor = gpu.capability
        self._target = GPUTarget("cuda", 10 * major + minor, 32)

    def get_current_target(self):
        return self._target

    def get_current_device(self):
        return 0

    def get_active_torch_device(self):
        return CUDA

    def get_device_interface(self):
        return torch.cuda

    def is_active(self):
        return True

"""Facts about a measurement: hardware, versions, and the commit of the checkout."""

import contextlib
import functools
import importlib.metadata
import os
import platform
from pathlib import Path

import torch

from benchmarks.harness.checkout import CHECKOUT, checkout_state
from fastsiam.runtime.energy import nvml_handle
from fastsiam.runtime.environment import cpu_info

_ISA = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
_VERSIONS = {
    "torch": ("torch",),
    "triton": ("triton",),
    "numba": ("numba",),
    "torchvision": ("torchvision",),
    "dali": ("nvidia-dali-cuda120", "nvidia-dali-cuda130"),
    "lightly": ("lightly",),
}
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def environment(device: torch.device) -> dict:
    """Returns the machine of a result line; absent packages and what NVML does not report are None.

    Keys: gpu, driver, power_limit_watts; cpu, isa (the extensions that matter here), cores, threads,
    omp_wait_policy, gomp_spincount; python, cuda (that torch was built for), torch, triton, numba, torchvision, dali,
    lightly; commit and dirty, as `checkout_state` has them.
    """
    cpu, flags = cpu_info()
    return {
        **_gpu(device),
        "cpu": cpu,
        "isa": [name for name in _ISA if name in flags],
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "gomp_spincount": os.environ.get("GOMP_SPINCOUNT"),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        **{name: _version(packages) for name, packages in _VERSIONS.items()},
        **checkout_state(CHECKOUT),
    }


def clocks(device: torch.device) -> dict:
    """Returns sm_clock_mhz and memory_clock_mhz at this moment; None on a CPU."""
    nvml, handle = _nvml(device)
    if nvml is None:
        return {"sm_clock_mhz": None, "memory_clock_mhz": None}
    return {
        "sm_clock_mhz": _ask(nvml, nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM),
        "memory_clock_mhz": _ask(nvml, nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_MEM),
    }


@functools.cache
def last_level_cache_bytes(device: torch.device) -> int:
    """Returns bytes of the cache before memory: L2 of a GPU, the largest cache of a CPU (32 MiB where unknown)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text().strip() for path in _CACHES.glob("index*/size")]
    return max((int(size[:-1]) << {"K": 10, "M": 20, "G": 30}[size[-1]] for size in sizes), default=32 << 20)


def _gpu(device: torch.device) -> dict:
    nvml, handle = _nvml(device)
    milliwatts = _ask(nvml, nvml.nvmlDeviceGetPowerManagementLimit, handle) if nvml else None
    return {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "driver": _ask(nvml, nvml.nvmlSystemGetDriverVersion) if nvml else None,
        "power_limit_watts": None if milliwatts is None else milliwatts / 1000,
    }


def _ask(nvml, question, *arguments):
    """Returns NVML's answer; None where this card, a virtual one or an instance of a card has none.

    Raises where the GPU is lost, because nothing is measured then.
    """
    try:
        return None if None in arguments else question(*arguments)
    except nvml.NVMLError_GpuIsLost:
        raise
    except nvml.NVMLError:
        return None


@functools.cache
def _nvml(device: torch.device):
    """Returns the module pynvml, initialised, and its handle of the device; None for what is missing.

    A container may have CUDA without NVML's library.
    """
    if device.type != "cuda":
        return None, None
    try:
        import pynvml

        pynvml.nvmlInit()
    except ImportError:
        return None, None
    except pynvml.NVMLError:
        return None, None
    with contextlib.suppress(pynvml.NVMLError):
        return pynvml, nvml_handle(pynvml, device)
    return pynvml, None


def _version(packages: tuple[str, ...]) -> str | None:
    """Returns the version of the first of these packages that is installed."""
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
    return None

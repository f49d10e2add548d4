"""What a number was measured on: hardware, versions, and the commit of the checkout."""

import functools
import importlib.metadata
import os
import platform
from pathlib import Path

import torch

from benchmarks.harness.checkout import CHECKOUT, checkout_state
from fastsiam.runtime.energy import nvml_handle

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
    """What a result line says of its machine; absent packages, and of a GPU what NVML does not tell, are None.

    Keys: gpu, driver, power_limit_watts; cpu, isa (the extensions that matter here), cores, threads,
    omp_wait_policy, gomp_spincount; python, cuda (that torch was built for), torch, triton, numba, torchvision, dali,
    lightly; commit and dirty, as `checkout_state` has them.
    """
    cpu, flags = _cpu()
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
    """sm_clock_mhz and memory_clock_mhz at this moment; None on a CPU."""
    nvml, handle = _nvml(device)
    if nvml is None:
        return {"sm_clock_mhz": None, "memory_clock_mhz": None}
    return {
        "sm_clock_mhz": _ask(nvml, nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM),
        "memory_clock_mhz": _ask(nvml, nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_MEM),
    }


@functools.cache
def last_level_cache_bytes(device: torch.device) -> int:
    """Bytes of the cache in front of memory: L2 of a GPU, the largest cache of a CPU (32 MiB where not known)."""
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
    """NVML's answer; None where this card, or a virtual one, does not tell, and for an instance of a card.

    Raises where the GPU is lost: what is measured then is nothing.
    """
    try:
        return None if None in arguments else question(*arguments)
    except nvml.NVMLError_GpuIsLost:
        raise
    except nvml.NVMLError:
        return None


@functools.cache
def _nvml(device: torch.device):
    """The module pynvml, initialised, and its handle of the device; None for what is not to be had.

    A container may have CUDA and not NVML's library.
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
    try:
        return pynvml, nvml_handle(pynvml, device)
    except pynvml.NVMLError:
        return pynvml, None


def _cpu() -> tuple[str, set[str]]:
    """Model name and instruction set flags, from Linux's /proc/cpuinfo."""
    fields = {}
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    return fields.get("model name", platform.machine()), set(fields.get("flags", fields.get("Features", "")).split())


def _version(packages: tuple[str, ...]) -> str | None:
    """Of the first of these that is installed."""
    for package in packages:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None

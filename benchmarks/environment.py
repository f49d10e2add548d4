"""What a number was measured on: hardware, versions, and the commit of the checkout."""

import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

from fastsiam.energy import nvml_handle

CHECKOUT = Path(__file__).resolve().parents[1]

# Result files are what a run writes while it measures; they change nothing that is measured.
_NOT_CODE = "benchmarks/results"

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
    """What a result line says of its machine; GPU fields and absent packages are None.

    Keys: gpu, driver, power_limit_watts; cpu, isa (the extensions that matter here), cores, threads,
    omp_wait_policy, gomp_spincount; python, cuda (that torch was built for), torch, triton, numba, torchvision, dali,
    lightly; commit (40 hex digits, None outside a git checkout) and dirty (True where a tracked file differs from it,
    or an untracked one is not ignored; files in benchmarks/results do not count).
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
    if device.type != "cuda":
        return {"sm_clock_mhz": None, "memory_clock_mhz": None}
    import pynvml

    handle = _nvml_handle(device)
    return {
        "sm_clock_mhz": _ask(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_SM),
        "memory_clock_mhz": _ask(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_MEM),
    }


def checkout_state(folder: Path) -> dict:
    """`{"commit", "dirty"}` of the git checkout `folder`; both None where it is none."""
    if not (folder / ".git").exists():
        return {"commit": None, "dirty": None}
    changed = _git(folder, "status", "--porcelain", "--", ".", f":(exclude){_NOT_CODE}")
    return {"commit": _git(folder, "rev-parse", "HEAD").strip(), "dirty": bool(changed.strip())}


@functools.cache
def last_level_cache_bytes(device: torch.device) -> int:
    """Bytes of the cache in front of memory: L2 of a GPU, the largest cache of a CPU (32 MiB where not known)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text().strip() for path in _CACHES.glob("index*/size")]
    return max((int(size[:-1]) << {"K": 10, "M": 20, "G": 30}[size[-1]] for size in sizes), default=32 << 20)


def _gpu(device: torch.device) -> dict:
    if device.type != "cuda":
        return {"gpu": None, "driver": None, "power_limit_watts": None}
    import pynvml

    milliwatts = _ask(pynvml.nvmlDeviceGetPowerManagementLimit, _nvml_handle(device))
    return {
        "gpu": torch.cuda.get_device_name(device),
        "driver": pynvml.nvmlSystemGetDriverVersion(),
        "power_limit_watts": None if milliwatts is None else milliwatts / 1000,
    }


def _ask(question, handle, *arguments):
    """NVML's answer; None where this card, or a virtual one, does not tell, and for an instance of a card."""
    import pynvml

    try:
        return None if handle is None else question(handle, *arguments)
    except (pynvml.NVMLError_NotSupported, pynvml.NVMLError_NoPermission):
        return None


@functools.cache
def _nvml_handle(device: torch.device):
    import pynvml

    pynvml.nvmlInit()
    return nvml_handle(pynvml, device)


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


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout

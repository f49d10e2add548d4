"""Versions and hardware of this machine."""

import contextlib
import os
import platform

import torch


def environment() -> dict:
    """Versions and hardware, for the run's environment.json."""
    import torchvision

    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "cuda": torch.version.cuda,
        "cpu_threads": torch.get_num_threads(),
        "cpu_cores": os.cpu_count(),
        "platform": platform.platform(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        found |= {
            "gpu": properties.name,
            "gpu_memory_bytes": properties.total_memory,
            "cudnn": torch.backends.cudnn.version(),
            "driver": driver_version(),
        }
    return found


def cpu_info() -> tuple[str, set[str]]:
    """Returns model name and instruction sets of the first CPU, as Linux names them.

    Where /proc/cpuinfo does not name them, the model is the architecture and the set is empty.
    """
    fields = {}
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    return fields.get("model name", platform.machine()), set(fields.get("flags", fields.get("Features", "")).split())


def driver_version() -> str | None:
    with contextlib.suppress(OSError), open("/proc/driver/nvidia/version", encoding="utf-8") as file:
        return file.readline().strip()
    return None

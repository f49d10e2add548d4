"""Versions and hardware of this machine."""

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


def cpu_flags() -> set[str]:
    """Instruction sets of the first CPU, as Linux names them; empty where they are not known."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = [line for line in file if line.startswith("flags")]
    except OSError:
        return set()
    return set(lines[0].split()) if lines else set()


def driver_version() -> str | None:
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8") as file:
            return file.readline().strip()
    except OSError:
        return None

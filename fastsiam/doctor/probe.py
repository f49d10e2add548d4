"""python -m fastsiam.doctor.probe NAME [ARGUMENT]: prints what one library knows of itself, in a line of JSON.

It runs in a process of its own: an import may fail in any way, end the process, or hang.
"""

import importlib
import importlib.metadata
import json
import os
import sys

from fastsiam.doctor.facts import ANSWER


def probe_torch() -> dict:
    """Returns version, cuda and hip (that it was built for), architectures, cpu_precision, gpus, cuda_error."""
    import torch

    from fastsiam.runtime.device import choose_precision

    found = {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cpu_precision": _name(choose_precision("auto", torch.device("cpu"))),
        "architectures": torch.cuda.get_arch_list(),
        "gpus": [],
        "cuda_error": None,
    }
    if torch.version.cuda or torch.version.hip:
        try:
            torch.cuda.init()
        except RuntimeError as error:
            found["cuda_error"] = _first_line(error)
        else:
            found["gpus"] = [_gpu(torch, choose_precision, index) for index in range(torch.cuda.device_count())]
    return found


def probe_triton() -> dict:
    """Returns version; ptxas: path of the assembler, None where it finds none."""
    import triton
    from triton import knobs

    try:
        ptxas = knobs.nvidia.ptxas.path
    except RuntimeError:
        ptxas = None
    return {"version": triton.__version__, "ptxas": ptxas}


def probe_nvml() -> dict:
    """Returns driver, cuda (`[major, minor]`), gpus (names); error (a class) and text where NVML does not open."""
    import pynvml

    try:
        pynvml.nvmlInit()
        version = pynvml.nvmlSystemGetCudaDriverVersion_v2()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return {
            "driver": pynvml.nvmlSystemGetDriverVersion(),
            "cuda": [version // 1000, version % 1000 // 10],
            "gpus": [pynvml.nvmlDeviceGetName(handle) for handle in handles],
            "error": None,
        }
    except pynvml.NVMLError as error:
        return {"driver": None, "cuda": None, "gpus": [], "error": type(error).__name__, "text": str(error)}


def probe_backend() -> dict:
    """Returns name and reason of the backend that data.backend=auto takes; the version of torchvision."""
    import torchvision

    from fastsiam.data.backends.choose import choose_backend

    name, reason = choose_backend("auto")
    return {"name": name, "reason": reason, "torchvision": torchvision.__version__}


def probe_pillow() -> dict:
    """Returns version; turbo: libjpeg-turbo's version, None where Pillow was built with another libjpeg."""
    import PIL
    from PIL import features

    return {"version": PIL.__version__, "turbo": features.version_feature("libjpeg_turbo")}


def probe_ffcv() -> dict:
    importlib.import_module("fastsiam.data.backends.ffcv_imports")
    # Its own __version__ says 0.0.3rc1 in 1.0.2.
    return {"version": importlib.metadata.version("ffcv")}


def probe_reading(folder: str) -> dict:
    """Returns the measurement of `fastsiam.data.read_speed`, with as many threads as cores allowed."""
    from fastsiam.data.read_speed import measure

    return measure(folder, threads=len(os.sched_getaffinity(0)))._asdict()


def probe_module(name: str) -> dict:
    """Imports any library that has a `__version__`."""
    return {"version": importlib.import_module(name).__version__}


def _gpu(torch, choose_precision, index):
    properties = torch.cuda.get_device_properties(index)
    found = {
        "name": properties.name,
        "capability": [properties.major, properties.minor],
        "memory": properties.total_memory,
        "free": None,
        "precision": None,
        "error": None,
    }
    try:
        with torch.cuda.device(index):
            found["free"] = torch.cuda.mem_get_info()[0]
            found["precision"] = _name(choose_precision("auto", torch.device("cuda", index)))
            # Kernels may be missing for this card, or the card belong to another process alone.
            torch.ones(8, device="cuda").mul(2).sum().item()
    except RuntimeError as error:
        found["error"] = _first_line(error)
    return found


def _name(dtype) -> str:
    from fastsiam.runtime.device import DTYPES

    return next(name for name, known in DTYPES.items() if known == dtype)


def _first_line(error) -> str:
    return str(error).strip().partition("\n")[0]


if __name__ == "__main__":
    answer = globals()[f"probe_{sys.argv[1]}"](*sys.argv[2:])
    # Libraries may print as well, and without a line's end.
    print(f"\n{ANSWER}{json.dumps(answer)}")

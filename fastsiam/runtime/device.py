"""Which device, precision and compiler setting a run gets, and what it says when the GPU's memory is too small."""

import contextlib
import os
from dataclasses import dataclass

import torch

from fastsiam.config.published import TABLE_2
from fastsiam.errors import UserError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Compute:
    """What a run computes with."""

    device: torch.device
    dtype: torch.dtype
    compiles: bool

    @property
    def names(self) -> dict:
        """`device` (cpu, cuda), `dtype` (bf16, fp16, fp32) and `compile` (bool), as checkpoints hold them."""
        dtype = next(name for name, known in DTYPES.items() if known == self.dtype)
        return {"device": self.device.type, "dtype": dtype, "compile": self.compiles}


def choose_compute(train, local_rank: int = 0, local_size: int = 1, before: dict | None = None) -> Compute:
    """What the `train` section of a config leads to on this machine.

    `before`: the `Compute.names` of the checkpoint that a run resumes from, as far as it holds them. Where the config
    says auto, its precision is kept if this machine computes it natively, and its compiler setting if the device is of
    the same type. Raises `UserError` as `choose_device` does.
    """
    device = choose_device(train.device, local_rank, local_size)
    precision, compiling = train.precision, train.compile
    before = before or {}
    if precision == "auto" and "dtype" in before and (before["dtype"] != "bf16" or _multiplies_bf16(device)):
        precision = before["dtype"]
    if compiling == "auto" and "compile" in before and before.get("device") == device.type:
        compiling = "on" if before["compile"] else "off"
    return Compute(device, choose_precision(precision, device), choose_compile(compiling, device))


def choose_device(asked: str, local_rank: int = 0, local_size: int = 1) -> torch.device:
    """`auto` is CUDA where there is a device, one for each of the `local_size` processes of this machine.

    Raises `UserError` where CUDA is asked for and absent, and for more processes than devices.
    """
    if asked == "cuda" and not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise UserError(
            f"train.device: cuda, but torch {torch.__version__} ({built}) sees no CUDA device; check nvidia-smi, or "
            "set train.device=cpu"
        )
    if asked == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_size > torch.cuda.device_count():
        raise UserError(
            f"train.device: {local_size} processes on this machine, and {torch.cuda.device_count()} CUDA devices; set "
            f"--nproc-per-node {torch.cuda.device_count()}, or train.device=cpu"
        )
    return torch.device("cuda", local_rank)


def choose_precision(asked: str, device: torch.device) -> torch.dtype:
    """The compute dtype; `auto` is bf16 where the hardware multiplies it natively."""
    if asked == "auto":
        asked = "bf16" if _multiplies_bf16(device) else "fp32"
    return DTYPES[asked]


def autocast(device: torch.device, dtype: torch.dtype):
    """A function giving the context in which forward passes run."""
    if dtype == torch.float32:
        return contextlib.nullcontext
    return lambda: torch.autocast(device.type, dtype)


def choose_compile(asked: str, device: torch.device) -> bool:
    return asked == "on" or (asked == "auto" and device.type == "cuda")


def environment() -> dict:
    """Versions and hardware, for the run's environment.json."""
    import platform

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
            "driver": _driver_version(),
        }
    return found


def out_of_memory_advice(batch_size: int, step_fits) -> str:
    """One sentence for a step that ran out of memory at `batch_size` images.

    `step_fits(batch)` tries a step of a smaller batch; the largest power-of-two fraction that fits is named with
    what the paper's Table 2 says it costs. None: a rank among several, which cannot try alone.
    """
    if step_fits is None:
        return (
            f"CUDA out of memory at train.batch_size={batch_size} over all processes; start more of them, or set "
            f"train.batch_size={batch_size // 2} ({_table_2_cost(batch_size // 2)}; the learning rate follows)"
        )
    smaller = batch_size // 2
    while smaller >= 2 and not step_fits(smaller):
        smaller //= 2
    if smaller < 2:
        return f"CUDA out of memory at train.batch_size={batch_size}, and even 2 does not fit; lower views.size"
    return (
        f"CUDA out of memory at train.batch_size={batch_size}; {smaller} fits (tried); {_table_2_cost(smaller)}; "
        f"set train.batch_size={smaller} (the learning rate follows)"
    )


def _table_2_cost(batch_size: int) -> str:
    nearest = min(TABLE_2, key=lambda size: abs(size.bit_length() - batch_size.bit_length()))
    return (
        f"the paper's Table 2 has {TABLE_2[nearest]} % at batch {nearest} against {max(TABLE_2.values())} % at 256 "
        "and 512 (ImageNet, 100 epochs)"
    )


def _multiplies_bf16(device: torch.device) -> bool:
    return torch.cuda.is_bf16_supported(False) if device.type == "cuda" else _cpu_multiplies_bf16()


def _cpu_multiplies_bf16() -> bool:
    capabilities = torch.backends.cpu.get_cpu_capability(), _cpu_flags()
    return capabilities[0].startswith("AVX512") and bool({"avx512_bf16", "amx_bf16"} & capabilities[1])


def _cpu_flags() -> set[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = [line for line in file if line.startswith("flags")]
    except OSError:
        return set()
    return set(lines[0].split()) if lines else set()


def _driver_version() -> str | None:
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8") as file:
            return file.readline().strip()
    except OSError:
        return None

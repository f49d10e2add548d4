"""Choices of device, precision and compilation, and advice for a GPU whose memory does not suffice."""

import contextlib
import os

import torch

from fastsiam.config.published import TABLE_2
from fastsiam.errors import Notice, UserError
from fastsiam.runtime.compile import eager_reason
from fastsiam.runtime.environment import cpu_info

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose_device(asked: str, local_rank: int = 0, local_size: int = 1) -> torch.device:
    """`auto` is CUDA where there is a device, one for each of the `local_size` processes of this machine.

    Raises `UserError` where CUDA is asked for and absent, and for more processes than devices.
    """
    if asked == "cuda" and not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise UserError(
            f"train.device: cuda, but torch {torch.__version__} ({built}) sees no CUDA device; check nvidia-smi, or "
            "set train.device=cpu",
            "no-cuda-device",
        )
    if asked == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_size > torch.cuda.device_count():
        raise UserError(
            f"train.device: {local_size} processes on this machine, and {torch.cuda.device_count()} CUDA devices; set "
            f"--nproc-per-node {torch.cuda.device_count()}, or train.device=cpu",
            "too-few-devices",
        )
    return torch.device("cuda", local_rank)


def choose_precision(asked: str, device: torch.device) -> torch.dtype:
    """The compute dtype; `auto` is bf16 where the hardware multiplies it natively."""
    if asked == "auto":
        asked = "bf16" if multiplies_bf16(device) else "fp32"
    return DTYPES[asked]


def autocast(device: torch.device, dtype: torch.dtype):
    """A function giving the context in which forward passes run."""
    if dtype == torch.float32:
        return contextlib.nullcontext
    return lambda: torch.autocast(device.type, dtype)


def choose_compile(asked: str, device: torch.device) -> bool:
    """True where the step is compiled: for `on`, and for `auto` where `eager_reason` finds nothing missing."""
    return asked == "on" or (asked == "auto" and eager_reason(device) is None)


def spinning_notice(device: torch.device) -> Notice | None:
    """A warning for a process that trains on several CPU threads which spin at OpenMP's barriers; None for others.

    Commands let them sleep (`fastsiam.cli.let_threads_sleep`); a program that has imported torch before cannot.
    """
    threads = torch.get_num_threads()
    if device.type == "cuda" or threads == 1 or "OMP_WAIT_POLICY" in os.environ:
        return None
    return Notice(
        f"{threads} threads of torch spin while they wait, which can slow a CPU run down 2 to 3 times; set the "
        "environment variable OMP_WAIT_POLICY=PASSIVE before torch is imported",
        "threads-spin",
    )


def out_of_memory_advice(batch_size: int, step_fits) -> str:
    """A sentence for a step that ran out of memory at `batch_size` images.

    `step_fits(batch)` tries a step of a smaller batch; the largest power-of-two fraction that fits is named with
    what the paper's Table 2 says it costs. None: a rank among several, which cannot try alone.
    """
    if step_fits is None:
        return (
            f"train.batch_size: CUDA out of memory at {batch_size} over all ranks; start more of them, or set "
            f"train.batch_size={batch_size // 2} ({_table_2_cost(batch_size // 2)}; the learning rate follows)"
        )
    smaller = batch_size // 2
    while smaller >= 2 and not step_fits(smaller):
        smaller //= 2
    if smaller < 2:
        return f"train.batch_size: CUDA out of memory at {batch_size}, and even 2 does not fit; lower views.size"
    return (
        f"train.batch_size: CUDA out of memory at {batch_size}; {smaller} fits (tried); {_table_2_cost(smaller)}; "
        f"set train.batch_size={smaller} (the learning rate follows)"
    )


def _table_2_cost(batch_size: int) -> str:
    nearest = min(TABLE_2, key=lambda size: abs(size.bit_length() - batch_size.bit_length()))
    return (
        f"the paper's Table 2 has {TABLE_2[nearest]} % at batch {nearest} against {max(TABLE_2.values())} % at 256 "
        "and 512 (ImageNet, 100 epochs)"
    )


def multiplies_bf16(device: torch.device) -> bool:
    """True where the hardware of `device` multiplies bf16 natively."""
    return torch.cuda.is_bf16_supported(False) if device.type == "cuda" else _cpu_multiplies_bf16()


def _cpu_multiplies_bf16() -> bool:
    capabilities = torch.backends.cpu.get_cpu_capability(), cpu_info()[1]
    return capabilities[0].startswith("AVX512") and bool({"avx512_bf16", "amx_bf16"} & capabilities[1])

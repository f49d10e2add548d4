"""Choices of device, precision and compilation, and advice for a GPU whose memory does not suffice."""

import contextlib
import os
from collections.abc import Callable

import torch

from fastsiam.config.published import TABLE_2
from fastsiam.config.schema import TrainConfig
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


def out_of_memory_advice(train: TrainConfig, sizes: list[int], step_fits: Callable[[int], bool] | None) -> str:
    """A sentence for a step of the config's batch, or of its micro batches, that ran out of memory.

    `sizes`: what train.micro_batch can be. `step_fits(size)` tries a step of such micro batches; the largest that fits
    is named with what SimSiam's Table 2 says of it. None: a rank among several, which cannot try alone.
    """
    at = f"train.batch_size: CUDA out of memory at {train.batch_size}"
    if train.micro_batch:
        at += f" in micro batches of {train.micro_batch}"
    if step_fits is None:
        at += " over all ranks"
    recompute = "" if train.checkpoint_activations else "train.checkpoint_activations=true"
    lower = f"set {recompute} or a smaller views.size" if recompute else "set a smaller views.size"
    smaller = [size for size in sizes if size < (train.micro_batch or train.batch_size)]
    if not smaller and train.micro_batch is None:
        return f"{at}, which divides into no micro batches; {lower}, or another train.batch_size"
    if not smaller:
        return f"{at}, of which there are no smaller ones; {lower}"
    fitting = smaller[-1] if step_fits is None else next(filter(step_fits, reversed(smaller)), None)
    if fitting is None:
        return f"{at}, and micro batches of {smaller[0]} do not fit either; {lower}"
    advice = f"start more of them, or set train.micro_batch={fitting}"
    if step_fits is not None:
        advice = f"train.micro_batch={fitting} fits (tried); set it"
    statistics = f"batch-norm statistics are then those of {fitting} images; {_table_2_cost(fitting)}"
    more = recompute and f"; {recompute} saves memory and leaves the statistics as they are (not tried)"
    return f"{at}; {advice} ({statistics}){more}"


def _table_2_cost(batch_size: int) -> str:
    nearest = min(TABLE_2, key=lambda size: abs(size.bit_length() - batch_size.bit_length()))
    return (
        f"SimSiam's Table 2 has {TABLE_2[nearest]} % at batch {nearest} against {max(TABLE_2.values())} % at 256 "
        "and 512 (ImageNet, 100 epochs)"
    )


def multiplies_bf16(device: torch.device) -> bool:
    """True where the hardware of `device` multiplies bf16 natively."""
    return torch.cuda.is_bf16_supported(False) if device.type == "cuda" else _cpu_multiplies_bf16()


def _cpu_multiplies_bf16() -> bool:
    capabilities = torch.backends.cpu.get_cpu_capability(), cpu_info()[1]
    return capabilities[0].startswith("AVX512") and bool({"avx512_bf16", "amx_bf16"} & capabilities[1])

"""Measurement of one kernel: implementations timed in turns, beside the bandwidth of a copy."""

import functools
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch

from benchmarks.harness.environment import last_level_cache_bytes
from benchmarks.harness.results import Results
from benchmarks.harness.timing import copy_bandwidth, count_launches, interleave, peak_memory

FUSED = {"cpu": "numba", "cuda": "triton"}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Several calls a sample on a GPU, where one takes tens of microseconds and an event resolves half of one.
CALLS = {"cuda": 5, "cpu": 1}
REPEATS = {"cuda": 100, "cpu": 30}
WARMUP = 5
# More than three times an H200's L2 of 60 MB.
INPUT_BYTES = 200_000_000


def time_cases(measure: Callable, results: Results, cases: Iterable, device: torch.device, minutes: float) -> None:
    """Calls `measure(results, case, device, seconds, bandwidth)` for each case; all take about `minutes`."""
    cases, bandwidth = list(cases), copy_bandwidth(device)
    for case in cases:
        measure(results, case, device, minutes * 60 / len(cases), bandwidth)


def image_sets(shape: tuple[int, ...], device: torch.device) -> list[torch.Tensor]:
    """Returns at least two random uint8 tensors of this shape, on a GPU more than its cache holds."""
    count = max(2, INPUT_BYTES // int(np.prod(shape))) if device.type == "cuda" else 2
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(device) for _ in range(count)]


def on_sets(function: Callable, sets: list) -> Callable[[int], object]:
    """Returns a function of a call's number, which chooses one of `sets`."""
    return lambda index: function(sets[index % len(sets)])


def time_kernel(
    results: Results,
    benchmark: str,
    params: dict,
    variants: Mapping[str, Callable[[int], object]],
    device: torch.device,
    *,
    bytes_moved: int,
    bandwidth: float,
    seconds: float,
    each: tuple[str, int] | None = None,
) -> None:
    """Times `variants`, functions of a call's number, in turns for about `seconds`, and writes a line of each.

    `bytes_moved`: the least that a call moves; `bandwidth`: of a copy, in bytes/s. `each`: what a call makes and how
    many of it, ("view", 64), for the time of one.
    """
    repeats, calls = REPEATS[device.type], CALLS[device.type]
    taken = interleave(variants, device=device, warmup=WARMUP, repeats=repeats, calls=calls, seconds=seconds)
    for name, samples in taken.items():
        rate, milliseconds = bytes_moved / samples.median, samples.median * 1000
        once = functools.partial(variants[name], 0)
        results.add(
            benchmark,
            name,
            params,
            samples,
            ms=milliseconds,
            **({f"ms_per_{each[0]}": milliseconds / each[1]} if each else {}),
            bytes_moved=bytes_moved,
            gigabytes_per_second=rate / 1e9,
            share_of_copy_bandwidth=rate / bandwidth,
            copy_gigabytes_per_second=bandwidth / 1e9,
            last_level_cache_bytes=last_level_cache_bytes(device),
            peak_memory_bytes=peak_memory(once, device),
            launches=count_launches(once, device),
        )

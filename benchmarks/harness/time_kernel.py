"""What the benchmarks of one kernel have in common: implementations timed in turns, against the copy bandwidth."""

import functools
from collections.abc import Callable, Mapping

import torch

from benchmarks.harness.environment import last_level_cache_bytes
from benchmarks.harness.results import Results
from benchmarks.harness.timing import count_launches, interleave, peak_memory


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
    repeats: int,
    calls: int,
    warmup: int = 3,
    each: tuple[str, int] | None = None,
) -> None:
    """Time `variants`, functions of a call's number, in turns for about `seconds`, and write a line of each.

    `bytes_moved`: the least that a call moves; `bandwidth`: of a copy, in bytes/s. `each`: what a call makes and how
    many of it, ("view", 64), for the time of one.
    """
    options = {"device": device, "warmup": warmup, "repeats": repeats, "calls": calls, "seconds": seconds}
    for name, samples in interleave(variants, **options).items():
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

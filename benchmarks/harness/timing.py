"""Timers of all benchmarks: variants take turns, caches are cold, CUDA events time the device, raw samples are kept.

An event pair on an idle CUDA stream times the host that enqueues, not the device. Before a sample the stream is
therefore kept busy for longer than enqueuing takes, unless a benchmark asks to include it.
"""

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness.environment import last_level_cache_bytes

MIN_ROUNDS = 3

# The device spins for twice as long as the host took to enqueue a sample in warm-up, and no longer than this: a call
# that enqueues for longer keeps ahead of the device by itself, or waits for it inside and cannot be hidden.
_HEAD_START = 2.0
_MAX_HEAD_START_SECONDS = 0.02
_SPIN_CYCLES = 10_000_000


@dataclass(frozen=True)
class Samples:
    """Seconds per call, raw, in the order they were taken."""

    seconds: tuple[float, ...]

    def __post_init__(self):
        if not self.seconds:
            raise ValueError("Samples: at least one sample is needed")

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def p20(self) -> float:
        """Linear interpolation between order statistics, as numpy's default."""
        return float(np.percentile(self.seconds, 20))

    @property
    def p80(self) -> float:
        return float(np.percentile(self.seconds, 80))


def interleave(
    variants: Mapping[str, Callable[[int], object]],
    *,
    device: torch.device,
    warmup: int = 3,
    repeats: int = 20,
    calls: int = 1,
    seconds: float | None = None,
    hide_enqueue: bool = True,
) -> dict[str, Samples]:
    """Times variants in turns, so that a machine that gets slower or faster does so for all of them.

    Each variant is called as f(i), where i counts its own calls from 0, warm-up included, so that it can choose one
    of several input sets. `warmup` untimed calls of each come first, then `repeats` rounds with one sample of every
    variant (`take_turns`). A sample is the seconds per call of `calls` calls; before it the last-level cache is
    overwritten. `seconds` limits the whole, warm-up included. On a CUDA device `hide_enqueue=False` keeps the host's
    time to enqueue in the sample: a training step has it, a kernel does not.
    """
    if not variants or repeats < 1 or calls < 1 or warmup < 1:
        raise ValueError("interleave: at least one variant, one repeat, one call and one warm-up call are needed")
    started = time.perf_counter()
    timer = _CudaTimer(device, hide_enqueue) if device.type == "cuda" else _HostTimer(device)
    for name, function in variants.items():
        timer.warm_up(name, function, warmup, calls)

    def sample(name, number):
        return timer.sample(name, variants[name], warmup + number * calls, calls)

    left = None if seconds is None else seconds - (time.perf_counter() - started)
    return take_turns(list(variants), sample, repeats, left)


def take_turns(
    names: list[str], sample: Callable[[str, int], float], rounds: int, seconds: float | None
) -> dict[str, Samples]:
    """Calls `sample(name, round)`, which returns seconds, for every name in each of `rounds` rounds.

    The order of names rotates by one from round to round. A round that would end after `seconds` does not begin, but
    at least 3 rounds are taken.
    """
    taken, longest, started = {name: [] for name in names}, 0.0, time.perf_counter()
    for number in range(rounds):
        begun = time.perf_counter()
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            taken[name].append(sample(name, number))
        now = time.perf_counter()
        longest = max(longest, now - begun)
        if seconds is not None and number + 1 >= MIN_ROUNDS and now - started + longest > seconds:
            break
    return {name: Samples(tuple(values)) for name, values in taken.items()}


class _HostTimer:
    """A monotonic clock around calls that return when they are done."""

    def __init__(self, device: torch.device):
        self._cache = torch.empty(2 * last_level_cache_bytes(device), dtype=torch.uint8)

    def warm_up(self, name: str, function: Callable, warmup: int, calls: int) -> None:
        for index in range(warmup):
            function(index)

    def sample(self, name: str, function: Callable, first: int, calls: int) -> float:
        self._cache.zero_()
        start = time.perf_counter()
        for index in range(first, first + calls):
            function(index)
        return (time.perf_counter() - start) / calls


class _CudaTimer:
    """Event pairs on the current stream, behind a spinning kernel that gives the host a head start."""

    def __init__(self, device: torch.device, hide_enqueue: bool):
        self._device, self._hide = device, hide_enqueue
        # Twice the L2, as several input sets of this size would be: 120 MB on an H200 take 0.03 ms to write.
        self._cache = torch.empty(2 * last_level_cache_bytes(device), dtype=torch.uint8, device=device)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._head_start = {}
        self._cycles_per_second = None

    def warm_up(self, name: str, function: Callable, warmup: int, calls: int) -> None:
        for index in range(warmup):
            torch.cuda.synchronize(self._device)
            start = time.perf_counter()
            function(index)
            enqueue_seconds = time.perf_counter() - start
        torch.cuda.synchronize(self._device)
        self._head_start[name] = min(_HEAD_START * enqueue_seconds * calls, _MAX_HEAD_START_SECONDS)

    def sample(self, name: str, function: Callable, first: int, calls: int) -> float:
        self._cache.zero_()
        if self._hide:
            torch.cuda._sleep(int(self._head_start[name] * self._spin_rate()))
        else:
            torch.cuda.synchronize(self._device)
        self._start.record()
        for index in range(first, first + calls):
            function(index)
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1000 / calls

    def _spin_rate(self) -> float:
        """Cycles a second, measured once after warm-up: an idle GPU runs at a fraction of its clock."""
        if self._cycles_per_second is None:
            self._start.record()
            torch.cuda._sleep(_SPIN_CYCLES)
            self._end.record()
            self._end.synchronize()
            self._cycles_per_second = _SPIN_CYCLES / (self._start.elapsed_time(self._end) / 1000)
        return self._cycles_per_second


def timed(function: Callable, device: torch.device) -> float:
    """Returns seconds of one call, to the end of the device's work."""
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def copy_bandwidth(device: torch.device, size: int | None = None, seconds: float | None = 10.0) -> float:
    """Bytes read plus bytes written per second by a copy of `size` bytes on the device, the median of 10.

    `size`: 1 GiB on a GPU and 256 MiB on a CPU, unless given: far over the caches.
    """
    size = size or (1 << 30 if device.type == "cuda" else 1 << 28)
    source, target = (torch.full((size,), fill, dtype=torch.uint8, device=device) for fill in (1, 2))
    taken = interleave({"copy": lambda i: target.copy_(source)}, device=device, repeats=10, seconds=seconds)
    return 2 * size / taken["copy"].median


def peak_memory(function: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that one call of `function` allocates at its peak, above what was allocated before; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def allocated_at_peak(function: Callable[[], object], device: torch.device) -> int:
    """Bytes of CPU tensors that one call of `function` has alive at a time, above what was alive before."""
    alive = peak = 0
    events = traced(function, device, memory=True)
    blocks = (event for event in events if event.get("name") == "[memory]")
    for event in sorted(blocks, key=lambda event: event["ts"]):
        alive += event["args"]["Bytes"]
        peak = max(peak, alive)
    return peak


def count_launches(function: Callable[[], object], device: torch.device) -> int | None:
    """Kernels that one call of `function` runs, copies and memsets apart, by torch.profiler; None on a CPU."""
    if device.type != "cuda":
        return None
    function()
    torch.cuda.synchronize(device)
    # The trace's categories keep kernels apart from annotations that the profiler also places on the device.
    return sum(event.get("cat") == "kernel" for event in traced(function, device))


def traced(function: Callable[[], object], device: torch.device, memory: bool = False) -> list[dict]:
    """Returns the events of torch.profiler's Chrome trace of one call of `function` and of the device's work for it.

    With `memory` also one named [memory] for each block that is allocated or freed.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, profile_memory=memory) as profiler:
        timed(function, device)
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        return json.loads(Path(file.name).read_text(encoding="utf-8"))["traceEvents"]

"""A loader that training waits for explains itself: what it lacks, and what to change."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fastsiam.config import Config
from fastsiam.data.backends.choose import dali_installed
from fastsiam.data.backends.resident import free_bytes
from fastsiam.data.sources.source import ImageSource
from fastsiam.runtime.cores import usable_cores

WAIT_LIMIT = 0.1
WINDOW_SECONDS = 60.0
# Of a core's time, from which on the disk is what the decoders wait for.
DISK_LIMIT = 0.5
# Below, opening a file costs more than reading it on: a seek of a spinning disk takes the time of 1 to 2 MB.
SMALL_FILE_BYTES = 1 << 20
# Side of a stored image against the view's, as in 256 and 224 px.
STORED_SIDE = 8 / 7
_IDLE, _IOWAIT = 3, 4


@dataclass(frozen=True)
class Window:
    """A minute or more of training."""

    wait_fraction: float
    """Share of the time in which training waited for data."""
    idle_cores: float
    """How many cores had nothing to do, on average."""
    disk_cores: float
    """How many had nothing to do but wait for a disk (proc(5)'s iowait), on average."""


@dataclass(frozen=True)
class Loading:
    """How a run loads its images, and what it has for that."""

    backend: str
    workers: int
    """Threads or processes."""
    cores: int
    dali_installed: bool
    small_files: bool
    """Each image is a file of its own, below a MB on average."""
    store_size: int
    """Side at which images are stored, a little larger than a view."""
    resident_bytes: int
    """All training images decoded at that size."""
    free_bytes: int
    """Memory where the backend `resident` would keep them."""


class Advice(NamedTuple):
    cause: str
    action: str


def advise(loading: Loading, window: Window) -> Advice | None:
    """What to change where more than a tenth of the time goes into waiting for data; None where nothing would help."""
    if window.wait_fraction <= WAIT_LIMIT or loading.backend in ("resident", "synthetic"):
        return None
    if loading.backend == "pil":
        install = "" if loading.dali_installed else "pip install nvidia-dali-cuda120, then "
        return Advice("PIL decodes and crops several times as slowly as DALI", f"{install}set data.backend=dali")
    if window.disk_cores >= DISK_LIMIT:
        if loading.small_files:
            return Advice("the disk is slow with many small files", "pack them: python -m fastsiam.prepare pack")
        return Advice("the disk is slow", "store smaller images: python -m fastsiam.prepare ffcv")
    more = min(loading.workers + int(window.idle_cores), loading.cores)
    if more > loading.workers:
        return Advice(
            f"{window.idle_cores:.0f} of {loading.cores} cores are idle",
            f"set data.workers={more} (now {loading.workers})",
        )
    if loading.resident_bytes <= loading.free_bytes / 2:
        return Advice(
            f"no core is idle, and all images take {loading.resident_bytes / 1e9:.1f} GB of memory decoded",
            f"set data.backend=resident data.store_size={loading.store_size}",
        )
    return Advice("no core is idle", "store smaller images: python -m fastsiam.prepare ffcv")


class LoaderWatch:
    """Adds up what training waits for, and judges each minute of it."""

    def __init__(self, describe: Callable[[], Loading]):
        """`describe` is asked only when training waits."""
        self._describe = describe
        self._waited = self._stepped = 0.0
        self._cpu_times = cpu_times()
        self._told: str | None = None

    def begin(self) -> None:
        """A loader has started; what the cores have done until the first one had is no part of a minute."""
        if not self._waited + self._stepped:
            self._cpu_times = cpu_times()

    def add(self, waited: float, stepped: float) -> str | None:
        """Seconds of waiting and of stepping; a sentence, once a minute at most, if it says something new to do."""
        self._waited, self._stepped = self._waited + waited, self._stepped + stepped
        total = self._waited + self._stepped
        if total < WINDOW_SECONDS:
            return None
        now = cpu_times()
        window = window_of(self._waited / total, self._cpu_times, now)
        self._waited = self._stepped = 0.0
        self._cpu_times = now
        found = advise(self._describe(), window) if window.wait_fraction > WAIT_LIMIT else None
        if found is None or found.action == self._told:
            return None
        self._told = found.action
        return (
            f"{100 * window.wait_fraction:.0f} % of the time is spent waiting for data: {found.cause}; {found.action}"
        )


def window_of(wait_fraction: float, before: dict[str, list[int]], after: dict[str, list[int]]) -> Window:
    """Of two `cpu_times`; cores that this process may use at both."""
    idle = disk = 0.0
    for core in before.keys() & after.keys():
        spent = [b - a for a, b in zip(before[core], after[core], strict=True)]
        total = max(sum(spent), 1)
        idle, disk = idle + spent[_IDLE] / total, disk + spent[_IOWAIT] / total
    return Window(wait_fraction, idle, disk)


def cpu_times() -> dict[str, list[int]]:
    """Ticks of user, nice, system, idle, iowait, ... of each core that this process may use (proc(5), stat)."""
    allowed = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    with open("/proc/stat", encoding="ascii") as file:
        lines = [line.split() for line in file if line.startswith("cpu")]
    return {line[0]: [int(ticks) for ticks in line[1:9]] for line in lines if line[0] in allowed}


def describe(config: Config, source: ImageSource | None, backend: str, device: torch.device) -> Loading:
    """What `advise` needs to know of a run."""
    cores = usable_cores()
    count = len(source or ())
    side = round(STORED_SIDE * max(group.full_size for group in config.views))
    in_files = count and backend != "ffcv" and source.packed is None
    small_files = bool(in_files and source.file_sizes.mean() < SMALL_FILE_BYTES)
    return Loading(
        backend=backend,
        workers=cores if config.data.workers is None else config.data.workers,
        cores=cores,
        dali_installed=dali_installed(),
        small_files=small_files,
        store_size=side,
        resident_bytes=3 * side**2 * count,
        free_bytes=free_bytes(device),
    )

"""Source images per second of loaders alone: files in, batches of two finished views of each image out.

Ours are `fastsiam.data.loader.Loader`s as training has them; beside them, on the same files in the same run, the
authors' transforms, lightly's and solo-learn's. A sample is an epoch from its start to its last batch, so that nobody
begins with batches that were made while another was timed.
"""

import contextlib
import functools
import gc
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np
import psutil
import torch

from benchmarks import peers
from benchmarks.harness.cli import command
from benchmarks.harness.images import SUFFIXES, photographs
from benchmarks.harness.results import Results
from benchmarks.harness.timing import interleave
from benchmarks.peers import AbsentError, authors, lightly, solo_learn
from fastsiam.config import load_config
from fastsiam.config.views import ViewGroup, ViewSpec
from fastsiam.data.backends.choose import choose_backend, open_backend
from fastsiam.data.loader import Loader
from fastsiam.data.sources.open import open_source
from fastsiam.data.sources.source import ImageSource, new_source
from fastsiam.prepare.ffcv import write_beton
from fastsiam.runtime import malloc

SIZE, SMALL_SIZE = 224, 96
DRAWN_IMAGES, IMAGES_PER_WORKER = 256, 256
BATCH = {"cpu": 64, "cuda": 128}
REPEATS = 10
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """Comparison: what its loaders share."""

    paths: tuple[str, ...]
    """Paths of an epoch; the files of a small folder come several times."""
    photographs: str
    size: int
    workers: int
    batch_size: int
    device: torch.device

    @property
    def params(self) -> dict:
        """`images` a sample, and what else the rows of one comparison have in common."""
        return {
            "photographs": self.photographs,
            "size": self.size,
            "workers": self.workers,
            "batch": self.batch_size,
            "images": len(self.paths),
        }


@dataclass
class Row:
    """A loader as `interleave` calls it: an epoch a call, its images counted, its CPU seconds kept."""

    name: str
    images: int
    epoch: Callable[[int], int]
    """Drains the epoch of this number and returns how many images came."""
    description: str | None = None
    cpu_seconds: list[float] = field(default_factory=list)

    def __call__(self, index: int) -> None:
        before = cpu_seconds()
        delivered = self.epoch(index)
        self.cpu_seconds.append(cpu_seconds() - before)
        if delivered != self.images:
            raise RuntimeError(f"loader: {self.name} delivered {delivered} of {self.images} images")


def cpu_seconds() -> float:
    """CPU time of this process and of all below it, living (in clock ticks of 10 ms) and reaped."""
    own = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    seconds = sum(usage.ru_utime + usage.ru_stime for usage in own)
    for process in psutil.Process().children(recursive=True):
        # One may end between the listing and the reading.
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            seconds += times.user + times.system + times.children_user + times.children_system
    return seconds


def drain(batches: Iterable, device: torch.device) -> int:
    """Returns the number of images in batches `[x1, ...]` of views [N, 3, S, S], after all are finished on `device`."""
    images = 0
    for batch in batches:
        views = [x.to(device, non_blocking=True) for x in batch]
        images += len(views[0])
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return images


def check_installed(backend: str) -> None:
    """Raises `AbsentError` for a backend that is not installed."""
    try:
        choose_backend(backend)
    except ImportError as error:
        raise AbsentError(str(error)) from error


def ours(
    case: Case,
    backend: str,
    color: str = "matrix",
    dtype=torch.float32,
    decode_device=None,
    num_views=2,
    backend_augments=False,
    source=None,
    store_size=None,
):
    """Epochs of the training loader, and its backend in words; raises `AbsentError` for one that is not installed.

    `decode_device`: where decoding, cropping and augmenting happen before the views go to the case's device.
    `backend_augments`: DALI's own operators make the views (`data.augment=dali`). `source`: in place of the files.
    """
    check_installed(backend)
    config = load_config("r50_100ep", [f"views.size={case.size}", f"views.color={color}"])
    groups = (config.view_groups[0]._replace(count=num_views),)
    source = source or source_of(case.paths)
    device = decode_device or case.device
    if backend_augments:
        from fastsiam.data.backends import dali_augment

        opened = dali_augment.open_backend(source, groups, case.batch_size, case.workers, device, dtype)
    else:
        numbers = (case.size,), case.batch_size, case.workers
        opened = open_backend(backend, source, *numbers, device, store_size)
    numbers = {"batch_size": case.batch_size, "seed": 0, "dtype": dtype}
    loader = Loader(source, groups, opened, **numbers)

    def epoch(index):
        return drain((batch.views[0].chunk(num_views) for batch in loader.epoch(index)), case.device)

    return epoch, opened.description


def decoded_twice(case: Case, backend: str):
    """Each image decoded once for each of its views, as two pipelines with a decoder each do."""
    epoch, description = ours(case, backend, num_views=1)
    return lambda index: (epoch(2 * index) + epoch(2 * index + 1)) // 2, description


def from_beton(case: Case):
    """Loader of the files as `prepare ffcv` stores them by default, written before anything is timed."""
    check_installed("ffcv")
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "images.beton"
    write_beton(source_of(case.paths), path)
    epoch, description = ours(case, "ffcv", source=open_source(str(path)))
    # Removed with it.
    epoch.folder = folder
    return epoch, description


def from_memory(case: Case):
    """Loader of files decoded to the size of the views beforehand: only crops and augmentation are timed."""
    folder = tempfile.TemporaryDirectory()
    with mock.patch.dict(os.environ, XDG_CACHE_HOME=folder.name):
        epoch, description = ours(case, "resident", store_size=case.size)
    epoch.folder = folder
    return epoch, description


def source_of(paths: tuple[str, ...]) -> ImageSource:
    """Returns the files as a source; one may come several times."""
    return new_source(Path("/"), [(Path(path).resolve().relative_to("/"), os.stat(path).st_size) for path in paths])


def peer(case: Case, build_loader: Callable, *more):
    """Epochs of a peer's loader."""
    groups = (ViewGroup(2, ViewSpec(size=case.size, color="exact")),)
    numbers = {"groups": groups, "batch_size": case.batch_size, "workers": case.workers, "device": case.device}
    batches = build_loader(list(case.paths), *more, **numbers)
    return lambda index: drain((batch[:2] for batch in batches), case.device), None


def builders(device: torch.device, checkout: Path | None) -> dict[str, Callable]:
    """Every row of a full comparison as a function of its case."""
    rows = {
        "dali matrix": functools.partial(ours, backend="dali"),
        "dali matrix bf16": functools.partial(ours, backend="dali", dtype=torch.bfloat16),
        "dali exact": functools.partial(ours, backend="dali", color="exact"),
        "dali, its own augmentation": functools.partial(ours, backend="dali", backend_augments=True),
        "dali, its own augmentation, bf16": functools.partial(
            ours, backend="dali", backend_augments=True, dtype=torch.bfloat16
        ),
        "dali matrix, decoded twice": functools.partial(decoded_twice, backend="dali"),
        "pil matrix": functools.partial(ours, backend="pil"),
        "ffcv matrix": from_beton,
        "resident matrix": from_memory,
        "authors": functools.partial(peer, build_loader=authors.build_loader),
        "lightly": functools.partial(peer, build_loader=lightly.build_loader),
        "solo-learn": lambda case: peer(case, solo_learn.build_loader, checkout),
        "solo-learn DALI": lambda case: peer(case, solo_learn.build_dali_loader, checkout),
    }
    if device.type == "cuda":
        rows["dali matrix, all on the CPU"] = functools.partial(ours, backend="dali", decode_device=CPU)
    return rows


def measure(results: Results, case: Case, builds: dict[str, Callable], seconds: float) -> None:
    """Builds the rows of one comparison, runs an epoch of each in turns, and writes their lines."""
    rows, absent = [], {}
    for name, build in builds.items():
        try:
            rows.append(Row(name, len(case.paths), *build(case)))
        except AbsentError as error:
            absent[name] = str(error)
    # Host time on every device: an epoch ends with the device's work.
    taken = interleave({row.name: row for row in rows}, device=CPU, warmup=1, repeats=REPEATS, seconds=seconds)
    for row in rows:
        samples = taken[row.name]
        results.add(
            "loader",
            row.name,
            case.params,
            samples,
            images_per_second=row.images / samples.median,
            cpu_seconds_per_image=cpu_seconds_per_image(row, len(samples.seconds)),
            description=row.description,
        )
    for name, sentence in absent.items():
        results.add("loader", name, case.params, None, absent=sentence)


def cpu_seconds_per_image(row: Row, rounds: int) -> float:
    """Returns the median of the last `rounds` epochs, which are the timed ones."""
    return float(np.median(row.cpu_seconds[-rounds:])) / row.images


def files_of(folder: Path) -> list[str]:
    """Returns the JPEGs below a folder as absolute paths, sorted by their relative names."""
    source = open_source(str(folder.resolve()))
    paths = (str(source.path(index)) for index in range(len(source)))
    return [path for path in paths if path.lower().endswith(SUFFIXES)]


def cases(files: list[str], label: str, device: torch.device) -> list[Case]:
    """Returns the full comparison with a thread a core, then those with fewer threads and with smaller views."""
    cores, batch_size = len(os.sched_getaffinity(0)), BATCH[device.type]

    def case(size, workers):
        count = IMAGES_PER_WORKER * workers
        repeated = tuple(files[index % len(files)] for index in range(count))
        return Case(repeated, label, size, workers, batch_size, device)

    fewer = sorted({max(cores // 4, 1), 1} - {cores}, reverse=True)
    return [case(SIZE, cores), *(case(SIZE, workers) for workers in fewer), case(SMALL_SIZE, cores)]


def run(
    results: Results,
    *,
    device: torch.device,
    minutes: float,
    images: Path | None = None,
    solo_learn: Path | None = None,
) -> None:
    """Every comparison within about `minutes`; `images` is a folder of JPEGs, drawn ones stand in for none."""
    deadline = time.perf_counter() + 60 * minutes
    if device.type == "cpu":
        # As in training. The peers' workers are processes of their own, which this does not reach.
        malloc.keep_freed()
    # Workers begin as forks of a process that has imported what all of them need.
    multiprocessing.set_forkserver_preload(["torch", "torchvision.transforms", peers.__name__])
    every = builders(device, solo_learn)
    few = {name: every[name] for name in ("dali matrix", "authors")}
    with tempfile.TemporaryDirectory() as scratch:
        folder, label = photographs(images, scratch, DRAWN_IMAGES)
        first, *others = cases(files_of(folder), label, device)
        # The peers' part of the time, by the number of epochs in a round.
        share = len(every) / (len(every) + len(few) * len(others))
        measure(results, first, every, share * (deadline - time.perf_counter()))
        for number, case in enumerate(others):
            gc.collect()
            measure(results, case, few, (deadline - time.perf_counter()) / (len(others) - number))


if __name__ == "__main__":
    sys.exit(command(run, "loader", "Time the loaders.", minutes=4.0))

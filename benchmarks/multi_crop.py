"""Multi-crop's price: source images per second with two large views of each, and with six small ones beside them.

Each loader makes both kinds of epochs from the same files, all of them in turns in one run. Views have the numbers of
SwAV (arXiv 2006.09882, section 4 and appendix A): two crops of 14 to 100 % of the area at 224 px, six of 5 to 14 % at
96 px. An image is decoded once for all of its views, by ours and by solo-learn's pipelines.
"""

import functools
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import peers
from benchmarks.harness.cli import command
from benchmarks.harness.images import photographs
from benchmarks.harness.results import Results
from benchmarks.harness.timing import interleave
from benchmarks.loader import (
    BATCH,
    CPU,
    DRAWN_IMAGES,
    IMAGES_PER_WORKER,
    REPEATS,
    Case,
    Row,
    check_installed,
    cpu_seconds_per_image,
    drain,
    files_of,
    source_of,
)
from benchmarks.peers import AbsentError, solo_learn
from fastsiam.config.views import ViewGroup, ViewSpec
from fastsiam.data.backends.choose import open_backend
from fastsiam.data.loader import Loader
from fastsiam.errors import UserError
from fastsiam.runtime import malloc

SIZE, SMALL_SIZE = 224, 96
OURS = "fastsiam"
# Of our images/s with two views, what is asked of eight.
GOAL = 0.6
_JITTER = {"color": "matrix", "brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}


def groups_of(size: int, small: int) -> dict[str, tuple[ViewGroup, ...]]:
    """Returns the views of both kinds of epochs, by their names."""
    large = ViewGroup(2, ViewSpec(size=size, crop_scale=(0.14, 1.0), **_JITTER))
    others = ViewGroup(6, ViewSpec(size=small, crop_scale=(0.05, 0.14), **_JITTER))
    return {f"2 x {size}": (large,), f"2 x {size} + 6 x {small}": (large, others)}


def ours(case: Case, groups: tuple[ViewGroup, ...]):
    """Returns epochs of the training loader, and its backend in words."""
    check_installed("dali")
    source, sizes = source_of(case.paths), tuple(group.spec.size for group in groups)
    backend = open_backend("dali", source, sizes, case.batch_size, case.workers, case.device, None)
    loader = Loader(source, groups, backend, batch_size=case.batch_size, seed=0, dtype=torch.float32)

    def epoch(index):
        batches = loader.epoch(index)
        views = ((view for views, group in zip(batch.views, groups, strict=True) for view in views.chunk(group.count))
                 for batch in batches)  # fmt: skip
        return drain((list(of_batch) for of_batch in views), case.device)

    return epoch, backend.description


def theirs(case: Case, groups: tuple[ViewGroup, ...], build_loader: Callable, checkout: Path | None):
    """Returns epochs of a pipeline of solo-learn."""
    numbers = {"batch_size": case.batch_size, "workers": case.workers, "device": case.device}
    batches = build_loader(list(case.paths), checkout, groups=groups, **numbers)
    count = sum(group.count for group in groups)
    return lambda index: drain((batch[:count] for batch in batches), case.device), None


def builders(checkout: Path | None) -> dict[str, Callable]:
    """Returns every loader as a function of its case and its views."""
    return {
        OURS: ours,
        "solo-learn": functools.partial(theirs, build_loader=solo_learn.build_loader, checkout=checkout),
        "solo-learn DALI": functools.partial(theirs, build_loader=solo_learn.build_dali_loader, checkout=checkout),
    }


def measure(results: Results, case: Case, builds: dict[str, Callable], small: int, seconds: float) -> None:
    """Builds each loader for both kinds of views, runs an epoch of each in turns, and writes their lines."""
    kinds, rows, absent = groups_of(case.size, small), {}, {}
    for name, build in builds.items():
        try:
            for views, groups in kinds.items():
                rows[name, views] = Row(f"{name}, {views}", len(case.paths), *build(case, groups))
        except AbsentError as error:
            absent[name] = str(error)
    taken = interleave({row.name: row for row in rows.values()}, device=CPU, warmup=1, repeats=REPEATS, seconds=seconds)
    two, _ = kinds
    for (name, views), row in rows.items():
        samples = taken[row.name]
        share = taken[rows[name, two].name].median / samples.median
        goal = {"goal": f"{GOAL:g}x: {'met' if share >= GOAL else 'missed'}"} if name == OURS and views != two else {}
        results.add(
            "multi_crop", name, {**case.params, "views": views}, samples,
            images_per_second=row.images / samples.median, share_of_two_views=share,
            cpu_seconds_per_image=cpu_seconds_per_image(row, len(samples.seconds)), description=row.description, **goal,
        )  # fmt: skip
    for name, sentence in absent.items():
        for views in kinds:
            results.add("multi_crop", name, {**case.params, "views": views}, None, absent=sentence)


def run(
    results: Results,
    *,
    device: torch.device,
    minutes: float,
    images: Path | None = None,
    rows: tuple[str, ...] = (),
    solo_learn: Path | None = None,
) -> None:
    """One comparison with a thread a core; `images` is a folder of JPEGs, drawn ones stand in for none.

    `rows`: the loaders, all where none is named. solo-learn's PIL transforms take minutes a round.
    """
    every = builders(solo_learn)
    for name in rows:
        if name not in every:
            message = f"--rows: '{name}' is unknown; write some of {'; '.join(every)}"
            raise UserError(message, code="unknown-row")
    if device.type == "cpu":
        malloc.keep_freed()
    # Workers begin as forks of a process that has imported what all of them need.
    multiprocessing.set_forkserver_preload(["torch", "torchvision.transforms", peers.__name__])
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as scratch:
        folder, label = photographs(images, scratch, DRAWN_IMAGES)
        files = files_of(folder)
        paths = tuple(files[index % len(files)] for index in range(IMAGES_PER_WORKER * cores))
        case = Case(paths, label, SIZE, cores, BATCH[device.type], device)
        chosen = {name: every[name] for name in rows or every}
        measure(results, case, chosen, SMALL_SIZE, 60 * minutes)


if __name__ == "__main__":
    sys.exit(command(run, "multi_crop", "Time loaders of two and of eight views.", minutes=6.0))

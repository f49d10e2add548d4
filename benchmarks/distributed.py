"""What one compiled graph costs in overlap: the training step on several ranks, its gradients reduced in several ways.

The trainer compiles forward and backward as one graph inside DDP, so all gradients are complete at the same moment, and
their reduction overlaps with nothing. In eager mode DDP reduces a bucket while the backward goes on below it; with its
own optimiser (`torch._dynamo.config.optimize_ddp`) the graph is compiled in pieces, one a bucket, and it does so there.
Rows whose statistics are those of one rank tell the gradients' price from that of synchronised batch norm.
"""

import contextlib
import functools
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch._inductor.utils import fresh_cache

from benchmarks.harness.cli import command
from benchmarks.harness.ranks import in_ranks, in_turns, threads_of_each
from benchmarks.harness.results import Results
from benchmarks.harness.timing import MIN_ROUNDS, Samples
from benchmarks.peers import AbsentError
from benchmarks.variants.gradient_reduction import ONE_GRAPH, PIECES, Step, Way, all_reduce, build_step
from fastsiam.config import Config, load_config
from fastsiam.data.build import build_loader
from fastsiam.errors import UserError
from fastsiam.runtime import malloc
from fastsiam.runtime.device import choose_precision
from fastsiam.runtime.distributed import World

RANKS = 2
# Config, and images a rank.
SETTINGS = {"cpu": ("r18_cifar10_800ep", 32), "cuda": ("r50_100ep", 256)}
CALLS = {"cpu": 1, "cuda": 5}
WARMUP, REPEATS = 1, 10
# Of one compiled row, rough, and used only to tell whether it fits into the time.
COMPILE_SECONDS = {"cpu": 120, "cuda": 100}
NO_TIME = "the time was too short; give more --minutes"
INPUT_SETS = 2

SILENT = Way(statistics="one rank", gradients=False)
ALL_REDUCE = "all-reduce alone"
ROWS = {
    "no communication": SILENT,
    "no communication, compiled": Way(ONE_GRAPH, "one rank", gradients=False),
    "fastsiam": Way(),
    "fastsiam, compiled": Way(ONE_GRAPH),
    "compiled in pieces": Way(PIECES),
    "nn.SyncBatchNorm": Way(statistics="SyncBatchNorm"),
    "gradients only": Way(statistics="one rank"),
    "gradients only, compiled": Way(ONE_GRAPH, "one rank"),
    "gradients only, in pieces": Way(PIECES, "one rank"),
}
# The same step on the first rank, while the others wait.
ALONE = {"one process": "no communication", "one process, compiled": "no communication, compiled"}
TABLE = (*ALONE, *ROWS, ALL_REDUCE)
NEEDED = ("no communication", "fastsiam")
# What the question is about, before what explains the answer.
COMPILED = ("fastsiam, compiled", "compiled in pieces", "no communication, compiled")


@dataclass
class Row:
    """A row that has been built."""

    call: Callable[[int], object]
    step: Step | None = None
    first_step_seconds: float | None = None
    """The slowest rank's; compilation is part of it, with empty caches."""
    seconds: float = 0.0
    """The slowest rank's second step."""


class Rows:
    """The rows of a config on this rank; all ranks call the same methods in the same order."""

    def __init__(self, world: World, device: torch.device, config: Config, deadline: float):
        """`deadline`: on the clock time.monotonic, which the processes of a machine share."""
        self.world, self.device, self.config, self._deadline = world, device, config, deadline
        self.dtype = choose_precision(config.train.precision, device)
        self.views = views_of_rank(config, device, self.dtype, world)
        self.built: dict[str, Row] = {}
        self.absent: dict[str, str] = {}

    def prepare(self) -> None:
        """Build what fits into the time and run two steps of each; what does not run here is in `absent`."""
        eager = [name for name, way in ROWS.items() if way.compiled is None]
        for name in dict.fromkeys((*NEEDED, *eager, *COMPILED, *ROWS)):
            if self.world.share(name in NEEDED or self._fits(ROWS[name])):
                self._prepare(name)
            else:
                self.absent[name] = NO_TIME
        for name, same in ALONE.items():
            if same in self.absent:
                self.absent[name] = self.absent[same]
                continue
            row = self.built[same]
            call = row.call if self.world.is_first else lambda index: None
            self.built[name] = Row(call, row.step, row.first_step_seconds, row.seconds)
        self.built[ALL_REDUCE] = Row(all_reduce(self.gradient_bytes // 4, self.device))

    def measure(self) -> dict[str, Samples] | None:
        """Seconds a step of what was built, in turns; on the first rank."""
        calls = {name: self.built[name].call for name in TABLE if name in self.built}
        left = max(self._deadline - time.monotonic(), 0)
        return in_turns(
            self.world,
            self.device,
            calls,
            together=CALLS[self.device.type],
            warmup=WARMUP,
            repeats=REPEATS,
            seconds=left,
        )

    @property
    def gradient_bytes(self) -> int:
        """What every rank has to reduce, in fp32."""
        return 4 * sum(parameter.numel() for parameter in self.built["fastsiam"].step.module.parameters())

    def _fits(self, way):
        rounds = WARMUP + MIN_ROUNDS * CALLS[self.device.type]
        steps = [row.seconds for row in self.built.values()]
        planned = rounds * sum(steps) + (rounds + 2) * max(steps)
        return time.monotonic() + planned + (COMPILE_SECONDS[self.device.type] if way.compiled else 0) < self._deadline

    def _prepare(self, name):
        """A reason that all ranks meet before they wait in a collective; an error ends the benchmark."""
        try:
            step = build_step(ROWS[name], self.config, self.device, self.dtype, self.world)
            # Else a row would find what an earlier one, or an earlier run, has compiled.
            with fresh_cache() if step.compiles else contextlib.nullcontext():
                first = self._timed(step, 0)
            step.check()
            mine = None, first, self._timed(step, 1)
        except AbsentError as error:
            mine = str(error), 0.0, 0.0
        reasons, first, second = zip(*self.world.collect(mine), strict=True)
        reason = next(filter(None, reasons), None)
        if reason:
            self.absent[name] = reason
            return
        call = functools.partial(_on_views, step, self.views)
        self.built[name] = Row(call, step, max(first), max(second))
        if self.world.is_first:
            print(f"{name}: steps of {max(first):.1f} and {max(second):.2f} s", flush=True)

    def _timed(self, step, index):
        start = time.perf_counter()
        _on_views(step, self.views, index)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start


def _on_views(step, views, index):
    return step(views[index % len(views)])


def views_of_rank(config: Config, device: torch.device, dtype: torch.dtype, world: World) -> list[torch.Tensor]:
    """This rank's part, [2N, 3, S, S] of N images, of different synthetic batches."""
    views = []
    for seed in range(INPUT_SETS):
        # The synthetic backend has the same numbers for every rank.
        seeded = config.with_values({"train.seed": seed + INPUT_SETS * world.rank})
        loader = build_loader(seeded, device=device, dtype=dtype, rank=world.rank, world_size=world.size)
        views.append(next(loader.epoch(0)).views)
    return views


def measure(world: World, device: torch.device, config: Config, deadline: float) -> dict | None:
    """On every rank; on the first one (samples or None, numbers) of every row, by name."""
    if device.type == "cpu":
        malloc.keep_freed()
    torch.backends.cudnn.benchmark = device.type == "cuda"
    rows = Rows(world, device, config, deadline)
    rows.prepare()
    taken = rows.measure()
    return taken and {name: _numbers(name, rows, taken) for name in TABLE}


def _numbers(name, rows, taken):
    if name in rows.absent:
        return None, {"absent": rows.absent[name]}
    samples, row, size = taken[name], rows.built[name], rows.world.size
    if name == ALL_REDUCE:
        return samples, {"bytes": rows.gradient_bytes}
    rate = rows.config.train.batch_size / samples.median / (size if name in ALONE else 1)
    compiled = ", compiled" if row.step.compiles else ""
    silent, alone = (taken.get(other + compiled) for other in ("no communication", "one process"))
    return samples, {
        "images_per_second": rate,
        "share_of_silent": silent and silent.median / samples.median if name not in ALONE else None,
        "efficiency": alone and alone.median / samples.median if name not in ALONE else None,
        "first_step_seconds": row.first_step_seconds,
        "graphs": row.step.graphs(),
        "way": asdict(ROWS[ALONE.get(name, name)]),
    }


def run(results: Results, *, device: torch.device, minutes: float, ranks: int | None = None) -> None:
    """All rows on `ranks` processes of this machine (2) within about `minutes`; what does not run is absent."""
    deadline = time.monotonic() + 60 * minutes
    size = RANKS if ranks is None else ranks
    if size < 2:
        raise UserError(f"--ranks: {size} has nobody to exchange gradients with; give 2 or more")
    name, images = SETTINGS[device.type]
    overrides = [f"train.batch_size={size * images}", f"train.device={device.type}", "data.backend=synthetic"]
    config = load_config(name, overrides)
    params = {
        "encoder": config.model.encoder,
        "size": config.views.size,
        "batch": config.train.batch_size,
        "ranks": size,
        "threads a rank": threads_of_each(size),
        "precision": str(choose_precision(config.train.precision, device)).removeprefix("torch."),
        "collectives": "NCCL" if device.type == "cuda" else "gloo",
    }
    if device.type == "cuda" and torch.cuda.device_count() < size:
        reason = f"{size} ranks need {size} GPUs, and here is {torch.cuda.device_count()}"
        found = dict.fromkeys(TABLE, (None, {"absent": reason}))
    else:
        found = in_ranks(size, device.type, measure, config, deadline)
    for row, (samples, numbers) in found.items():
        results.add("distributed", row, params, samples, **numbers)


if __name__ == "__main__":
    sys.exit(command(run, "distributed", "Time the training step on several ranks.", minutes=15.0))

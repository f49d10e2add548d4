"""Price of several ranks: the product's training beside steps that share statistics and reduce gradients differently.

The product compiles forward and backward as one graph inside DDP, so all gradients are complete at the same moment, and
their reduction overlaps with nothing. In eager mode DDP reduces a bucket during the backward below it; with its own
optimiser (`torch._dynamo.config.optimize_ddp`) the graph is compiled in pieces, one a bucket, with the same overlap.
Rows whose statistics are those of one rank separate the price of gradients from that of synchronised batch norm.
"""

import contextlib
import sys
import time
from dataclasses import asdict, replace

import torch
from torch._inductor.utils import fresh_cache

from benchmarks.harness.cli import command
from benchmarks.harness.ranks import in_ranks, in_turns, threads_of_each
from benchmarks.harness.results import Results
from benchmarks.harness.timing import MIN_ROUNDS, Samples, timed
from benchmarks.peers import AbsentError
from benchmarks.variants.gradient_reduction import ONE_GRAPH, PIECES, Step, Way, all_reduce, build_product, build_step
from fastsiam.config import Config, load_config
from fastsiam.data.build import build_loader
from fastsiam.errors import UserError
from fastsiam.runtime.device import choose_precision
from fastsiam.runtime.distributed import World
from fastsiam.runtime.runtime import Runtime

RANKS = 2
# Config, and images a rank.
SETTINGS = {"cpu": ("r18_cifar10_800ep", 32), "cuda": ("r50_100ep", 256)}
CALLS = {"cpu": 1, "cuda": 5}
WARMUP, REPEATS = 1, 10
# Rough time of one compiled row, to decide whether it fits.
COMPILE_SECONDS = {"cpu": 120, "cuda": 100}
NO_TIME = "the time was too short; give more --minutes"
INPUT_SETS = 2

ALL_REDUCE = "all-reduce alone"
PRODUCT = {"fastsiam": Way(), "fastsiam, compiled": Way(ONE_GRAPH)}
ROWS = {
    "no communication": Way(statistics="one rank", gradients=False),
    "no communication, compiled": Way(ONE_GRAPH, "one rank", gradients=False),
    **PRODUCT,
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
# The answers come before the rows that explain them.
COMPILED = ("fastsiam, compiled", "compiled in pieces", "no communication, compiled")


class Rows:
    """Rows of a config on this rank; all ranks call the same methods in the same order."""

    def __init__(self, config: Config, runtime: Runtime, deadline: float, stack: contextlib.ExitStack):
        """`deadline`: on the clock time.monotonic, which the processes of a machine share."""
        self.config, self.runtime, self.world = config, runtime, runtime.world
        self._deadline, self._stack = deadline, stack
        self.views = views_of_rank(config, runtime)
        self.built: dict[str, Step] = {}
        self.absent: dict[str, str] = {}

    def prepare(self) -> None:
        """Builds what fits into the time and runs two steps of each; `absent` holds the reasons of the others."""
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
            step = self.built[same]
            self.built[name] = step if self.world.is_first else replace(step, run=lambda index: None)
        self.built[ALL_REDUCE] = Step(all_reduce(self.gradient_bytes // 4, self.runtime.device))

    def measure(self) -> dict[str, Samples] | None:
        """Returns seconds a step of what was built, in turns; on the first rank."""
        device = self.runtime.device
        return in_turns(
            self.world,
            device,
            {name: self.built[name].run for name in TABLE if name in self.built},
            together=CALLS[device.type],
            warmup=WARMUP,
            repeats=REPEATS,
            seconds=max(self._deadline - time.monotonic(), 0),
        )

    @property
    def gradient_bytes(self) -> int:
        """Bytes of fp32 gradients that every rank has to reduce."""
        return 4 * sum(parameter.numel() for parameter in self.built["fastsiam"].module.parameters())

    def _fits(self, way):
        kind = self.runtime.device.type
        rounds = WARMUP + MIN_ROUNDS * CALLS[kind]
        steps = [step.seconds for step in self.built.values()]
        planned = rounds * sum(steps) + (rounds + 2) * max(steps)
        return time.monotonic() + planned + (COMPILE_SECONDS[kind] if way.compiled else 0) < self._deadline

    def _prepare(self, name):
        """A reason that all ranks meet before they wait in a collective; an error ends the benchmark."""
        way, device = ROWS[name], self.runtime.device
        try:
            # Else a row would find what an earlier one, or an earlier run, has compiled.
            with fresh_cache() if way.compiled else contextlib.nullcontext():
                if name in PRODUCT:
                    step = build_product(way, self.config, self.runtime, self._stack)
                else:
                    step = build_step(way, self.config, self.runtime, self.views)
                first = timed(lambda: step.run(0), device)
            if way.compiled and not step.graphs():
                raise AbsentError("torch.compile has compiled nothing")
            mine = None, first, timed(lambda: step.run(1), device)
        except (AbsentError, UserError) as error:
            mine = str(error), 0.0, 0.0
        reasons, first, second = zip(*self.world.collect(mine), strict=True)
        reason = next(filter(None, reasons), None)
        if reason:
            self.absent[name] = reason
            return
        self.built[name] = replace(step, first_seconds=max(first), seconds=max(second))
        if self.world.is_first:
            print(f"{name}: steps of {max(first):.1f} and {max(second):.2f} s", flush=True)


def views_of_rank(config: Config, runtime: Runtime) -> list[torch.Tensor]:
    """Returns this rank's part, [2N, 3, S, S] of N images, of different synthetic batches."""
    views, world = [], runtime.world
    for seed in range(INPUT_SETS):
        # The synthetic backend has the same numbers for every rank.
        seeded = config.with_values({"train.seed": seed + INPUT_SETS * world.rank})
        options = {"device": runtime.device, "dtype": runtime.dtype, "rank": world.rank, "world_size": world.size}
        views.append(next(build_loader(seeded, **options).epoch(0)).views[0])
    return views


def measure(world: World, config: Config, deadline: float) -> dict | None:
    """Runs on every rank; returns, on the first one, (samples or None, numbers) of every row by name."""
    with contextlib.ExitStack() as stack:
        runtime = stack.enter_context(Runtime.of(config.train, world))
        rows = Rows(config, runtime, deadline, stack)
        rows.prepare()
        taken = rows.measure()
        return taken and {name: _numbers(name, rows, taken) for name in TABLE}


def _numbers(name, rows, taken):
    if name in rows.absent:
        return None, {"absent": rows.absent[name]}
    samples, step = taken[name], rows.built[name]
    if name == ALL_REDUCE:
        return samples, {"bytes": rows.gradient_bytes}
    way, size = ROWS[ALONE.get(name, name)], 1 if name not in ALONE else rows.world.size
    compiled = ", compiled" if way.compiled else ""
    silent, alone = (taken.get(other + compiled) for other in ("no communication", "one process"))
    return samples, {
        "images_per_second": rows.config.train.batch_size / samples.median / size,
        "share_of_silent": silent and silent.median / samples.median if name not in ALONE else None,
        "efficiency": alone and alone.median / samples.median if name not in ALONE else None,
        "first_step_seconds": step.first_seconds,
        "graphs": step.graphs(),
        "way": asdict(way),
    }


def run(results: Results, *, device: torch.device, minutes: float, ranks: int | None = None) -> None:
    """Measures all rows on `ranks` processes of this machine (2) within about `minutes`."""
    deadline = time.monotonic() + 60 * minutes
    size = RANKS if ranks is None else ranks
    if size < 2:
        raise UserError(f"--ranks: {size} rank exchanges no gradients; give 2 or more", code="too-few-ranks")
    name, images = SETTINGS[device.type]
    overrides = [f"train.batch_size={size * images}", f"train.device={device.type}", "data.backend=synthetic"]
    config = load_config(name, overrides)
    params = {
        "encoder": config.model.encoder,
        "size": config.views[0].size,
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

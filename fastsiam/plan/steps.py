"""The training step alone: at the config's batch size and at others, with other ranks and without them."""

import math
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fastsiam.config import Config
from fastsiam.data.backends.resident import free_bytes
from fastsiam.data.backends.synthetic import SyntheticLoader
from fastsiam.evaluate import collapse
from fastsiam.evaluate.online import evaluating
from fastsiam.methods import build_method
from fastsiam.optim.build import build_optimizer
from fastsiam.plan.bench import WARM_UP, Bench, free
from fastsiam.plan.results import BatchRate, Rate
from fastsiam.runtime.compile import Compiled
from fastsiam.runtime.device import autocast
from fastsiam.runtime.distributed import World
from fastsiam.training.step import TrainingStep

# On a CPU a step of so many images tells how long one of the whole batch takes, and what memory it needs.
PROBE_IMAGES = 8
# What is saved for the backward pass and as much again: gradients on the way, and what a kernel needs.
MEMORY_FACTOR = 2.0
# Of a measurement's time that one step may take.
STEP_SHARE = 0.5


class Stepper:
    """A training step of a throw-away method on fixed views; the learning rate is 0, so that numbers stay sound."""

    def __init__(self, bench: Bench, batch_size: int, world: World | None = None, *, compiles: bool | None = None):
        """`batch_size`: of all ranks. `world`: a `World()` for a step of this rank's share without the others."""
        alone = world is not None
        world = bench.world if world is None else world
        config = with_batch_size(bench.config, batch_size // bench.world.size if alone else batch_size)
        self._bench, self.batch_size = bench, batch_size
        torch.manual_seed(config.train.seed)
        self.method = build_method(config, world.size).to(bench.device)
        if config.train.channels_last:
            self.method.to(memory_format=torch.channels_last)
        optimizer = build_optimizer(self.method, config)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        paused = _Extending(bench) if (bench.compiles if compiles is None else compiles) else None
        self.step = TrainingStep(
            self.method, optimizer, config, bench.device, bench.dtype, world, compiling=paused and paused.context
        )
        self._views: torch.Tensor | None = None

    @property
    def compiled(self) -> Compiled | None:
        return self.step.compiled

    def __call__(self, views: torch.Tensor | None = None) -> None:
        """Raises `torch.OutOfMemoryError`."""
        self.step.attempt(self.fixed_views() if views is None else views, 1)

    def fixed_views(self) -> torch.Tensor:
        """[2N, 3, S, S] normal numbers for this rank."""
        if self._views is None:
            bench = self._bench
            loader = SyntheticLoader(
                bench.specs,
                batch_size=self.batch_size,
                seed=0,
                device=bench.device,
                dtype=bench.dtype,
                num_images=self.batch_size,
                world_size=bench.world.size,
            )
            self._views = next(loader.epoch(0)).views
        return self._views

    def collapse_seconds(self) -> float:
        """One measure of collapse, on as many images as a run has."""
        views, precision = self.fixed_views(), autocast(self._bench.device, self._bench.dtype)
        repeats = math.ceil(collapse.PROBE_IMAGES / len(views))
        batches = [views[: collapse.PROBE_IMAGES]] * repeats

        def measure():
            parts = []
            for batch in batches:
                with precision():
                    parts.append(self.method.embed(batch).float())
            collapse.measure(torch.cat(parts)[: collapse.PROBE_IMAGES])

        with evaluating(self.method), torch.no_grad():
            return self._bench.timed(measure)


class _Extending:
    """The time of a compilation is not that of measuring; entered twice at once, it counts once."""

    def __init__(self, bench):
        self._bench, self._depth, self._began = bench, 0, 0.0

    def context(self):
        return self

    def __enter__(self):
        if not self._depth:
            self._began = time.perf_counter()
        self._depth += 1

    def __exit__(self, *_):
        self._depth -= 1
        if not self._depth:
            self._bench.extend(time.perf_counter() - self._began)


class Probe(NamedTuple):
    """Of a step on a CPU, for each image."""

    seconds: float
    bytes: float


def probe(bench: Bench) -> Probe | None:
    """What a step takes for each image, from a small one that is not compiled; None on a GPU, which says it itself."""
    if bench.device.type == "cuda":
        return None
    size = bench.world.size
    count = min(max(2, PROBE_IMAGES // size) * size, bench.config.train.batch_size)
    stepper, saved = Stepper(bench, count, compiles=False), {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        stepper()
    seconds = min(bench.timed(stepper), bench.timed(stepper)) / count
    del stepper
    free(bench)
    return Probe(seconds, MEMORY_FACTOR * sum(saved.values()) * size / count)


@dataclass(frozen=True)
class Affordable:
    """Which batch sizes a step can be measured at, within `seconds` each."""

    known: Probe | None
    seconds: float
    memory: int

    @classmethod
    def of(cls, bench: Bench, known: Probe | None, seconds: float) -> "Affordable":
        return cls(known, seconds, bench.world.share(free_bytes(bench.device)))

    def refusal(self, batch_size: int) -> str | None:
        """Why a batch size is not tried."""
        if self.known is None:
            return None
        needed, seconds = self.known.bytes * batch_size, self.known.seconds * batch_size
        if needed > 0.9 * self.memory:
            return f"does not fit the memory: about {needed / 1e9:,.0f} GB, and {self.memory / 1e9:,.0f} GB are free"
        if seconds > STEP_SHARE * self.seconds:
            return f"a step takes about {seconds:,.0f} s: give more --minutes"
        return None


def largest_affordable(batch_size: int, ranks: int, affordable: Affordable) -> tuple[int, str | None]:
    """`batch_size`, or the largest half, quarter, ... of it that can be measured, and why."""
    size, reason = batch_size, affordable.refusal(batch_size)
    while affordable.refusal(size) and size % (2 * ranks) == 0 and size // 2 >= 2 * ranks:
        size //= 2
    return size, reason if size != batch_size else None


def other_batch_sizes(batch_size: int, images: int, ranks: int) -> list[int]:
    """Half, double and four times of it, where the ranks can share and the images fill them."""
    sizes = [batch_size * factor // 2 for factor in (1, 4, 8)]
    return [size for size in sizes if 2 * ranks <= size <= images and size % ranks == 0]


def step_rate(bench: Bench, stepper: Stepper, seconds: float) -> Rate:
    bench.warm_up(stepper, seconds)
    return bench.windows(stepper, stepper.batch_size, (1 - WARM_UP) * seconds)


def batch_rate(bench: Bench, batch_size: int, affordable: Affordable, seconds: float) -> BatchRate:
    """The step at another batch size; one that does not fit is said so."""
    rate = with_batch_size(bench.config, batch_size).learning_rate
    reason = affordable.refusal(batch_size)
    if bench.world.size > 1 and bench.device.type == "cuda" and batch_size > bench.config.train.batch_size:
        reason = "not tried on several GPUs, where a rank out of memory leaves the others waiting"
    if reason:
        return BatchRate(batch_size, rate, None, reason)
    try:
        return BatchRate(batch_size, rate, step_rate(bench, Stepper(bench, batch_size), seconds))
    except torch.OutOfMemoryError:
        reason = "does not fit the memory of the GPU"
    finally:
        free(bench)
    return BatchRate(batch_size, rate, None, reason)


def communication(bench: Bench, batch_size: int, step: Rate, seconds: float) -> float | None:
    """Seconds for each image that other ranks add to a step: gradients and batch-norm statistics; None for one rank."""
    if bench.world.size == 1:
        return None
    alone = Stepper(bench, batch_size, World())
    without = step_rate(bench, alone, seconds)
    del alone
    free(bench)
    return max(1 / step.median - 1 / without.median, 0.0)


def with_batch_size(config: Config, batch_size: int) -> Config:
    return config.with_values({"train.batch_size": batch_size})

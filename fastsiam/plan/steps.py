"""Measures the training step alone: at the config's batch size and at others, with other ranks and without them."""

import math
from dataclasses import dataclass, replace

import torch

from fastsiam.config import Config
from fastsiam.config.micro_batch import micro_batch_sizes
from fastsiam.data.backends.base import Batch
from fastsiam.data.backends.resident import free_bytes
from fastsiam.data.build import build_loader
from fastsiam.evaluate import collapse
from fastsiam.evaluate.online import evaluation_mode
from fastsiam.methods import build_method
from fastsiam.optim.build import build_optimizer
from fastsiam.plan.bench import PARTS, Bench
from fastsiam.plan.results import BatchRate, Rate
from fastsiam.runtime.runtime import Runtime
from fastsiam.training.step import TrainingStep

# On a CPU a step of so many images predicts the time and memory of a whole batch.
PROBE_IMAGES = 8
# Beside what is saved for the backward pass as much again: gradients on the way, and workspaces of kernels.
MEMORY_FACTOR, FREE_SHARE = 2.0, 0.9
# Views that lie on the device; with epochs enough for views that grow.
SYNTHETIC = {"data.backend": "synthetic", "data.augment": "fastsiam", "budget": None, "train.epochs": 2}
# Share of the run that measured steps are at: prototypes are no longer frozen, and queues are in use.
PROGRESS = 0.5
# Share of a measurement's time that one step may take.
STEP_SHARE = 0.5


class Stepper:
    """A training step of a throw-away method; the learning rate is 0, so that its numbers stay finite."""

    def __init__(self, bench: Bench, batch_size: int, runtime: Runtime | None = None):
        """`batch_size`: of all ranks. `runtime`: in place of the bench's; alone, it takes this rank's share."""
        runtime, self._bench, self.batch_size = runtime or bench.runtime, bench, batch_size
        config = with_batch_size(bench.config, batch_size, bench.world.size, share=runtime.world.size)
        torch.manual_seed(config.train.seed)
        self.method = build_method(config, runtime.world.size, runtime.world.rank).to(bench.device)
        if config.train.channels_last:
            self.method.to(memory_format=torch.channels_last)
        optimizer = build_optimizer(self.method, config)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        self.step = TrainingStep(self.method, optimizer, config, runtime)
        whole = with_batch_size(bench.config, batch_size, bench.world.size)
        synthetic = whole.with_values(SYNTHETIC | {"train.micro_batch": None})
        self.batch = next(build_loader(synthetic, **bench.loader_options).epoch(0))

    def __call__(self, batch: Batch | None = None) -> None:
        """Takes a step on `batch`, or on normal numbers, with what a method does around the optimizer.

        Raises `torch.OutOfMemoryError`.
        """
        batch = self.batch if batch is None else batch
        self.method.before_step(PROGRESS, batch.indices)
        self.method.after_step(self.step.attempt(batch.views, 1))

    def rate(self, seconds: float) -> Rate:
        """Measures the step on views that lie on the device; compilation is not counted."""
        with self._bench.untimed():
            self()
        return self._bench.rate(self, self.batch_size, seconds)

    def collapse_seconds(self) -> float:
        """Measures one collapse measure, on as many images as in a run."""
        views = self.batch.views[0]
        repeats = math.ceil(collapse.PROBE_IMAGES / len(views))

        def measure():
            parts = []
            for _ in range(repeats):
                with self._bench.runtime.autocast():
                    parts.append(self.method.embed(views[: collapse.PROBE_IMAGES]).float())
            collapse.measure(torch.cat(parts)[: collapse.PROBE_IMAGES])

        with evaluation_mode(self.method), torch.no_grad():
            return self._bench.timed(measure)


@dataclass(frozen=True)
class Affordable:
    """Limits of a measured step on a CPU. A GPU is tried at any batch size: out of memory is an error there."""

    seconds_per_image: float = 0.0
    bytes_per_image: float = 0.0
    micro_batch: int | None = None
    """Images that are in memory at once, where that is not the whole batch."""
    seconds: float = 0.0
    """Time of a measurement."""
    memory: int = 0
    """Free bytes."""

    @classmethod
    def of(cls, bench: Bench, minutes: float) -> "Affordable":
        """Measures a small step that is not compiled, and the bytes that it saves for the backward pass."""
        if bench.device.type == "cuda":
            return cls()
        size = bench.world.size
        train = bench.config.train
        count = min(max(2, PROBE_IMAGES // size) * size, train.micro_batch or train.batch_size)
        stepper, saved = Stepper(bench, count, replace(bench.runtime, compiles=False)), {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            stepper()
        seconds = min(bench.timed(stepper), bench.timed(stepper)) / count
        del stepper
        bench.free()
        memory = bench.world.share(free_bytes(bench.device))
        share = PARTS["step"] / sum(PARTS.values())
        needed = MEMORY_FACTOR * sum(saved.values()) * size / count
        return cls(seconds, needed, train.micro_batch, 60 * minutes * share, memory)

    def refusal(self, batch_size: int) -> str | None:
        """Returns the reason why a batch size is not tried."""
        at_once = min(batch_size, self.micro_batch or batch_size)
        needed, seconds = self.bytes_per_image * at_once, self.seconds_per_image * batch_size
        if needed > FREE_SHARE * self.memory:
            return f"does not fit the memory: about {needed / 1e9:,.0f} GB, and {self.memory / 1e9:,.0f} GB are free"
        if seconds > STEP_SHARE * self.seconds:
            return f"a step takes about {seconds:.2g} s; give more --minutes"
        return None

    def largest(self, batch_size: int, ranks: int) -> int:
        """Returns `batch_size`, or the largest half, quarter, ... of it that can be measured."""
        while self.refusal(batch_size) and batch_size % (2 * ranks) == 0 and batch_size // 2 >= 2 * ranks:
            batch_size //= 2
        return batch_size


def other_batch_sizes(batch_size: int, images: int, ranks: int) -> list[int]:
    """Returns half, double and four times a batch size, where the ranks can share and the images fill them."""
    sizes = [batch_size * factor // 2 for factor in (1, 4, 8)]
    return [size for size in sizes if 2 * ranks <= size <= images and size % ranks == 0]


def batch_rate(bench: Bench, batch_size: int, affordable: Affordable, seconds: float) -> BatchRate:
    """Measures the step at another batch size; `note` gives the reason where it was skipped."""
    learning_rate, rate = with_batch_size(bench.config, batch_size, bench.world.size).learning_rate, None
    reason = affordable.refusal(batch_size)
    if bench.world.size > 1 and bench.device.type == "cuda" and batch_size > bench.config.train.batch_size:
        reason = "not tried on several GPUs, where a rank out of memory leaves the others waiting"
    if not reason:
        try:
            rate = Stepper(bench, batch_size).rate(seconds)
        except torch.OutOfMemoryError:
            reason = "does not fit the memory of the GPU"
        bench.free()
    return BatchRate(batch_size, learning_rate, rate, reason)


def with_batch_size(config: Config, batch_size: int, ranks: int, share: int | None = None) -> Config:
    """Returns the config at another batch size of so many ranks, in the largest micro batches up to its own, with a
    queue of MoCo that this batch divides.

    `share`: for a run of so many of these ranks alone, with their part of the batch and of its micro batches.
    """
    share = share or ranks
    batch_size, micro_batch = batch_size * share // ranks, config.train.micro_batch
    if micro_batch is not None:
        sizes = micro_batch_sizes(batch_size, share)
        micro_batch = max((size for size in sizes if size <= micro_batch * share // ranks), default=sizes[0])
    values = {"train.batch_size": batch_size, "train.micro_batch": micro_batch}
    if config.method.name == "moco":
        keys = batch_size * (2 if config.method.symmetric else 1)
        values["method.queue"] = max(config.method.queue // keys, 1) * keys
    return config.with_values(values)

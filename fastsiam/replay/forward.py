"""Batches of a run made again, and training in memory from a checkpoint to a step; nothing is written."""

import contextlib
from collections.abc import Callable, Iterator

import torch

from fastsiam.data.backends.base import Batch
from fastsiam.data.loader import Loader
from fastsiam.methods import build_method
from fastsiam.optim.build import build_optimizer, set_learning_rate
from fastsiam.replay.recorded import Recorded
from fastsiam.replay.schedule import Schedule
from fastsiam.run.start_weights import start_weights
from fastsiam.runtime.distributed import World
from fastsiam.runtime.runtime import Runtime
from fastsiam.training.step import TrainingStep


def batches(
    recorded: Recorded, schedule: Schedule, loader: Loader, first: int, last: int
) -> Iterator[tuple[int, Batch]]:
    """Yields the steps from `first` to `last` with their batches, of all ranks, as the run had them.

    Images that the run excluded later are there; those that fail to decode now are replaced and go to `loader.skip`.
    """
    changes = {int(step) + 1 for step in recorded.excluded_since[recorded.excluded_since < last]}
    step = first
    while step <= last:
        sizes = schedule.sizes(step)
        loader.skip.mask = recorded.excluded(step)
        loader.skip.mask[list(loader.skip.found)] = True
        with contextlib.closing(loader.epoch(*schedule.place(step), sizes)) as epoch:
            for batch in epoch:
                yield step, batch
                step += 1
                if step > last or step in changes or schedule.sizes(step) != sizes:
                    break


def initial(recorded: Recorded, runtime: Runtime, saved: dict | None) -> TrainingStep:
    """The training step of a run with the weights of the checkpoint `saved`; None: with the seed's initial weights."""
    config = recorded.config
    torch.manual_seed(config.train.seed)
    method = build_method(config)
    if saved is None and (weights := start_weights(config, World())) is not None:
        weights.check_same(recorded.environment.get("weights"))
        weights.load_into(method.encoder)
        method.after_loading()
    method.to(runtime.device)
    if config.train.channels_last:
        method.to(memory_format=torch.channels_last)
    step = TrainingStep(method, build_optimizer(method, config), config, runtime)
    if saved is not None:
        step.load_state_dict(saved)
    return step


def train(
    step: TrainingStep,
    recorded: Recorded,
    schedule: Schedule,
    loader: Loader,
    first: int,
    last: int,
    show: Callable[[int, float], None],
) -> dict[int, float]:
    """Trains the steps from `first` to `last`; returns their losses. `show(step, loss)` is called after each."""
    losses = {}
    for number, batch in batches(recorded, schedule, loader, first, last):
        _set_rate(step.optimizer, recorded, schedule, number)
        out = step(batch.views, number, batch.indices, schedule.progress_before(number))
        losses[number] = out["loss"].item()
        show(number, losses[number])
    return losses


def _set_rate(optimizer, recorded, schedule, number):
    progress, config = schedule.progress_before(number), recorded.config
    set_learning_rate(optimizer, config, progress, schedule.epoch_progress(number))
    rate = schedule.logged_rate(number)
    if rate is not None and not schedule.counts_steps:
        # Exact where progress is interpolated. While it warms up, a rate that is held later rises with the others.
        for group in optimizer.param_groups:
            if group["scheduled"] or progress < config.optimizer.warmup:
                group["lr"] = rate

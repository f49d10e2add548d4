"""Replay of one step: its batch, then the training up to it from a checkpoint, then the step itself."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from fastsiam.data import rng
from fastsiam.data.backends.base import Batch
from fastsiam.data.backends.choose import choose_backend
from fastsiam.data.build import build_loader
from fastsiam.data.loader import Loader
from fastsiam.data.skip_list import SkipList
from fastsiam.errors import UserError, printable
from fastsiam.replay import forward, text
from fastsiam.replay.examine import Findings, examine
from fastsiam.replay.pictures import Shown, write_pictures
from fastsiam.replay.recorded import Recorded
from fastsiam.replay.schedule import Schedule
from fastsiam.run import checkpoint
from fastsiam.run.progress_line import ProgressLine
from fastsiam.run.resume import changed_computation, computation
from fastsiam.run.training_data import with_levels
from fastsiam.runtime.distributed import World
from fastsiam.runtime.runtime import Runtime
from fastsiam.runtime.seeding import seed_step

# A running run renames its checkpoints while they are looked for.
_TRIES, _PAUSE = 3, 0.2


@dataclass(frozen=True)
class Asked:
    """A replay as its command line asks for it."""

    step: int
    out: Path
    images: int
    """Rows of the picture, at most."""
    from_start: bool
    """Train from the initial weights where no checkpoint is before the step."""


def replay(recorded: Recorded, asked: Asked, say: Callable[[str], None]) -> Findings | None:
    """Writes the pictures of a step and prints its numbers through `say(line)`; returns them, None without a loss.

    Raises `UserError` where the images cannot be delivered or the disk refuses the pictures.
    """
    saved, name, states = _checkpoint_before(recorded, asked.step, say)
    schedule = Schedule(recorded.config, recorded.steps_per_epoch, recorded.lines, states)
    before = _computation_of_run(recorded, saved)
    recorded, backend_note = _for_this_machine(recorded, saved, before)
    runtime = Runtime.of(recorded.config.train, World(), before)
    with runtime, _threads(before.get("threads"), runtime):
        notes = [backend_note, changed_computation(before, computation(runtime))]
        notes += text.notes(recorded, schedule, asked.step)
        for line in text.opening(recorded, schedule, asked.step, before, filter(None, notes)):
            say(line)
        loader = _loader(recorded, runtime, asked.step, say)
        try:
            ((_, batch),) = forward.batches(recorded, schedule, loader, asked.step, asked.step)
            shown = _shown(recorded, schedule, asked.step, batch)
            write = lambda: write_pictures(asked.out, batch.views, recorded.config.view_groups, shown, asked.images)  # noqa: E731
            write()
            say(text.written(asked.out, shown, asked.images))
            reason = None if saved is not None or asked.from_start else text.no_checkpoint(states, asked.step)
            if reason:
                say(reason)
                return None
            findings = _findings(recorded, schedule, loader, runtime, batch, saved, name, asked.step, say)
        finally:
            loader.close()
        shown.losses, shown.first = findings.losses, findings.bad_images
        write()
        for line in text.findings(findings, shown):
            say(line)
        return findings


def _findings(recorded, schedule, loader, runtime, batch, saved, name, number, say):
    first = 1 + (saved["state"]["step"] if saved else 0)
    step = forward.initial(recorded, runtime, saved)
    say(text.training(first, number - 1, name))
    losses = {}
    if first < number:
        with _progress(first, number - 1) as show:
            losses = forward.train(step, recorded, schedule, loader, first, number - 1, show)
    scaler = step.state_dict()["scaler"]
    scale, groups = scaler["scale"] if scaler else 1.0, recorded.config.view_groups
    step.method.before_step(schedule.progress_before(number), batch.indices)
    seed_step(recorded.config.train.seed, number, runtime.world.rank, runtime.device)
    found = examine(step.method, batch.views, groups, runtime, scale, step.micro_batches)
    for line in text.loss(found.loss, losses, schedule, number):
        say(line)
    return found


def _checkpoint_before(recorded, step, say):
    """The newest whole checkpoint before a step with its name, or None; and `State` of all that were read for it."""
    saved, name, states, problems = None, None, [], {}
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(_PAUSE)
        problems.clear()
        for path in checkpoint.existing(recorded.path):
            try:
                found = checkpoint.load(path)
                checkpoint.check_layout(found, recorded.path)
            except UserError as error:
                problems[path] = error
                continue
            states.append(found["state"])
            if found["state"]["step"] < step:
                saved, name = found, path.name
                break
        if saved is not None or not problems or recorded.has_ended:
            break
    for path, error in problems.items():
        say(f"note      {path.name} is not used: {error}")
    return saved, name, states


def _computation_of_run(recorded, saved):
    """Facts of `resume.computation` as the run had them, as far as they are known."""
    environment = recorded.environment
    known = {key: environment[key] for key in ("device", "dtype", "compile", "ranks") if key in environment}
    if "cpu_threads" in environment:
        known["threads"] = environment["cpu_threads"]
    return known | (saved.get("computation", {}) if saved else {})


def _for_this_machine(recorded, saved, before):
    """The run with a device, a backend and eager steps of this machine; and a sentence on another backend, or None."""
    config, note = recorded.config, None
    # Eager, so that hooks see every tensor.
    values = {"train.compile": "off"}
    if config.train.device == "cuda" and not torch.cuda.is_available():
        values["train.device"] = "auto"
    described = str(recorded.environment.get("loader", ""))
    backend = saved["identity"]["backend"] if saved else described.partition(" ")[0]
    if backend and config.data.backend != backend:
        try:
            choose_backend(backend, config.data.train)
            values["data.backend"] = backend
        except UserError:
            note = f"the run decoded with {described or backend}, which is not here: pixels and loss differ a little"
    return replace(recorded, config=config.with_values(values)), note


@contextlib.contextmanager
def _threads(count: int | None, runtime: Runtime) -> Iterator[None]:
    """The CPU threads of the run inside the block: another number changes the last bits."""
    before = torch.get_num_threads()
    if count and runtime.device.type == "cpu":
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _loader(recorded: Recorded, runtime: Runtime, step: int, say) -> Loader:
    source, _ = with_levels(runtime.world, recorded.path, recorded.source, None)

    def report(index, reason, count):
        say(f"note      {reason} now; another image takes its place, which the run may not have had")

    skip = SkipList(len(source), 1.0, recorded.excluded(step), report, recorded.config.data.train)
    return build_loader(recorded.config, source, skip=skip, device=runtime.device, dtype=runtime.dtype, say=say)


def _shown(recorded: Recorded, schedule: Schedule, step: int, batch: Batch) -> Shown:
    source, config = recorded.source, recorded.config
    epoch, cursor = schedule.place(step)
    asked = rng.epoch_order(config.train.seed, epoch, len(source))[cursor : cursor + config.train.batch_size]

    def names(indices):
        return [printable(bytes(source.names[index]).decode(errors="surrogateescape")) for index in indices]

    labels = [source.classes[label] if label >= 0 else "" for label in source.labels[batch.indices]]
    replaced = [name if other else "" for name, other in zip(names(asked), asked != batch.indices, strict=True)]
    return Shown(names(batch.indices), labels, replaced)


@contextlib.contextmanager
def _progress(first: int, last: int) -> Iterator[Callable[[int, float], None]]:
    line = ProgressLine(Console(), f"training step {first:,}")

    def show(step, loss):
        if line.is_due() and step < last:
            line.show((step - first + 1) / (last - first + 1), f"step {step:,} of {last:,}  loss {loss:+.4f}")

    try:
        yield show
    finally:
        line.close()

"""Lines that a replay prints, as functions of values."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from fastsiam.replay.recorded import Recorded
from fastsiam.replay.schedule import Schedule

_NAMED = 8


def opening(recorded: Recorded, schedule: Schedule, step: int, before: dict, notes: Iterable[str]) -> list[str]:
    """Place of the step in the run, and what is not known of it; `before`: facts of the run's computation."""
    config = recorded.config
    epoch, cursor = schedule.place(step)
    groups = zip(config.views, schedule.sizes(step), strict=True)
    sides = ", ".join(f"{group.count} x {side} px" for group, side in groups)
    batch = config.train.batch_size
    ranks = before.get("ranks", 1)
    whole = f", those of all {ranks} processes" if ranks > 1 else ""
    lines = [
        f"replay    step {step:,} of {recorded.path}",
        f"batch     epoch {epoch + 1}, images {cursor + 1:,} to {cursor + batch:,} of its order{whole}; views {sides}",
    ]
    return [*lines, *(f"note      {note}" for note in notes)]


def notes(recorded: Recorded, schedule: Schedule, step: int) -> list[str]:
    """Sentences on what metrics.jsonl and the environment do not say exactly of a step."""
    import torch

    found = []
    reached = max(schedule.reached, recorded.status_step())
    if step > reached:
        found.append(f"the run has come to step {reached:,}, as far as its folder tells; this one may follow")
    if not schedule.sizes_are_known(step):
        found.append("the view size is estimated: it depends on the progress at the epoch's start, which no line holds")
    then = recorded.environment.get("torch", torch.__version__)
    if then != torch.__version__:
        found.append(f"the run had torch {then}, and this is {torch.__version__}: the last bits may differ")
    return found


def written(out: Path, shown, count: int) -> str:
    number = len(shown.names)
    rows = "all" if count >= number else f"the first {count}"
    replaced = sum(map(bool, shown.replaced))
    others = f"; {replaced} of them came in the place of excluded ones" if replaced else ""
    return f"views     {out}/views.png has {rows} of {number} images, a row each; images.tsv names all{others}"


def no_checkpoint(states: Sequence[dict], step: int) -> str:
    """Why there is no loss."""
    have = "the run has no whole checkpoint"
    if states:
        have = f"the oldest checkpoint is of step {min(state['step'] for state in states):,}, not before step {step:,}"
    steps = "the 1 step" if step == 2 else f"the {step - 1:,} steps"
    how = "computes it with the initial weights" if step == 1 else f"trains {steps} before it from the initial weights"
    return f"loss      none: {have}; --from-start {how}"


def training(first: int, last: int, name: str | None) -> str:
    origin = f"{name} (step {first - 1:,})" if name else "the initial weights of the seed"
    if last < first:
        return f"training  none: {origin} is the state before this step"
    count = last - first + 1
    return f"training  {count:,} step{'s' if count > 1 else ''} in memory from {origin}; Ctrl-C ends it"


def loss(value: float, before: dict[int, float], schedule: Schedule, step: int) -> list[str]:
    """`before`: losses of the steps trained on the way."""
    recent = [before[number] for number in sorted(before)[-50:] if math.isfinite(before[number])]
    around = ""
    if len(recent) > 1:
        around = f" (the {len(recent)} steps before it: {np.mean(recent):.6g} ± {np.std(recent):.2g})"
    lines = [f"loss      {value!r}{around}", f"logged    {_compared(value, schedule, step)}"]
    logged = [number for number in sorted(before) if number in schedule.train]
    other = [number for number in logged if not _is_equal(before[number], schedule.train[number].get("loss"))]
    if logged:
        which = "all equal"
        if other:
            difference = _difference(before[other[0]], schedule.train[other[0]].get("loss"))
            which = f"{len(other):,} differ, the first at step {other[0]:,}: metrics.jsonl has {difference}"
        lines.append(f"logged losses of {len(logged):,} steps on the way: {which}")
    bad = next((number for number in sorted(before) if not math.isfinite(before[number])), None)
    if bad is not None:
        lines.append(f"the loss was not finite before: from step {bad:,} on; --step {bad} shows where it began")
    first = min(before, default=step)
    if unknown := schedule.unknown_rates(first, step - 1):
        lines.append(
            f"learning rates of {unknown:,} of the {step - first:,} steps lie between logged ones and are "
            "interpolated, so the loss may differ"
        )
    return [lines[0], lines[1], *(f"note      {line}" for line in lines[2:])]


def findings(found, shown) -> list[str]:
    """Gradient norms, and what is not finite."""
    total, *parts = found.norms.items()
    lines = [
        f"gradient  norm {total[1]:.6g}: {', '.join(f'{part} {norm:.6g}' for part, norm in parts)}",
        f"largest   {', '.join(f'{name} {norm:.4g}' for name, norm in found.largest)}",
    ]
    if found.is_finite:
        return [*lines, "finite    yes: weights, views, outputs, loss and gradients"]
    lines.append(f"finite    no; in the order of computation {found.first_bad} came first")
    if found.bad_images:
        lines.append(f"images    not finite there: {_names(found.bad_images, shown.names)}")
    if found.losses is None or math.isfinite(found.loss):
        return lines
    bad = np.flatnonzero(~np.isfinite(found.losses)).tolist()
    if bad and bad != found.bad_images:
        lines.append(f"losses    not finite: {_names(bad, shown.names)}")
    return lines


def _compared(value, schedule, step):
    if step not in schedule.train:
        return f"metrics.jsonl has no line of this step (train.log_every_steps={schedule.config.train.log_every_steps})"
    logged = schedule.train[step].get("loss")
    if _is_equal(value, logged):
        return "equal: metrics.jsonl has the same loss" + ("" if math.isfinite(value) else " (null: not finite)")
    return f"metrics.jsonl has {_difference(value, logged)}"


def _is_equal(value, logged):
    return not math.isfinite(value) if logged is None else value == logged


def _difference(value, logged):
    if logged is None:
        return "null (not finite)"
    return f"{logged!r}, a difference of {value - logged:.3g}"


def _names(images, names):
    if len(images) == len(names):
        return f"all {len(names)} images"
    named = ", ".join(names[image] for image in images[:_NAMED])
    return f"{len(images)} of {len(names)}: {named}" + (", ..." if len(images) > _NAMED else "")

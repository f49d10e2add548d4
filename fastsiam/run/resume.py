"""Resumption of a run: its folder and checkpoint found and compared, and its state brought back."""

import glob
import json
import re
from dataclasses import asdict
from pathlib import Path

import torch

from fastsiam.config import Config, differences
from fastsiam.errors import Notice, UserError
from fastsiam.evaluate.collapse import CollapseGuard
from fastsiam.evaluate.online_linear import OnlineLinear
from fastsiam.models.convolution import multiplies_tiles
from fastsiam.run import checkpoint
from fastsiam.run.encoder_file import describe_encoder
from fastsiam.run.folder import Result, RunFolder, run_path
from fastsiam.run.metrics import Journal
from fastsiam.run.training_data import TrainingData
from fastsiam.runtime.distributed import World, restarts
from fastsiam.runtime.runtime import Runtime
from fastsiam.training.progress import Progress
from fastsiam.training.step import TrainingStep

_MAY_BE_AUTO = ("data.backend", "train.precision", "train.compile")
_OF_THE_BUDGET = ("train.epochs", "budget", "budget_price_per_hour")
# A run without run.name: its config's name and a hash of its overrides.
_UNNAMED = re.compile(r"(.+)-[0-9a-f]{8}")


def find_run(config: Config, world: World, journal: Journal) -> tuple[RunFolder, dict]:
    """The folder of a run and its newest whole checkpoint, empty for a new run; all ranks must call.

    Writes nothing. Raises `UserError` where the folder belongs to another config or another version.
    """
    with world.together():
        path = world.once(f"folder of {config.run.name}", str(run_path(config))) if world.is_first else None
    folder = RunFolder(config, Path(world.share(path)), journal.warn)
    with world.together():
        saved = _newest(folder, config, journal) if world.is_first else None
    return folder, world.share(saved) or {}


def _newest(folder, config, journal):
    check_config(folder, config)
    saved = checkpoint.load_newest(folder.path, journal.warn)
    if saved is None:
        return None
    checkpoint.check_layout(saved, folder.path)
    if "computation" not in saved:
        # Of an earlier version; its environment.json says what it computed with.
        before = folder.environment()
        kept = {key: before[key] for key in ("device", "dtype", "compile", "ranks") if key in before}
        if kept.get("compile") and kept.get("ranks") == 1:
            # How the compiled step of one process had it.
            kept["norm"] = "batch norm view by view"
        saved["computation"] = kept | {"threads": saved["threads"]}
        saved["budget"] = folder.config_before().to_spend.amount
    return saved


def check_config(folder: RunFolder, config: Config) -> None:
    """Raise `UserError` where a folder was made by a config that computes something else."""
    folder.check_is_ours()
    if not folder.exists():
        return
    before = folder.config_before()
    changed = differences_against_resuming(before, config)
    if changed:
        named = ", ".join(f"{key} ({then}, now {now})" for key, (then, now) in list(changed.items())[:4])
        more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
        sooner = "train.max_steps=N to end it sooner, " if asks_for_less(before, config) else ""
        raise UserError(
            f"run.name: {folder.path} belongs to another config: {named}{more}; set {_as_before(changed)}{sooner}"
            "run.name=NEW to keep both, or run.fresh=true for a new folder",
            "other-config",
        )


def differences_against_resuming(before: Config, now: Config) -> dict[str, tuple]:
    """Those of `differences` with which a run of the config `before` cannot be resumed.

    More epochs are allowed, a larger budget of the same kind, and another device. Where one of the two configs says
    auto, the choice is in the checkpoint, and is compared there.
    """
    same_kind = before.to_spend.kind == now.to_spend.kind
    allowed = {"train.device"}
    if same_kind and not asks_for_less(before, now):
        allowed.update(_OF_THE_BUDGET)
    for key in _MAY_BE_AUTO:
        section, name = key.split(".")
        if "auto" in (getattr(getattr(config, section), name) for config in (before, now)):
            allowed.add(key)
    return {key: values for key, values in differences(before, now).items() if key not in allowed}


def asks_for_less(before: Config, now: Config) -> bool:
    """True where the budget of `now` is a smaller one of the same kind."""
    return before.to_spend.kind == now.to_spend.kind and before.to_spend.amount > now.to_spend.amount


def _as_before(changed: dict[str, tuple]) -> str:
    """The overrides that undo a change or two, as part of a sentence."""
    values = [then for then, _ in changed.values()]
    if len(values) > 2 or any(isinstance(then, list) for then in values):
        return ""
    typed = (then if isinstance(then, str) else json.dumps(then) for then in values)
    return " ".join(f"{key}={then}" for key, then in zip(changed, typed, strict=True)) + " to resume it, "


def finished(config: Config, folder: RunFolder, progress: Progress, journal: Journal) -> Result | None:
    """The result of an earlier start, printed, where there is nothing left to do; None where there is."""
    path, step, earlier = folder.path, progress.state.step, folder.status()
    ended, reason = earlier.get("status"), earlier.get("reason")
    if ended == "done" and progress.is_over:
        knn = earlier.get("knn_top1")
        journal.say(f"{path} is finished: step {step:,}" + ("" if knn is None else f", kNN {knn:.2f} %"))
        more = "train.epochs" if progress.budget.kind == "epochs" else "budget"
        more = "train.max_share" if config.train.max_share < 1 else more
        journal.say(f"a larger {more} resumes it; run.fresh=true starts over in a new folder")
        return Result("done", str(path), step, knn)
    if ended == "collapsed" and config.collapse.action == "stop":
        journal.say(f"{path} has collapsed: {reason}", "red")
        return Result("collapsed", str(path), step)
    if ended == "failed" and "exit_code" in earlier and restarts():
        journal.say(f"{path} would fail again: {reason}", "red")
        return Result("failed", str(path), step)
    return None


def contents(
    config: Config,
    data: TrainingData,
    progress: Progress,
    folder: RunFolder,
    step: TrainingStep,
    guard: CollapseGuard,
    linear: OnlineLinear | None,
) -> dict:
    """A checkpoint as `restore` takes it: tensors and plain values only."""
    state = progress.state
    return {
        "layout": checkpoint.LAYOUT,
        "state": asdict(state),
        **step.state_dict(),
        "collapsed_in_a_row": guard.collapsed_in_a_row,
        "online_linear": linear and linear.state_dict(),
        "computation": computation(data.runtime),
        "budget": progress.budget.amount,
        "identity": data.identity,
        "encoder": describe_encoder(
            config, state.step, folder.commit, state.images_seen, state.knn, state.knn_step, folder.weights
        ),
        "metrics": folder.metrics_state(),
    }


def restore(
    saved: dict,
    folder: RunFolder,
    world: World,
    step: TrainingStep,
    guard: CollapseGuard,
    linear: OnlineLinear | None,
) -> None:
    """Bring weights, optimizer and metrics.jsonl back to a checkpoint."""
    step.load_state_dict(saved)
    guard.collapsed_in_a_row = saved["collapsed_in_a_row"]
    if linear is not None:
        linear.load_state_dict(saved["online_linear"])
    if world.is_first:
        folder.restore_metrics(saved["metrics"])


def computation(runtime: Runtime) -> dict:
    """Facts beside the config that the last bits of a run depend on.

    Those of `Runtime.names`, `threads` of the CPU in each process, `ranks`, the number of processes, and `convolutions`
    of a CPU in bf16 (`models.convolution`).
    """
    facts = {}
    if runtime.device.type == "cpu" and runtime.dtype == torch.bfloat16:
        facts["convolutions"] = f"convolutions for a CPU {'with' if multiplies_tiles() else 'without'} AMX"
    norm = {"norm": "batch norm written out"} if runtime.compiles else {}
    return {**runtime.names, "threads": torch.get_num_threads(), "ranks": runtime.world.size, **norm, **facts}


def changed_computation(then: dict, now: dict) -> Notice | None:
    """The warning for a run that is resumed on other terms, see `computation`; None for the same ones.

    Terms that an older checkpoint does not hold are not compared.
    """
    keys = [key for key in now if key in then and then[key] != now[key]]
    if not keys:
        return None
    before, after = (", ".join(_term(key, side[key]) for key in keys) for side in (then, now))
    effect = "results may differ" if "dtype" in keys else "the last bits may differ"
    text = f"the checkpoint was written with {before}, and this start has {after}: {effect}"
    return Notice(text, "other-precision" if "dtype" in keys else "other-computation")


def changed_budget(before: float, now: Config) -> Notice | None:
    """The warning for a run that is resumed with a larger budget than the amount `before` of its checkpoint."""
    budget = now.to_spend
    if before == budget.amount:
        return None
    return Notice(
        f"budget: {budget.text} in all, of which the budget before was {before / budget.amount:.0%}; learning rate and "
        "view size follow the new schedule from here, unlike in a run of this length from its first step",
        "larger-budget",
    )


def same_run_elsewhere(config: Config, folder: RunFolder, identity: dict) -> Notice | None:
    """A warning where an unfinished run beside a new one has the same images at another path, and the same config.

    The name of a run without run.name has data.train in its hash, so that moved images begin another run. `identity`:
    of the new run's data.
    """
    unnamed = _UNNAMED.fullmatch(config.run.name)
    if not unnamed or identity["data"] == "synthetic" or config.run.fresh:
        return None
    for path in sorted(folder.path.parent.glob(f"{glob.escape(unnamed[1])}-*")):
        other = RunFolder(config, path, lambda notice: None)
        if path == folder.path or other.environment().get("data") != identity["data"]:
            continue
        has_ended = other.status().get("status") in ("done", "collapsed")
        try:
            if has_ended or not checkpoint.path_of(path, 0).exists():
                continue
            if differences_against_resuming(other.config_before(), config):
                continue
        except UserError:
            continue
        return Notice(
            f"run.name: {path} was trained on the same images at another path; run.name={path.name} resumes it",
            "same-run-elsewhere",
        )
    return None


def _term(key, value):
    if key == "compile":
        return f"compile {'on' if value else 'off'}"
    if key == "threads":
        return f"{value} CPU threads"
    if key == "ranks":
        return f"{value} process{'es' if value > 1 else ''}"
    return str(value)

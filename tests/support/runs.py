"""Whole runs in this process or another, and what their folders hold."""

import json
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist

from fastsiam.config import load_config
from fastsiam.run.finish import finish
from fastsiam.run.lines import KINDS
from fastsiam.runtime.distributed import World
from fastsiam.train import main, opened, train
from fastsiam.training.step import TrainingStep
from tests.support import optional
from tests.support.gloo_ranks import world as world_of_group
from tests.support.processes import run_python
from tests.support.refusals import printed_error

COMPARED = (
    "kind", "step", "epoch", "images_seen", "loss", "lr",
    "knn_top1", "raw_pixels_knn_top1", "std_ratio", "effective_rank", "mean_abs_cos",
)  # fmt: skip

EVERY_STEP = "checkpoint.every_seconds=0.0001"

# A ResNet-8 of width 8 on 16 px views: a step of 8 images takes about 15 ms on one core.
TINY = (
    "data.backend=auto",
    "views.size=16",
    "train.views_grow_at=null",
    "model.width=8",
    "method.projector={layers: 2, hidden: 16, out: 16}",
    "method.predictor.hidden=8",
    "train.batch_size=8",
    "train.epochs=2",
    "train.device=cpu",
    "train.precision=fp32",
    "train.log_every_steps=1",
    "evaluate.controls=false",
    "evaluate.knn_every_epochs=1",
    # Without DALI PIL decodes, whose workers are processes: slow to start, and not allowed to a rank's process.
    f"data.workers={int(optional.installed('dali'))}",
    "data.demo_seed=null",
)

# An encoder with stochastic depth. PIL's DataLoader draws from torch's generator when an iteration begins.
DRAWS = (
    "model.encoder=efficientnet_b0", "model.stem=imagenet", "model.width=null", "data.backend=pil", "data.workers=0",
)  # fmt: skip


def lines(folder):
    """Lines of a run's metrics.jsonl, which have no other fields than their kinds."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in found:
        kind = KINDS[line["kind"]]
        assert line.keys() <= kind.__required_keys__ | kind.__optional_keys__, line
    return found


def refused_unwritten(capsys, tmp_path, *overrides, config="quickstart"):
    """The error of a run that must exit with 2 after one line and write nothing; its dry run prints the same one."""
    before, arguments = sorted(tmp_path.rglob("*")), ["--config", config, *overrides]
    capsys.readouterr()
    assert main([*arguments, "--dry-run"]) == 2
    rehearsed = capsys.readouterr()
    assert main(arguments) == 2
    line = capsys.readouterr().err
    assert (line.count("\n"), rehearsed.out) == (1, "")
    assert rehearsed.err.splitlines()[-1:] == line.splitlines()
    assert sorted(tmp_path.rglob("*")) == before
    return printed_error(line)


def weights(folder):
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    momentum = {i: entry["momentum_buffer"] for i, entry in saved["optimizer"]["state"].items()}
    return saved["method"] | {f"momentum {i}": value for i, value in momentum.items()}


def record(folder):
    """Returns the numbers that a run computed, without its clocks and the lines that say that it was resumed."""
    metrics = [line for line in lines(folder) if line["kind"] not in ("header", "resume")]
    return [{key: line[key] for key in COMPARED if key in line} for line in metrics]


def assert_same_run(one, other):
    torch.testing.assert_close(weights(one), weights(other), rtol=0, atol=0)
    assert record(one) == record(other)


def die_at(step):
    """Ends a run as SIGKILL would: what is written afterwards is not a checkpoint."""

    def spoil(world, number, views):
        if number == step:
            raise RuntimeError("killed")

    return spoil


def assert_kills_change_nothing(overrides, runs, steps):
    """A run killed before each of `steps`, with a checkpoint at each one, ends bit by bit as one that was not."""
    train_here([*overrides, "run.name=whole"])
    for step in steps:
        with pytest.raises(RuntimeError, match="killed"):
            train_here([*overrides, EVERY_STEP, "run.name=killed"], spoil=die_at(step))
    train_here([*overrides, "run.name=killed"])
    assert [line["step"] for line in lines(runs / "killed") if line["kind"] == "resume"] == [step - 1 for step in steps]
    assert_same_run(runs / "whole", runs / "killed")


def start(overrides, **environment):
    return run_python("-m", "fastsiam.train", "--config", "quickstart", *overrides, wait=False, **environment)


def wait_for_step(process, folder, step):
    """Until metrics.jsonl shows a train line of `step` or later."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (folder / "metrics.jsonl").exists():
            text = (folder / "metrics.jsonl").read_text().rpartition("\n")[0]
            seen = [json.loads(line) for line in text.splitlines()]
            if any(line["kind"] == "train" and line["step"] >= step for line in seen):
                return
        time.sleep(0.002)
    raise AssertionError(f"step {step} was not reached: {process.communicate()}")


def of_an_earlier_version(folder):
    """Make the checkpoint of a run what version 0.1.0 wrote."""
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    saved["threads"] = saved.pop("computation")["threads"]
    del saved["budget"], saved["encoder"]
    torch.save(saved, folder / "checkpoint.pt")


class Asked:
    """A signal that one rank has received once so many steps are done."""

    def __init__(self, state, after, here):
        self._state, self._after, self._here = state, after, here

    @property
    def received(self):
        return 15 if self._here and self._after is not None and self._state.step >= self._after else None


def train_here(overrides, stop_after=None, spoil=None):
    """A whole run in this process; the last rank alone is asked to stop after `stop_after` steps.

    `overrides` are those of all ranks, or a tuple with those of each. `spoil(world, number, views)` may change the
    views of a step. Returns the result, and (epoch, indices) of each finished step.
    """
    world = world_of_group() if dist.is_initialized() else World()
    if isinstance(overrides, tuple):
        overrides = overrides[world.rank]
    seen = []
    config = load_config("quickstart", overrides)
    with opened(config, world) as (parts, _), pytest.MonkeyPatch.context() as patch:
        real, state = TrainingStep.__call__, parts.progress.state

        def step(self, views, number, indices, progress):
            if spoil:
                spoil(world, number, views)
            out = real(self, views, number, indices, progress)
            seen.append((state.epoch, indices.tolist()))
            return out

        patch.setattr(TrainingStep, "__call__", step)
        parts.run.signals = Asked(state, stop_after, world.rank == world.size - 1)
        status = train(config, *parts)
        return finish(parts.run, status, parts.step, parts.evaluation), seen


def numbers(folder, kind, *names):
    return np.array([[line[name] for name in names] for line in lines(folder) if line["kind"] == kind], float)

"""What a checkpoint holds of a run, and the run brought back to it."""

import glob
import re
from dataclasses import asdict

import torch

from fastsiam.errors import UserError
from fastsiam.run import checkpoint
from fastsiam.run.encoder_file import describe_encoder
from fastsiam.run.folder import RunFolder
from fastsiam.run.resume import changes, differences_against_resuming
from fastsiam.training.step import TrainingStep

# A run without run.name: its config's name and a hash of its overrides.
_UNNAMED = re.compile(r"(.+)-[0-9a-f]{8}")


def checkpoint_contents(session, step: TrainingStep) -> dict:
    """What `restore` takes: tensors and plain values only."""
    session.clock.update_state()
    return {
        "layout": checkpoint.LAYOUT,
        "state": asdict(session.state),
        **step.state_dict(),
        "collapsed_in_a_row": session.checkup.guard.collapsed_in_a_row,
        "random": torch.get_rng_state(),
        "computation": _computation(session),
        "budget": session.pace.budget.amount,
        "identity": session.identity,
        "encoder": describe_encoder(session.config, session.state.step, session.folder.commit),
        "metrics": session.folder.metrics_state(),
    }


def restore(session, step: TrainingStep, saved: dict) -> None:
    """Bring weights, optimizer, random numbers and metrics.jsonl back to a checkpoint; warns of what is otherwise now.

    `session.state` is that of the checkpoint already.
    """
    step.load_state_dict(saved)
    session.checkup.guard.collapsed_in_a_row = saved["collapsed_in_a_row"]
    torch.set_rng_state(saved["random"])
    if session.world.is_first:
        session.folder.restore_metrics(saved["metrics"])
    session.journal.write("resume", world_size=session.world.size)
    state = session.state
    session.journal.say(f"resume    at step {state.step:,}, epoch {state.epoch + 1}, image {state.cursor:,}")
    for warning in changes(saved, _computation(session), session.config):
        session.journal.warn(warning)


def same_run_elsewhere(session) -> str | None:
    """A warning where an unfinished run beside a new one has the same images at another path, and the same config.

    The name of a run without run.name has data.train in its hash, so that moved images begin another run.
    """
    folder, config = session.folder.path, session.config
    unnamed = _UNNAMED.fullmatch(config.run.name)
    if not unnamed or session.source is None or config.run.fresh:
        return None
    for path in sorted(folder.parent.glob(f"{glob.escape(unnamed[1])}-*")):
        other = RunFolder(config, path, session.journal.warn)
        if path == folder or other.environment().get("data") != session.identity["data"]:
            continue
        has_ended = other.status().get("status") in ("done", "collapsed")
        try:
            if has_ended or not checkpoint.path_of(path, 0).exists() or not _may_become(other, config):
                continue
        except UserError:
            continue
        return f"{path} was trained on the same images at another path; run.name={path.name} goes on with it"
    return None


def _may_become(folder, config):
    return not differences_against_resuming(folder.config_before(), config)


def _computation(session):
    norm = {"norm": "batch norm written out"} if session.compiles else {}
    return {**session.runtime.names, "threads": torch.get_num_threads(), "ranks": session.world.size, **norm}

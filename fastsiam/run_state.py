"""What a checkpoint holds of a run, and the run brought back to it."""

from dataclasses import asdict

import torch

from fastsiam import checkpoint
from fastsiam.resuming import changes
from fastsiam.saved_encoder import describe_encoder
from fastsiam.step import TrainingStep


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


def _computation(session):
    return {**session.compute.names, "threads": torch.get_num_threads(), "ranks": session.world.size}

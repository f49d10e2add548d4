"""Checks before the first run of a sweep starts: one process, and runs that would not refuse."""

import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from fastsiam.errors import UserError
from fastsiam.runtime import slurm
from fastsiam.sweep.child import TRAINER
from fastsiam.sweep.ledger import Ledger
from fastsiam.sweep.plan import Plan


def check_one_process(command: str, environment: Mapping[str, str] = os.environ) -> None:
    """Raises `UserError` under torchrun and in a SLURM step of several tasks."""
    ranks = dict(environment)
    slurm.fill_in(ranks)
    if ranks.get("WORLD_SIZE", "1") != "1":
        raise UserError(
            f"{command}: is one process that starts its runs itself; start it without torchrun and with one task",
            "one-process",
        )


def rehearse(plan: Plan, known: Ledger) -> list[str]:
    """Returns the warnings of a run that would start; writes nothing.

    Raises the `UserError` with which the first run and the last would both refuse.
    """
    waiting = [one for one in plan.variants if not known.is_final(one.name, 0)]
    refusals = []
    for variant in {one.name: one for one in (*waiting[:1], *waiting[-1:])}.values():
        with tempfile.TemporaryDirectory() as folder:
            config = Path(folder) / "config.yaml"
            config.write_text(plan.config_of(variant).to_yaml(), encoding="utf-8")
            done = subprocess.run([*TRAINER, "--config", str(config), "--dry-run"], capture_output=True, text=True)
        lines = [line for line in done.stderr.splitlines() if line.startswith("fastsiam: ")]
        if done.returncode != 2 or not lines or "[run-locked]" in lines[-1]:
            return [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
        refusals.append(lines[-1].removeprefix("fastsiam: "))
    if refusals:
        sentence, _, code = refusals[0].rpartition(" [")
        raise UserError(sentence or refusals[0], code.rstrip("]") if sentence else "refused")
    return []

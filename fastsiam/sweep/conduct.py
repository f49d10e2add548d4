"""A plan from its first screen to its table: what the commands sweep and experiments share."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence

from rich.console import Console

from fastsiam.errors import UserError
from fastsiam.sweep.child import TRAINER
from fastsiam.sweep.engine import exit_code, opened, train_all
from fastsiam.sweep.ledger import Ledger
from fastsiam.sweep.outcome import saying
from fastsiam.sweep.plan import Plan
from fastsiam.sweep.start import rehearse

# Overrides that change where a run lies and how it is computed, not what.
_PLACES = ("run.dir=", "data.workers=", "train.device=")


def conduct(
    plan: Plan,
    lines: Iterable[str],
    *,
    devices: Sequence[str],
    dry_run: bool,
    conclude: Callable[[Ledger, Console], object],
) -> int:
    """Prints `lines`, trains what is left of a plan, and concludes; returns the exit code.

    `dry_run`: lists the runs in place of training. Raises `UserError` where the plan does not fit its folder, or its
    runs would refuse.
    """
    known, console = Ledger(plan.folder), Console()
    known.check(plan)
    say = saying(console)
    for line in lines:
        say(line)
    for warning in rehearse(plan, known):
        say(warning)
    if dry_run:
        for variant in plan.variants:
            say(f"run       {plan.folder / variant.name}")
        return 0
    with opened(plan) as ledger:
        stopped = train_all(plan, ledger, console, devices=devices, trainer=TRAINER)
        conclude(ledger, console)
        if stopped is not None:
            say("stopped   give the same command to go on")
        return exit_code(plan, ledger, stopped)


def check_budget(budget: str | None, keys: Iterable[str]) -> None:
    """Raises `UserError` where --budget is given and one of the `keys` that are set gives a length as well."""
    for key in ("budget", "train.epochs"):
        if budget is not None and key in keys:
            raise UserError(
                f"--budget: is divided over the runs, and {key} is given as well; leave one out", "two-budgets"
            )


def digest_of(overrides: Iterable[str], *asked: object) -> str:
    """Returns 8 hexadecimal digits of what is asked for; where it lies and which device trains is not part of it."""
    fixed = sorted(override for override in overrides if not override.startswith(_PLACES))
    return hashlib.sha256(json.dumps([fixed, *asked]).encode()).hexdigest()[:8]

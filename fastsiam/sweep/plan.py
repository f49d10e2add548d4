"""Plan of a sweep: its variants, the rounds of successive halving, and the share of the budget that each run gets."""

import functools
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fastsiam.config import Config
from fastsiam.config.budget import Budget, parse_budget, part_of
from fastsiam.errors import UserError

MOST_RUNS = 1000
SEED = "train.seed"
# Of the wall time of each start: the interpreter before the run's own clock begins, and the report after it. Measured
# on two cores of an AMD EPYC: 3 to 5 s.
START_SECONDS = 5
# Below this a round of a run would be imports and compilation alone, which take 5 to 20 s.
LEAST_SECONDS = 20


@dataclass(frozen=True)
class Variant:
    """One run of a sweep: a setting, which its seeds share, and a seed."""

    label: str
    """Of the setting, as tables and sentences name it."""
    config: Config
    seed: int
    values: Mapping[str, str] = field(default_factory=dict)
    """Columns of the table; without them it has the label alone."""

    @functools.cached_property
    def name(self) -> str:
        """Name of the run folder."""
        return f"{folder_name(self.label)}_seed={self.seed}"


@dataclass(frozen=True)
class Round:
    """Runs that train side by side to the same share of their schedule."""

    share: float
    """Of the epochs or budget of a run, at which the round ends; 1 for the last."""
    settings: int
    """Number of settings that take part."""


@dataclass(frozen=True)
class Plan:
    """What a sweep trains, where, and how long."""

    folder: Path
    variants: tuple[Variant, ...]
    rounds: tuple[Round, ...]
    measure: str
    """`knn_top1` or `rankme`: what settings can be compared by as their configs say, the larger the better."""
    budget: str | None = None
    """Of the whole sweep."""
    each: str | None = None
    """Budget of a run that trains to its end."""
    at_once: int = 1

    @property
    def labels(self) -> list[str]:
        """Settings in their order."""
        return list(dict.fromkeys(variant.label for variant in self.variants))

    @property
    def identity(self) -> dict:
        """What two starts of one sweep have in common."""
        rounds = [[part.share, part.settings] for part in self.rounds]
        return {
            "runs": [variant.name for variant in self.variants],
            "measure": self.measure,
            "budget": self.budget,
            "rounds": rounds,
        }

    def config_of(self, variant: Variant) -> Config:
        """Returns the config with which a variant trains: its own, with its run folder and its budget."""
        values = {"run.dir": str(self.folder), "run.name": variant.name, "run.fresh": False}
        if self.each is not None:
            values |= {"train.epochs": None, "budget": self.each}
        return variant.config.with_values(values)

    def stretch(self, number: int) -> float:
        """Share of a run that round `number` adds."""
        return self.rounds[number].share - (self.rounds[number - 1].share if number else 0.0)


def plan_of(
    variants: Sequence[Variant],
    folder: Path | str,
    *,
    budget: str | None = None,
    halving: bool = False,
    at_once: int = 1,
    each: str | None = None,
) -> Plan:
    """Returns the plan of a sweep whose runs lie below `folder`.

    `budget`: of all runs together, see `each_of`; None: each run has the epochs or the budget of its config. `each`:
    the budget of a run where it is known already, from an earlier start. Raises `UserError` for what cannot be
    compared, halved or divided.
    """
    _check(variants)
    settings = len({variant.label for variant in variants})
    rounds = halvings(settings) if halving else (Round(1.0, settings),)
    plan = Plan(Path(folder), tuple(variants), rounds, measure_of(variants), budget, each, at_once)
    if halving:
        _check_halving(variants)
    return plan if budget is None or each is not None else replace(plan, each=each_of(plan))


def config_path(plan: Plan, variant: Variant) -> Path:
    """Returns the file with the config that a run is started with."""
    return plan.folder / "configs" / f"{variant.name}.yaml"


def halvings(settings: int) -> tuple[Round, ...]:
    """Returns the rounds of successive halving (Jamieson, Talwalkar 2016, algorithm 1, with ceil(log2 n) rounds).

    The better half goes on, rounded up, and each round trains twice as far as the one before: of 8 settings 8 to a
    quarter of their schedule, 4 to half of it, 2 to its end. Two settings have two rounds: both to the half, one on.
    """
    number = max(2, math.ceil(math.log2(settings)))
    sizes = [settings]
    for _ in range(number - 1):
        sizes.append(math.ceil(sizes[-1] / 2))
    return tuple(Round(0.5 ** (number - 1 - index), size) for index, size in enumerate(sizes))


def each_of(plan: Plan) -> str:
    """Returns the budget of a run that trains to its end, of which `plan.budget` pays for all.

    Time is that on the wall: runs that train at once share it, and each start costs `START_SECONDS` more. Images,
    energy and money are added up over the runs. Raises `UserError` for too little.
    """
    config = plan.variants[0].config
    whole = _parsed(plan.budget, config.budget_price_per_hour)
    lengths = starts = 0.0
    for number in range(len(plan.rounds)):
        runs = _runs_in(plan, number)
        turns = math.ceil(runs / plan.at_once) if whole.is_time else runs
        lengths, starts = lengths + turns * plan.stretch(number), starts + turns
    overhead = START_SECONDS * starts if whole.is_time else 0.0
    shortest = min(plan.stretch(number) for number in range(len(plan.rounds)))
    least = LEAST_SECONDS if whole.kind == "seconds" else 1e-6
    if whole.kind == "images":
        least = max(variant.config.train.batch_size for variant in plan.variants)
    if (whole.amount - overhead) / lengths * shortest < least:
        needed = least * lengths / shortest + overhead
        raise UserError(_too_little(plan, whole, needed), "budget-too-small")
    return part_of(plan.budget, (whole.amount - overhead) / lengths / whole.amount)


def measure_of(variants: Sequence[Variant]) -> str:
    """Returns what all variants can be compared by: kNN accuracy with data.val, RankMe without labels."""
    if any(variant.config.data.backend == "synthetic" for variant in variants):
        raise UserError(
            "data.backend: synthetic images give nothing to compare runs by; set data.train to a folder of images",
            "no-measure",
        )
    return "knn_top1" if all(variant.config.data.val is not None for variant in variants) else "rankme"


def folder_name(text: str) -> str:
    """Returns a text as a part of a run's name: other signs become `-`, and a long text ends in its hash."""
    name = re.sub(r"[^A-Za-z0-9._=-]+", "-", text).strip("-") or "run"
    name = name if name[0].isalnum() else f"x{name}"
    changed = len(name) > 120 or re.sub(r"[ '\"]+", "", text) != name
    return f"{name[:100]}-{hashlib.sha256(text.encode()).hexdigest()[:6]}" if changed else name


def _runs_in(plan, number):
    """Most runs that a round can have, where settings differ in their number of seeds."""
    seeds = sorted((sum(one.label == label for one in plan.variants) for label in plan.labels), reverse=True)
    return sum(seeds[: plan.rounds[number].settings])


def _parsed(budget, price) -> Budget:
    try:
        return parse_budget(budget, price)
    except UserError as error:
        raise UserError(f"--{error}" if error.key == "budget" else str(error), error.code) from error


def _too_little(plan, whole, needed):
    ask = f"{math.ceil(needed):,} images" if whole.kind == "images" else f"{math.ceil(needed / 60)}min"
    if not whole.is_time and whole.kind != "images":
        ask = f"{needed / whole.amount:.1f} times as much"
    runs, rounds = len(plan.variants), len(plan.rounds)
    halved = f" in {rounds} rounds" if rounds > 1 else ""
    return (
        f"--budget: {plan.budget} is too little for {runs} runs{halved}, {plan.at_once} at "
        f"once; give {ask} or more, or fewer values"
    )


def _check(variants):
    if not variants:
        raise UserError("KEY=VALUES: there is nothing to train; give a key with its values", "nothing-to-train")
    if len(variants) > MOST_RUNS:
        raise UserError(f"KEY=VALUES: {len(variants):,} runs are more than {MOST_RUNS:,}; give fewer values", "many")
    names = [variant.name for variant in variants]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"KEY=VALUES: two runs would be named {name}; leave one of them out", "same-setting")


def _check_halving(variants):
    settings = {variant.label for variant in variants}
    if len(settings) < 2:
        raise UserError(
            "--halving: there is one setting, and its seeds are judged together; give a key other than train.seed "
            "several values, or leave --halving out",
            "one-setting",
        )
    for key in ("max_share", "max_steps"):
        if any(getattr(variant.config.train, key) not in (None, 1.0) for variant in variants):
            raise UserError(
                f"train.{key}: is what --halving ends its rounds with; leave one of the two out", "halving-stops"
            )

"""Settings compared: mean and spread over their seeds, who goes on, who is best, and by how much."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from fastsiam.sweep.ledger import Ended, Ledger
from fastsiam.sweep.plan import Plan, Variant


@dataclass(frozen=True)
class Measured:
    """Numbers of several seeds: their mean, and their sample standard deviation (n - 1)."""

    n: int
    mean: float
    spread: float | None
    """None for a single number."""


@dataclass(frozen=True)
class Setting:
    """A row of the table: the seeds of one setting at the end of the last round that it trained in."""

    label: str
    values: dict[str, str]
    round: int
    """From 0; -1 before the first has ended."""
    share: float
    """Of the schedule that it trained."""
    score: Measured | None
    loss: Measured | None
    std_ratio: Measured | None
    images_per_second: Measured | None
    runs: tuple[tuple[Variant, Ended | None], ...]

    @property
    def is_whole(self) -> bool:
        """True where every seed has a score."""
        return self.score is not None and self.score.n == len(self.runs)

    @property
    def status(self) -> str:
        """`done`, or how many of its seeds ended how."""
        found = [ended.status if ended else "unfinished" for _, ended in self.runs]
        counts = {status: found.count(status) for status in found}
        return found[0] if len(counts) == 1 else ", ".join(f"{n} {status}" for status, n in counts.items())


def measured(numbers: Sequence[float | None]) -> Measured | None:
    """Returns mean and spread of those numbers that are known and finite; None without one."""
    known = [number for number in numbers if number is not None and math.isfinite(number)]
    if not known:
        return None
    return Measured(len(known), statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None)


def measure_in(plan: Plan, ledger: Ledger) -> str:
    """Returns what the runs are compared by: that of the plan, and RankMe where a run that is done has no kNN.

    A run leaves kNN out, with a warning, where data.val does not exist or does not belong to data.train.
    """
    return "rankme" if ledger.leaves_knn_out else plan.measure


def at_round(plan: Plan, ledger: Ledger, label: str, number: int) -> Setting:
    """Returns a setting as it was at the end of round `number`."""
    runs = tuple((variant, ledger.of(variant.name, number)) for variant in plan.variants if variant.label == label)
    ended = [end for _, end in runs if end is not None]
    done = [end for end in ended if end.status == "done"]
    measure = measure_in(plan, ledger)
    return Setting(
        label=label,
        values=dict(runs[0][0].values),
        round=number,
        share=plan.rounds[number].share,
        score=measured([getattr(end, measure) for end in done]),
        loss=measured([end.loss for end in done]),
        std_ratio=measured([end.std_ratio for end in ended]),
        images_per_second=measured([end.images_per_second for end in ended]),
        runs=runs,
    )


def ranked(settings: Sequence[Setting]) -> list[Setting]:
    """Returns settings of one round, the best first: those with a score of every seed, then those with some."""
    return sorted(settings, key=lambda one: (not one.is_whole, -one.score.mean if one.score else math.inf))


def taking_part(plan: Plan, ledger: Ledger, number: int) -> list[str]:
    """Returns the labels of the settings that train in round `number`: the best of the round before, with a score."""
    if number == 0:
        return plan.labels
    before = [at_round(plan, ledger, label, number - 1) for label in taking_part(plan, ledger, number - 1)]
    return [one.label for one in ranked(before)[: plan.rounds[number].settings] if one.score is not None]


def table(plan: Plan, ledger: Ledger) -> list[Setting]:
    """Returns a row for each setting, the best first; those that were left out in an earlier round come after."""
    rows: list[Setting] = []
    for number in reversed(range(len(plan.rounds))):
        there = [label for label in taking_part(plan, ledger, number) if label not in {row.label for row in rows}]
        found = [at_round(plan, ledger, label, number) for label in there]
        # A round that has not begun has no row: its settings stand where they were.
        begun = [one for one in found if number == 0 or any(end and end.round == number for _, end in one.runs)]
        rows += ranked(begun)
    return sorted(rows, key=lambda row: row.score is None)


def verdict(plan: Plan, ledger: Ledger, rows: Sequence[Setting]) -> str:
    """Returns one sentence: which setting is best, by how much, and whether seeds alone could make that difference.

    Two settings are compared at the end of the last round that both have trained in.
    """
    best, measure = rows[0] if rows else None, measure_in(plan, ledger)
    if best is None or best.score is None:
        return "no run has a result to compare"
    over = f" over {best.score.n} seeds" if best.score.n > 1 else ""
    text = f"{best.label}: {described(best.score, measure)}{over}"
    others = [row for row in rows[1:] if row.score is not None]
    if not others:
        return f"{text}; nothing to compare it with"
    second = others[0]
    best_then = at_round(plan, ledger, best.label, second.round)
    lead = best_then.score.mean - second.score.mean
    if lead < 0:
        seeds = f"{second.score.n} of {len(second.runs)} seeds"
        return f"{text}; {second.label} has {described(second.score, measure)} with {seeds}"
    points = "points" if measure == "knn_top1" else "directions"
    when = (
        f" at {100 * second.share:g} % of the schedule, where it was last compared" if second.round < best.round else ""
    )
    text += f"; {lead:.2f} {points} above {second.label}{when}"
    spreads = [one.score.spread for one in (best_then, second)]
    if None in spreads:
        return f"{text}; one seed does not tell that from chance: add train.seed=0..2"
    spread = max(spreads)
    if lead > spread:
        return f"{text}, more than the spread of seeds ({spread:.2f})"
    return f"{text}, not more than the spread of seeds ({spread:.2f}): more seeds would tell"


def described(found: Measured | None, measure: str) -> str:
    """Returns `kNN 52.31 ± 0.42 %`, or the same of RankMe."""
    name, unit = ("kNN", " %") if measure == "knn_top1" else ("RankMe", "")
    return f"{name} {number(found, 2)}{unit}"


def number(found: Measured | None, digits: int) -> str:
    """Returns `52.31 ± 0.42`, without the spread of a single seed."""
    if found is None:
        return "–"
    spread = "" if found.spread is None else f" ± {found.spread:.{digits}f}"
    return f"{found.mean:,.{digits}f}{spread}"

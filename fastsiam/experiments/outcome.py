"""What the runs of an experiment came to: how each ended, its line for result files, and what holds of the paper."""

import hashlib
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastsiam.config import Config
from fastsiam.config.load import OPERATIONAL
from fastsiam.config.yaml_file import flat
from fastsiam.experiments.experiments import Case, Experiment
from fastsiam.report.read_run import Run, open_run
from fastsiam.sweep.ledger import Ended, Ledger
from fastsiam.sweep.plan import Plan, Variant
from fastsiam.sweep.scores import Measured, measured

# Points of each curve in a line of results.
_POINTS = 40
_CURVES = {"loss": ("train", "loss"), "std_ratio": ("collapse", "std_ratio"), "knn_top1": ("knn", "knn_top1")}
_MACHINE = ("cpu_cores", "cpu_threads", "gpu", "device", "dtype", "torch", "fastsiam")


@dataclass(frozen=True)
class Outcome:
    """One run."""

    variant: Variant
    status: str
    """done | collapsed (told by the guard) | diverged (loss not finite) | unfinished | refused, stuck, crashed"""
    ended: Ended | None
    run: Run | None

    @property
    def knn_top1(self) -> float | None:
        """Percent at the end; of a collapsed run too."""
        return self.ended and self.ended.knn_top1


@dataclass(frozen=True)
class Row:
    """One variant with its seeds."""

    case: Case
    outcomes: tuple[Outcome, ...]

    @property
    def knn(self) -> Measured | None:
        return measured([outcome.knn_top1 for outcome in self.outcomes])

    def number(self, field: str) -> Measured | None:
        """Mean and spread of `loss` or `std_ratio` at the end."""
        return measured([outcome.ended and getattr(outcome.ended, field) for outcome in self.outcomes])

    @property
    def has_ended(self) -> bool:
        return all(outcome.status in ("done", "collapsed", "diverged") for outcome in self.outcomes)

    @property
    def status(self) -> str:
        """Of all seeds, or how many ended how."""
        found = [outcome.status for outcome in self.outcomes]
        counts = {status: found.count(status) for status in found}
        return found[0] if len(counts) == 1 else ", ".join(f"{n} {status}" for status, n in counts.items())

    def count(self, status: str) -> int:
        return sum(outcome.status == status for outcome in self.outcomes)


def rows_of(plan: Plan, ledger: Ledger, cases: Sequence[Case]) -> list[Row]:
    """Returns a row for each variant, in the order of the paper."""
    found = []
    for case in cases:
        variants = [variant for variant in plan.variants if variant.label == case.label]
        found.append(Row(case, tuple(_outcome(plan, ledger, variant) for variant in variants)))
    return found


def _outcome(plan, ledger, variant):
    ended, folder = ledger.last(variant.name), plan.folder / variant.name
    run = open_run(folder, variant.name) if (folder / "config.yaml").is_file() else None
    return Outcome(variant, _status(ended, run), ended, run)


def _status(ended, run):
    if ended is None:
        return "unfinished"
    if ended.status == "not finite":
        return "diverged"
    return "collapsed" if ended.status == "done" and _has_collapsed(run) else ended.status


def _has_collapsed(run):
    """The guard has told, and z has not come back: the last measure is one of a collapse, too."""
    from fastsiam.evaluate.collapse import Measures, is_collapsed

    told = any(line.get("code") == "collapsed" for line in run.of_kind("warning"))
    lines = run.of_kind("collapse")
    if not told or not lines:
        return False
    numbers = {name: lines[-1].get(name) for name in Measures.__dataclass_fields__}
    return None in numbers.values() or is_collapsed(Measures(**numbers))


@dataclass(frozen=True)
class Verdict:
    """One finding of the paper beside ours."""

    word: str
    """holds | differs | open: within the spread of seeds, or not trained"""
    sentence: str


def verdicts(experiment: Experiment, rows: Sequence[Row]) -> list[Verdict]:
    """Returns whether each order that the paper finds, and each failure, is found in these runs too."""
    by_row = {row.case.row: row for row in rows}
    found = [_of_failure(row) for row in rows if row.case.paper.ended]
    claims = [claim for claim in experiment.claims if {claim.better, claim.worse} <= by_row.keys()]
    return found + [_of_order(by_row[claim.better], by_row[claim.worse]) for claim in claims]


def _of_failure(row):
    said, n = row.case.paper.ended, len(row.outcomes)
    if not row.has_ended:
        return Verdict("open", f"{row.case.title}: {said} in the paper; ours {row.status}")
    failed = row.count("collapsed") + row.count("diverged")
    word = "holds" if failed == n else "differs" if failed == 0 else "open"
    return Verdict(word, f"{row.case.title}: {said} in the paper; ours {row.status}, {n} seed{'s' * (n > 1)}")


def _of_order(better, worse):
    papers = [row.case.paper.top1 for row in (better, worse)]
    text = f"{better.case.title} above {worse.case.title}"
    if None not in papers:
        text += f": the paper by {papers[0] - papers[1]:.1f} points"
    if not (better.has_ended and worse.has_ended):
        return Verdict("open", f"{text}; ours not trained to the end")
    gap = _mean(better) - _mean(worse)
    if not math.isfinite(gap):
        word = "open" if math.isnan(gap) else "holds" if gap > 0 else "differs"
        lost = worse if gap > 0 else better
        return Verdict(word, f"{text}; ours, where {lost.case.title} diverged")
    spreads = [row.knn.spread for row in (better, worse)]
    ours = f"{text}; ours by {gap:.1f}"
    if None in spreads:
        apart = gap > 0 and worse.count("collapsed") > better.count("collapsed")
        return Verdict("holds" if apart else "open", f"{ours}, one seed each")
    spread = max(spreads)
    if abs(gap) <= spread:
        return Verdict("open", f"{ours}, within the spread of seeds ({spread:.1f})")
    return Verdict("holds" if gap > 0 else "differs", f"{ours} ± {spread:.1f}")


def _mean(row):
    """kNN of the seeds; a diverged one has learned nothing."""
    if row.count("diverged"):
        return -math.inf
    known = [outcome.knn_top1 for outcome in row.outcomes]
    return math.nan if None in known else statistics.fmean(known)


def result_lines(experiment: Experiment, plan: Plan, rows: Sequence[Row]) -> list[dict]:
    """Returns a line for each run that has ended, without names of folders: what a results file holds."""
    return [_line(experiment, plan, row.case, outcome) for row in rows for outcome in row.outcomes if outcome.ended]


def _line(experiment, plan, case, outcome):
    config, ended, run = plan.config_of(outcome.variant), outcome.ended, outcome.run
    environment = run.environment if run else {}
    return {
        "experiment": experiment.name,
        "source": experiment.source,
        "row": case.row,
        "variant": case.label,
        "title": case.title,
        "seed": outcome.variant.seed,
        "config_hash": config_hash(config),
        "budget": config.to_spend.text,
        "images_seen": run and _whole(run.last("images_seen")),
        "step": ended.step,
        "status": outcome.status,
        "knn_top1": ended.knn_top1,
        "loss": ended.loss,
        "std_ratio": ended.std_ratio,
        "rankme": ended.rankme,
        "seconds": ended.seconds,
        "said": ended.said if outcome.status in ("diverged", "collapsed") else "",
        "paper_top1": case.paper.top1,
        "paper_ended": case.paper.ended,
        "curves": {name: _curve(run, *of) for name, of in _CURVES.items()} if run else {},
        "commit": environment.get("commit"),
        "machine": {name: environment[name] for name in _MACHINE if name in environment},
    }


def config_hash(config: Config) -> str:
    """Returns 12 hex digits of what a config computes; where data and run lie does not count."""
    kept = {key: value for key, value in flat(config.model_dump(mode="json")).items() if key not in OPERATIONAL}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


def _curve(run, kind, field):
    """[images, value] of at most so many points, the last among them."""
    series = run.series(kind, field, "images")
    if series is None:
        return []
    places = np.unique(np.linspace(0, len(series.x) - 1, min(_POINTS, len(series.x))).round().astype(int))
    pairs = zip(series.x[places].tolist(), series.y[places].tolist(), strict=True)
    return [[int(x), round(y, 4) if math.isfinite(y) else None] for x, y in pairs]


def _whole(number):
    return None if number is None else int(number)

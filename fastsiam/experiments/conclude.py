"""End of an experiment: table and findings on the screen, results.jsonl, and the page."""

import json
from collections.abc import Sequence

from rich.console import Console

from fastsiam.experiments.experiments import Case, Experiment
from fastsiam.experiments.outcome import Row, Verdict, result_lines, rows_of, verdicts
from fastsiam.experiments.published import METRIC
from fastsiam.sweep import scores
from fastsiam.sweep.ledger import Ledger
from fastsiam.sweep.outcome import PAGE, saying, write_files
from fastsiam.sweep.page import Content, line_of, render
from fastsiam.sweep.plan import Plan
from fastsiam.sweep.table import aligned

RESULTS = "results.jsonl"
_TONES = {"holds": "good", "differs": "bad", "open": "neutral"}


def conclude(experiment: Experiment, cases: Sequence[Case], plan: Plan, ledger: Ledger, console: Console) -> list[Row]:
    """Prints the paper's numbers beside ours and what holds; writes results.jsonl and report.html; returns the rows."""
    rows = rows_of(plan, ledger, cases)
    found = verdicts(experiment, rows)
    say = saying(console)
    say("")
    for line in aligned(columns(rows)):
        say(line)
    say("")
    for outcome in (outcome for row in rows for outcome in row.outcomes):
        if outcome.ended and outcome.ended.said:
            say(f"{outcome.status:9} {outcome.variant.name}: {outcome.ended.said}")
    say(f"paper     {experiment.source}: {experiment.shows}")
    for verdict in found:
        say(f"{verdict.word:9} {verdict.sentence}")
    lines = "".join(json.dumps(line) + "\n" for line in result_lines(experiment, plan, rows))
    document = page(experiment, plan, rows, found).encode("utf-8", errors="backslashreplace")
    write_files(plan.folder, {RESULTS: lines.encode(), PAGE: document}, say)
    say(f"results   {plan.folder / RESULTS}")
    say(f"report    {plan.folder / PAGE}")
    return rows


def columns(rows: Sequence[Row]) -> list[tuple[str, bool, list[str]]]:
    """Returns the columns of the table as (heading, is a number, cells), in the order of the paper."""
    return [
        ("variant", False, [row.case.title for row in rows]),
        ("paper, %", True, [str(row.case.paper) for row in rows]),
        ("ours: kNN, %", True, [scores.number(row.knn, 1) for row in rows]),
        ("n", True, [str(row.knn.n if row.knn else 0) for row in rows]),
        ("loss", True, [scores.number(row.number("loss"), 3).replace("-", "−") for row in rows]),
        ("std_ratio", True, [scores.number(row.number("std_ratio"), 2) for row in rows]),
        ("status", False, [row.status for row in rows]),
    ]


def page(experiment: Experiment, plan: Plan, rows: Sequence[Row], found: Sequence[Verdict]) -> str:
    """Returns the whole document."""
    outcomes = [outcome for row in rows for outcome in row.outcomes]
    budget = f"; budget {plan.budget} in all, {plan.each} a run" if plan.budget else ""
    return render(
        Content(
            eyebrow=f"Experiment of the SimSiam paper (arXiv 2011.10566), {experiment.source}",
            title=experiment.title,
            lead=experiment.shows,
            heading="Variants",
            note=f"Paper: {METRIC}. Ours: kNN top-1 on data.val at the end, of collapsed runs too; mean ± sample "
            "standard deviation over n seeds. Compare orders, not numbers: data and encoder are others. collapsed is "
            "told by the collapse guard, diverged is a loss that is not finite.",
            columns=columns(rows),
            labels=[row.case.title for row in rows],
            folders=[[plan.folder / outcome.variant.name for outcome in row.outcomes] for row in rows],
            runs=[line_of(plan, one.variant, one.ended, "knn_top1", one.status) for one in outcomes],
            measure="knn_top1",
            findings=[(_TONES[verdict.word], verdict.word, verdict.sentence) for verdict in found],
            footer=budget,
            axes=("images", "epochs", "time"),
        )
    )

"""Result lines of experiments: from run folders to experiments.jsonl, and from there to tables."""

import json
from collections.abc import Iterable
from pathlib import Path

from benchmarks.harness.results import Results
from benchmarks.readme.captions import caption
from fastsiam.config import Config
from fastsiam.errors import UserError
from fastsiam.experiments.conclude import RESULTS, columns
from fastsiam.experiments.experiments import EXPERIMENTS, Case
from fastsiam.experiments.outcome import Outcome, Row, verdicts
from fastsiam.experiments.published import METRIC, Result
from fastsiam.sweep.ledger import Ended, Ledger

BENCHMARK = "experiments"
# Of a line of results.jsonl, what a line here says elsewhere.
_ELSEWHERE = ("experiment", "seed", "commit", "machine")


def read(folder: Path) -> list[dict]:
    """Returns the lines of an experiment's folder; none before it has ended."""
    path = folder / RESULTS
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def seeds_begun(folder: Path) -> int:
    """Returns the number of seeds that an earlier start of an experiment has asked for."""
    return len({name.rpartition("=")[2] for name in Ledger(folder).plan.get("runs", ())})


def collected(results: Results, runs: Path, config: Config, setting: dict) -> list[dict]:
    """Returns a result line for each run under `runs`; `setting`: params that name the images.

    Raises `UserError` where runs were made by another commit than this checkout's.
    """
    setting = {
        **setting, "encoder": config.model.encoder, "width": config.model.width, "size": config.views[0].size,
        "batch": config.train.batch_size, "length": config.to_spend.text,
    }  # fmt: skip
    found = []
    for name in EXPERIMENTS:
        for line in read(runs / name):
            params = {"experiment": name, **setting, "seed": line["seed"]}
            numbers = {key: value for key, value in line.items() if key not in _ELSEWHERE}
            variant = numbers.pop("variant")
            made = results.write(BENCHMARK, variant, params, None, run_commit=line["commit"], **numbers)
            _check_commit(runs / name, made)
            found.append(made)
    return found


def _check_commit(folder, line):
    ours, theirs = line["environment"].get("commit") or "", line["run_commit"] or ""
    if not theirs or not ours.startswith(theirs):
        raise UserError(
            f"--runs: {folder} was trained by commit {theirs or 'unknown'}, and this checkout is {ours[:12]}; check "
            "that one out, or give --runs NEW",
            "other-commit",
        )


def rows(lines: Iterable[dict]) -> dict[str, list[Row]]:
    """Returns the rows of each experiment, as `fastsiam experiments` has them, in the order of the paper."""
    found: dict[str, dict[str, tuple[Case, list[Outcome]]]] = {}
    for line in lines:
        result = Result(line["paper_top1"], line["paper_ended"])
        case = Case(line["row"], line["variant"], line["title"], {}, result)
        numbers = {name: line[name] for name in ("knn_top1", "rankme", "loss", "std_ratio", "seconds", "step")}
        end = Ended(line["variant"], line["variant"], line["params"]["seed"], 0, line["status"], 0, **numbers)
        rows_of = found.setdefault(line["params"]["experiment"], {})
        rows_of.setdefault(case.label, (case, []))[1].append(Outcome(None, line["status"], end, None))
    return {
        name: [Row(case, tuple(outcomes)) for case, outcomes in of_name.values()] for name, of_name in found.items()
    }


def text(found: dict[str, list[list[dict]]]) -> str:
    """Returns the block of the page: for each machine a caption, and each experiment's table and findings."""
    machines = found.get(BENCHMARK, [])
    return "\n\n".join(_of_machine(lines) for lines in machines) if machines else "No experiment has been recorded yet."


def _of_machine(lines):
    shared = {key: value for key, value in lines[0]["params"].items() if key not in ("experiment", "seed")}
    by_variant = {}
    for line in lines:
        by_variant.setdefault((line["params"]["experiment"], line["variant"]), []).append(line)
    counted = [{**same[0], "samples_seconds": [line["seconds"] for line in same]} for same in by_variant.values()]
    parts = [f"{caption(counted, shared)} Paper: {METRIC}. Ours: kNN."]
    for name, of_name in rows(lines).items():
        experiment = EXPERIMENTS[name]
        parts.append(f"**{experiment.title}** ({experiment.source}). {experiment.shows}")
        shown = columns(of_name)
        table = [[heading for heading, _, _ in shown], ["---:" if number else "---" for _, number, _ in shown]]
        table += zip(*(cells for _, _, cells in shown), strict=True)
        parts.append("\n".join("| " + " | ".join(cells) + " |" for cells in table))
        parts.append("\n".join(f"- {one.word}: {one.sentence}" for one in verdicts(experiment, of_name)))
    return "\n\n".join(parts)

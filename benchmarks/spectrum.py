"""Rank correlation of label-free measures with kNN over the evaluations of runs: python -m benchmarks.spectrum RUN ...

Reads metrics.jsonl: each step at which a run has measured both. A run needs at least 10 such steps.
"""

import argparse
import sys
from pathlib import Path

import torch
from scipy.stats import spearmanr

from benchmarks.harness.results import Results
from fastsiam.errors import UserError
from fastsiam.runtime.files import json_lines

MEASURES = ("rankme", "effective_rank", "alpha", "uniformity")
LEAST = 10


def both(folder: Path) -> list[dict]:
    """Returns the measures and the kNN of each step that has both, in order; a step measured twice counts once."""
    try:
        lines = json_lines((folder / "metrics.jsonl").read_bytes())
    except OSError as error:
        raise UserError(f"RUN: cannot read {folder}/metrics.jsonl ({error.strerror})", "run-unreadable") from error
    knn = {line["step"]: line["knn_top1"] for line in lines if line.get("kind") == "knn" and "control" not in line}
    measures = {line["step"]: line for line in lines if line.get("kind") == "spectrum"}
    steps = sorted(knn.keys() & measures.keys())
    if len(steps) < LEAST:
        text = f"RUN: {folder} has {len(steps)} evaluations with kNN and spectrum; needs {LEAST}"
        raise UserError(f"{text} (evaluate.knn_every_epochs=1)", "too-few-evaluations")
    return [{"step": step, "knn": knn[step], **{name: measures[step][name] for name in MEASURES}} for step in steps]


def correlate(results: Results, folder: Path) -> None:
    """Writes a line for each measure of a run, and one for the step itself: what training longer brings."""
    points = both(folder)
    knn = [point["knn"] for point in points]
    for name in (*MEASURES, "step"):
        values = [point[name] for point in points]
        if None in values or len(set(values)) == 1 or len(set(knn)) == 1:
            continue
        found = spearmanr(values, knn)
        spread = {"knn_first": knn[0], "knn_last": knn[-1], "knn_best": max(knn)}
        numbers = {"spearman": float(found[0]), "p_value": float(found[1]), **spread}
        results.add("spectrum", name, {"run": folder.resolve().name, "evaluations": len(points)}, None, **numbers)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.spectrum", description=__doc__.partition("\n")[0])
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a run folder")
    parser.add_argument("--out", type=Path, help="folder for spectrum.jsonl; without it lines are only printed")
    arguments = parser.parse_args(argv)
    results = Results(arguments.out, torch.device("cpu"))
    try:
        for folder in arguments.runs:
            correlate(results, folder)
    except UserError as error:
        print(f"benchmarks: {error} [{error.code}]", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

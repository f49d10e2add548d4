"""Standings of a race: its runs, the best rate of a grid, and one row for each contestant.

Lines of `time_to_accuracy.jsonl` are of four kinds: `run`, `trial` (how a peer loads fastest), `control` (kNN without
training), and `absent`. A run is known by its contestant and its params, which name no commit: a race goes on from its
lines.
"""

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.results import Results, read_results

BENCHMARK = "time_to_accuracy"
# Params in which the runs of one contestant differ.
OF_A_RUN = ("seed", "base_lr")


class Lines:
    """The result lines of one race, those of earlier starts included."""

    def __init__(self, results: Results, benchmark: str = BENCHMARK):
        self._results, self._benchmark = results, benchmark
        self._lines = read(results.folder / f"{benchmark}.jsonl") if results.folder else []

    def find(self, kind: str, variant: str, params: dict) -> dict | None:
        """Returns the line that an earlier start has written."""
        for line in self._lines:
            if (line["kind"], line["variant"], line["params"]) == (kind, variant, params):
                return line
        return None

    def add(self, kind: str, variant: str, params: dict, **numbers) -> dict:
        line = self._results.write(self._benchmark, variant, params, None, kind=kind, **numbers)
        self._lines.append(line)
        return line


def read(path: Path) -> list[dict]:
    """Returns the lines of an earlier start, none where there is no file.

    The end of a line that a killed run left half written is cut off. Raises `UserError` for what is no line of ours.
    """
    if not path.exists():
        return []
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        path.write_bytes(whole)
    return read_results(path)


def seconds_to(curve: Iterable[tuple[float, int, float]], target: float) -> float | None:
    """Returns seconds of the first evaluation at or over `target` percent, or None; nothing is interpolated."""
    return next((seconds for seconds, _, knn in curve if knn >= target), None)


def best_rate(runs: Iterable[dict]) -> float:
    """Returns the rate with the highest final kNN; of equals the lowest."""
    return max(runs, key=lambda run: (run["knn"], -run["params"]["base_lr"]))["params"]["base_lr"]


@dataclass(frozen=True)
class Standing:
    """One contestant under one setting."""

    variant: str
    params: dict
    """Without those of a run."""
    base_lr: float
    """The best of its grid."""
    tried: tuple[float, ...]
    """The grid."""
    target: float
    runs: tuple[dict, ...]
    """One line for each seed at `base_lr`, in the order of the seeds."""

    @property
    def knn(self) -> tuple[float, float | None]:
        """Mean and standard deviation (n - 1) of the final kNN in percent; None for one run."""
        return mean_std([run["knn"] for run in self.runs])

    @property
    def to_target(self) -> list[float | None]:
        """Seconds to the target of each run, None where it was not reached."""
        return [seconds_to(run["curve"], self.target) for run in self.runs]

    @property
    def reached(self) -> int:
        return sum(seconds is not None for seconds in self.to_target)

    @property
    def seconds(self) -> tuple[float, float | None] | None:
        """Mean and standard deviation of the seconds to the target; None unless every run has reached it."""
        return mean_std(self.to_target) if self.reached == len(self.runs) else None

    @property
    def images_per_second(self) -> float:
        return statistics.fmean(run["images_per_second"] for run in self.runs)

    def numbers(self) -> dict:
        """Returns the object of standings.json."""
        seconds = self.seconds or (None, None)
        return {
            "contestant": self.variant,
            "params": self.params,
            "base_lr": self.base_lr,
            "base_lr_tried": list(self.tried),
            "n": len(self.runs),
            "knn_mean": self.knn[0],
            "knn_std": self.knn[1],
            "target": self.target,
            "reached": self.reached,
            "seconds_to_target": self.to_target,
            "seconds_to_target_mean": seconds[0],
            "seconds_to_target_std": seconds[1],
            "images_per_second": self.images_per_second,
        }


def mean_std(values: list[float]) -> tuple[float, float | None]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def standings(lines: Iterable[dict]) -> list[Standing]:
    """Returns one for each contestant and setting, in the order of the lines; the target is the last line's."""
    groups = {}
    runs = [line for line in lines if line.get("kind") == "run"]
    for run in runs:
        params = {key: value for key, value in run["params"].items() if key not in OF_A_RUN}
        groups.setdefault((run["variant"], json.dumps(params, sort_keys=True)), (params, []))[1].append(run)
    found = []
    for (variant, _), (params, members) in groups.items():
        first_seed = min(run["params"]["seed"] for run in members)
        grid = [run for run in members if run["params"]["seed"] == first_seed]
        rate = best_rate(grid)
        tried = tuple(sorted(run["params"]["base_lr"] for run in grid))
        chosen = [run for run in members if run["params"]["base_lr"] == rate]
        chosen.sort(key=lambda run: run["params"]["seed"])
        found.append(Standing(variant, params, rate, tried, runs[-1]["target"], tuple(chosen)))
    return found


def plus_minus(pair: tuple[float, float | None] | None, digits: int) -> str | None:
    if pair is None:
        return None
    mean, std = pair
    return f"{mean:.{digits}f}" + ("" if std is None else f" ± {std:.{digits}f}")


def rows(lines: list[dict]) -> list[dict]:
    """Lines for a table: a contestant each, its samples the seconds that its runs trained; absent ones as they are."""
    found = []
    for standing in standings(lines):
        first = standing.runs[0]
        found.append(
            {
                "benchmark": first["benchmark"],
                "variant": standing.variant,
                # The target is said once, in the caption.
                "params": {**standing.params, "target": f"{standing.target:g} %"},
                "samples_seconds": [run["seconds"] for run in standing.runs],
                "environment": standing.runs[-1]["environment"],
                "knn": plus_minus(standing.knn, 1),
                "knn_mean": standing.knn[0],
                "seconds_to_target": plus_minus(standing.seconds, 0),
                "reached": f"{standing.reached} of {len(standing.runs)}",
                "images_per_second": standing.images_per_second,
                "base_lr": f"{standing.base_lr:g} of {', '.join(f'{rate:g}' for rate in standing.tried)}",
                **{key: first[key] for key in ("precision", "memory_format", "loader")},
                # Lines of before do not have them.
                **{key: first.get(key) for key in ("peak_memory_bytes", "protocol")},
            }
        )
    absent = [line for line in lines if line.get("kind") == "absent"]
    present = {row["variant"] for row in found}
    target = {"target": found[0]["params"]["target"]} if found else {}
    found += [{**line, "params": {**line["params"], **target}} for line in absent if line["variant"] not in present]
    return found

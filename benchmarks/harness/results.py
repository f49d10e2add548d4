"""Result lines: one JSON object a measurement, with raw samples, hardware, versions and commit."""

import json
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks.harness.environment import clocks, environment
from benchmarks.harness.timing import Samples
from fastsiam.errors import UserError

SCHEMA = 1


def read_results(path: Path) -> list[dict]:
    """Returns the lines of `path`, a file named after its benchmark.

    Raises `UserError` with file and line number where a line is not JSON, of another schema or of another benchmark.
    """
    lines = []
    for place, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        where = f"{path}:{place}"
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: the line is not JSON: {error.msg}", code="not-json") from None
        if not isinstance(line, dict) or line.get("schema") != SCHEMA:
            raise UserError(f"{where}: the line is not of schema {SCHEMA}", code="other-schema")
        if line["benchmark"] != path.stem:
            raise UserError(f"{where}: the line is of benchmark '{line['benchmark']}'", code="other-benchmark")
        lines.append(line)
    return lines


class Results:
    """Result lines: JSON in `folder`/<benchmark>.jsonl (nowhere where `folder` is None), and one line for people.

    Versions and commit are read once, before the first measurement.
    """

    def __init__(self, folder: Path | str | None, device: torch.device):
        self.folder = None if folder is None else Path(folder)
        self._device = device
        self._environment = environment(device)

    def add(self, benchmark: str, variant: str, params: dict, samples: Samples | None, **numbers) -> dict:
        """Writes one result and returns its line; `samples` is None for a variant that is absent.

        `params` tells apart what is measured (batch, dtype, mode): rows of a table are compared within equal params.
        `numbers` are further columns; a number that is not finite raises `ValueError`.
        """
        line = self.write(benchmark, variant, params, samples, **numbers)
        print(readable(line), flush=True)
        return line

    def write(self, benchmark: str, variant: str, params: dict, samples: Samples | None, **numbers) -> dict:
        """`add` without a word."""
        timed = samples is not None
        line = {
            "schema": SCHEMA,
            "benchmark": benchmark,
            "variant": variant,
            "params": params,
            "samples_seconds": list(samples.seconds) if timed else [],
            "median_seconds": samples.median if timed else None,
            "p20_seconds": samples.p20 if timed else None,
            "p80_seconds": samples.p80 if timed else None,
        }
        assert not line.keys() & numbers.keys(), f"{sorted(line.keys() & numbers.keys())} are the protocol's own"
        moment = {"date": datetime.now(UTC).isoformat(timespec="seconds"), **clocks(self._device)}
        line |= {**numbers, "environment": {**self._environment, **moment}}
        text = json.dumps(line, allow_nan=False)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / f"{benchmark}.jsonl", "a", encoding="utf-8") as file:
                file.write(text + "\n")
        return line


def readable(line: dict) -> str:
    """Returns one result as text: its name, the median with [p20, p80] and n, its other numbers."""
    known = {"schema", "benchmark", "variant", "params", "samples_seconds", "environment"}
    known |= {"median_seconds", "p20_seconds", "p80_seconds"}
    words = [f"{line['benchmark']} {line['variant']}", *(f"{key}={value}" for key, value in line["params"].items())]
    if line["samples_seconds"]:
        median, p20, p80 = (line[f"{key}_seconds"] * 1000 for key in ("median", "p20", "p80"))
        words.append(f" {median:.4g} ms [{p20:.4g}, {p80:.4g}] n={len(line['samples_seconds'])} ")
    for key, value in line.items():
        if key not in known and value is not None:
            words.append(f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}")
    return " ".join(words)

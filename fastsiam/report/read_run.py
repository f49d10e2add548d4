"""A run as its folder tells it, whatever state it is in: going on, killed, empty, of an older or a newer version."""

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from fastsiam.config.yaml_file import flat, read
from fastsiam.errors import UserError
from fastsiam.run.folder import parse_metrics
from fastsiam.runtime.arrays import read_arrays

# The three horizontal axes: where a line of metrics.jsonl says that the run was.
AXES = {"time": "train_seconds", "images": "images_seen", "epochs": "images_seen"}


@dataclass(frozen=True)
class Series:
    """One number over a run: `x` and `y` [N] float64; y is NaN where metrics.jsonl has null."""

    x: np.ndarray
    y: np.ndarray


@dataclass(frozen=True)
class Run:
    """Everything that a report says of a run."""

    name: str
    """For people; of several runs each has another."""
    path: Path
    status: dict
    config: dict
    """Dotted keys; empty where config.yaml is missing or unreadable."""
    environment: dict
    lines: tuple[dict, ...]
    """Of metrics.jsonl, whole ones only."""
    pictures: dict[str, np.ndarray]
    skipped: tuple[str, ...] = ()
    """Why files could not be decoded, from skip.tsv and skip_val.tsv."""

    def of_kind(self, kind: str) -> list[dict]:
        return [line for line in self.lines if line.get("kind") == kind]

    def series(self, kind: str, field: str, axis: str) -> Series | None:
        """A number of one kind of line on one of `AXES` (seconds, images, epochs); None where no line has it."""
        lines = [line for line in self.of_kind(kind) if field in line and "control" not in line]
        unit = self.images_per_epoch if axis == "epochs" else 1.0
        y = np.array([number(line[field]) for line in lines])
        if unit is None or not np.isfinite(y).any():
            return None
        x = np.array([number(line.get(AXES[axis])) for line in lines]) / unit
        placed = np.isfinite(x)
        return Series(x[placed], y[placed]) if np.isfinite(y[placed]).any() else None

    def resumes(self, axis: str) -> list[float]:
        """Where on an axis the run went on after it had been stopped or killed."""
        unit = self.images_per_epoch if axis == "epochs" else 1.0
        places = [number(line.get(AXES[axis])) for line in self.of_kind("resume")]
        return [] if unit is None else [place / unit for place in places if math.isfinite(place)]

    @cached_property
    def images_per_epoch(self) -> float | None:
        """From environment.json; else from the longest epoch that the lines tell of, if they tell of an ended one."""
        told = number(self.environment.get("images_per_epoch"))
        if told > 0:
            return told
        lines = [line for line in self.of_kind("train") if number(line.get("epoch")) >= 0]
        if not lines or max(line["epoch"] for line in lines) == 0:
            return None
        longest = max(number(line.get("images_seen")) / (line["epoch"] + 1) for line in lines)
        return longest if longest > 0 else None

    def last(self, field: str, *kinds: str) -> float | None:
        """The last finite number of a field, of lines of some kinds or of all; controls do not count."""
        for line in reversed(self.lines):
            if (not kinds or line.get("kind") in kinds) and "control" not in line:
                value = number(line.get(field))
                if math.isfinite(value):
                    return value
        return None

    def control(self, field: str) -> float | None:
        """A number of the kNN before training: `knn_top1` of random weights, `raw_pixels_knn_top1`."""
        for line in self.of_kind("knn"):
            if "control" in line and math.isfinite(number(line.get(field))):
                return number(line[field])
        return None

    @property
    def warnings(self) -> list[tuple[object, str]]:
        """(step, sentence) of every warning, of what is left out, and of every file that could not be decoded."""
        told = [(None, f"left out: {text}") for text in self.environment.get("left_out") or []]
        told += [(line.get("step"), str(line.get("message", ""))) for line in self.of_kind("warning")]
        bad = self.of_kind("bad_file")
        told += [
            (line.get("step"), " ".join(f"{key} {line[key]}" for key in line if key not in _WHERE)) for line in bad
        ]
        # A resumed run knows them from its skip lists and does not write them again, where metrics.jsonl was cut.
        known = " ".join(str(line.get("message", "")) for line in bad)
        return told + [(None, f"left out: {reason}") for reason in self.skipped if reason not in known]


_WHERE = ("kind", "step", "epoch", "images_seen", "train_seconds", "wall_seconds")


def number(value) -> float:
    """A number of a JSON line as float; NaN for everything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value) if math.isfinite(value) else math.nan


def open_runs(paths: list[Path]) -> list[Run]:
    """Runs by their folders, with names that tell them apart; raises `UserError` for what is no run folder."""
    named = [readable(path.resolve().name) for path in paths]
    runs = []
    for path, name in zip(paths, named, strict=True):
        unique = named.count(name) == 1
        runs.append(open_run(path, name if unique else readable(str(path))))
    return runs


def open_run(path: Path, name: str) -> Run:
    if not path.is_dir():
        raise UserError(f"RUN: {path} is no folder; give the run folders, for example runs/quickstart")
    if not (path / "config.yaml").is_file() and not (path / "metrics.jsonl").is_file():
        inside = sorted(entry.parent.name for entry in path.glob("*/config.yaml"))
        hint = f"; it holds run folders, for example {path / inside[0]}" if inside else ""
        raise UserError(f"RUN: {path} is no run folder, it has neither config.yaml nor metrics.jsonl{hint}")
    try:
        metrics = (path / "metrics.jsonl").read_bytes() if (path / "metrics.jsonl").exists() else b""
    except OSError as error:
        raise UserError(f"RUN: {path}/metrics.jsonl cannot be read ({error.strerror or error})") from error
    return Run(
        name=name,
        path=path,
        status=_read_json(path / "status.json"),
        config=_read_config(path / "config.yaml"),
        environment=_read_json(path / "environment.json"),
        lines=tuple(parse_metrics(metrics)),
        pictures=read_arrays(path / "pictures.npz"),
        skipped=(*_read_skipped(path / "skip.tsv"), *_read_skipped(path / "skip_val.tsv")),
    )


def readable(text: str) -> str:
    """Bytes of a name that are no UTF-8 as \\xNN, which a page can hold."""
    return text.encode(errors="surrogateescape").decode(errors="backslashreplace")


def _read_skipped(path: Path) -> list[str]:
    try:
        text = path.read_bytes().decode(errors="backslashreplace")
    except OSError:
        return []
    return [reason for _, tab, reason in (line.partition("\t") for line in text.splitlines()) if tab]


def _read_json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _read_config(path: Path) -> dict:
    try:
        return flat(read(path))
    except (OSError, UserError):
        return {}

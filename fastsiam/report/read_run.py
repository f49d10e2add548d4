"""Reader of run folders in any state: running, killed, empty, of an older or a newer version."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastsiam.config.yaml_file import flat, read
from fastsiam.errors import UserError, printable
from fastsiam.run.reading import check_is_run
from fastsiam.runtime.files import json_lines, read_arrays, read_json

# Horizontal axes, by the field of a line of metrics.jsonl that has the position of the run.
AXES = {"time": "train_seconds", "images": "images_seen", "epochs": "images_seen"}


@dataclass(frozen=True)
class Series:
    """One number over a run: `x` and `y` [N] float64; y is NaN where metrics.jsonl has null."""

    x: np.ndarray
    y: np.ndarray


@dataclass(frozen=True)
class Run:
    """Contents of a run folder that a report shows."""

    name: str
    """Different for each of several runs."""
    path: Path
    status: dict
    config: dict
    """Dotted keys; empty where config.yaml is missing or unreadable."""
    environment: dict
    lines: tuple[dict, ...]
    """Whole lines of metrics.jsonl."""
    pictures: dict[str, np.ndarray]
    skipped: tuple[str, ...] = ()
    """Reasons why files were not decoded, from skip.tsv and skip_val.tsv."""
    evaluations: tuple[dict, ...] = ()
    """Lines of evaluate/evaluations.jsonl, of `fastsiam evaluate`."""

    def of_kind(self, kind: str) -> list[dict]:
        return [line for line in self.lines if line.get("kind") == kind]

    def series(self, kind: str, field: str, axis: str) -> Series | None:
        """Returns a field of one kind of line on one of `AXES`; None where no line has a number in it."""
        lines = [line for line in self.of_kind(kind) if field in line and "control" not in line]
        unit = self.images_per_epoch if axis == "epochs" else 1.0
        y = np.array([number(line[field]) for line in lines])
        if unit is None or not np.isfinite(y).any():
            return None
        x = np.array([number(line.get(AXES[axis])) for line in lines]) / unit
        placed = np.isfinite(x)
        return Series(x[placed], y[placed]) if np.isfinite(y[placed]).any() else None

    def resumes(self, axis: str) -> list[float]:
        """Returns the places on an axis where the run was resumed."""
        unit = self.images_per_epoch if axis == "epochs" else 1.0
        places = [number(line.get(AXES[axis])) for line in self.of_kind("resume")]
        return [] if unit is None else [place / unit for place in places if math.isfinite(place)]

    @property
    def images_per_epoch(self) -> float | None:
        """Images per epoch; None where environment.json does not say it."""
        known = number(self.environment.get("images_per_epoch"))
        return known if known > 0 else None

    def last(self, field: str, *kinds: str) -> float | None:
        """Returns the last finite number of a field, from lines of some kinds or of all, without controls."""
        for line in reversed(self.lines):
            if (not kinds or line.get("kind") in kinds) and "control" not in line:
                value = number(line.get(field))
                if math.isfinite(value):
                    return value
        return None

    def control(self, field: str) -> float | None:
        """Returns a field of the kNN before training: `knn_top1` of the first weights, `raw_pixels_knn_top1`."""
        for line in self.of_kind("knn"):
            if "control" in line and math.isfinite(number(line.get(field))):
                return number(line[field])
        return None

    @property
    def begins(self) -> str:
        """Returns what the control before training had: `untrained` weights, or those of the `start`."""
        named = next((line["control"] for line in self.of_kind("knn") if "control" in line), "untrained")
        return "at the start" if named == "start" else "untrained"

    @property
    def warnings(self) -> list[tuple[object, str]]:
        """(step, sentence) of warnings, of excluded images, and of files that could not be decoded."""
        # Earlier runs have the key left_out.
        texts = self.environment.get("excluded") or self.environment.get("left_out") or []
        found = [(None, f"excluded: {text}") for text in texts]
        for line in self.of_kind("warning"):
            code = f" [{line['code']}]" if "code" in line else ""
            found.append((line.get("step"), str(line.get("message", "")) + code))
        lines = self.of_kind("bad_file")
        for line in lines:
            found.append((line.get("step"), " ".join(f"{key} {line[key]}" for key in line if key not in _POSITION)))
        # A resumed run reads them from its skip lists and does not write them again where metrics.jsonl was cut.
        known = " ".join(str(line.get("message", "")) for line in lines)
        return found + [(None, f"excluded: {reason}") for reason in self.skipped if reason not in known]


_POSITION = ("kind", "step", "epoch", "images_seen", "train_seconds", "wall_seconds")


def number(value) -> float:
    """Returns a number of a JSON line as float; NaN for everything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value) if math.isfinite(value) else math.nan


def open_runs(paths: list[Path]) -> list[Run]:
    """Reads run folders; raises `UserError` for a folder that is not one. Runs of one name are named by their paths."""
    names = [printable(path.resolve().name) for path in paths]
    return [
        open_run(path, name if names.count(name) == 1 else printable(str(path)))
        for path, name in zip(paths, names, strict=True)
    ]


def open_run(path: Path, name: str) -> Run:
    check_is_run(path)
    try:
        metrics = (path / "metrics.jsonl").read_bytes() if (path / "metrics.jsonl").exists() else b""
    except OSError as error:
        raise UserError(
            f"RUN: cannot read {path}/metrics.jsonl ({error.strerror or error}); check its permissions",
            "run-unreadable",
        ) from error
    return Run(
        name=name,
        path=path,
        status=read_json(path / "status.json"),
        config=_read_config(path / "config.yaml"),
        environment=read_json(path / "environment.json"),
        lines=tuple(json_lines(metrics)),
        pictures=read_arrays(path / "pictures.npz"),
        skipped=(*_read_skipped(path / "skip.tsv"), *_read_skipped(path / "skip_val.tsv")),
        evaluations=_read_evaluations(path / "evaluate/evaluations.jsonl"),
    )


def _read_evaluations(path: Path) -> tuple[dict, ...]:
    try:
        return tuple(json_lines(path.read_bytes()))
    except OSError:
        return ()


def _read_skipped(path: Path) -> list[str]:
    try:
        text = path.read_bytes().decode(errors="backslashreplace")
    except OSError:
        return []
    return [reason for _, tab, reason in (line.partition("\t") for line in text.splitlines()) if tab]


def _read_config(path: Path) -> dict:
    try:
        return flat(read(path))
    except (OSError, UserError):
        return {}

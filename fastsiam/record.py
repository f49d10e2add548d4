"""The run folder: config, environment, metrics.jsonl, status, and the line that a person watches."""

import fcntl
import json
import math
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from fastsiam.config import Config, UserError, differing_keys, load_config

SCHEMA = 1


EXIT_CODES = {"done": 0, "collapsed": 3}


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    status: str
    """done | collapsed | preempted"""
    run_dir: str
    step: int
    knn_top1: float | None = None
    """Percent, at the end; None without data.val."""
    signal: int | None = None
    """What preempted the run."""

    @property
    def exit_code(self) -> int:
        """0 done, 3 collapsed, 128 + the signal's number where one stopped the run."""
        return EXIT_CODES[self.status] if self.signal is None else 128 + self.signal


class RunFolder:
    """`runs/NAME/`. Made only when the run really starts; `previous` tells what a folder of that name holds."""

    def __init__(self, config: Config):
        self.config = config
        base = Path(config.run.dir) / config.run.name
        self.path = _next_free(base) if config.run.fresh else base
        self.metrics_path = self.path / "metrics.jsonl"
        self._lock = None

    def exists(self) -> bool:
        return (self.path / "config.yaml").is_file()

    def check_config(self) -> None:
        """Raise `UserError` where the folder was made by a config that computes something else."""
        if not self.exists():
            if self.path.exists() and any(entry.name != "lock" for entry in self.path.iterdir()):
                raise UserError(f"{self.path} exists and is no run folder; set run.name or run.dir")
            return
        differing = differing_keys(load_config(self.path / "config.yaml"), self.config)
        if differing:
            raise UserError(
                f"{self.path} belongs to another config: {', '.join(differing[:4])}"
                + (f" and {len(differing) - 4} more" if len(differing) > 4 else "")
                + "; set run.name=NEW to keep both, or run.fresh=true for a new folder"
            )

    def status(self) -> dict:
        try:
            return json.loads((self.path / "status.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def open(self, environment: dict) -> None:
        """Make the folder, or enter it again, and take its lock; raises `UserError` where another process has it."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.path / "lock", "w")  # noqa: SIM115
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another process is training in {self.path}") from None
        _write(self.path / "config.yaml", self.config.to_yaml())
        _write(self.path / "environment.json", json.dumps(environment | {"commit": _commit()}, indent=1))

    def write_header(self) -> None:
        """Begin metrics.jsonl anew."""
        self.metrics_path.write_text("", encoding="utf-8")
        self.write({"kind": "header", "schema": SCHEMA, "name": self.config.run.name})

    def write(self, line: dict) -> None:
        """Append one line to metrics.jsonl; numbers that are not finite become null."""
        clean = {key: None if _not_finite(value) else value for key, value in line.items()}
        with open(self.metrics_path, "a", encoding="utf-8") as file:
            file.write(json.dumps(clean, allow_nan=False) + "\n")

    def metrics_size(self) -> int:
        """Bytes of metrics.jsonl: a checkpoint remembers it, and resuming cuts what came after."""
        return self.metrics_path.stat().st_size

    def cut_metrics(self, size: int) -> None:
        if self.metrics_path.exists() and self.metrics_path.stat().st_size > size:
            os.truncate(self.metrics_path, size)

    def set_status(self, status: str, **details) -> None:
        """running | done | preempted | collapsed | failed, with the reason: what a scheduler's script reads."""
        _write(self.path / "status.json", json.dumps({"status": status, **details}, indent=1))

    def close(self) -> None:
        if self._lock:
            self._lock.close()


class ProgressLine:
    """One live line in a terminal (wrapped where it is narrow), one plain line per log interval elsewhere."""

    def __init__(self, console: Console, total_steps: int, step: int):
        self.console, self._total, self._first = console, total_steps, step
        self._started = time.perf_counter()
        self._live = None
        if console.is_terminal:
            self._live = Live(Text("starting"), console=console, transient=True, auto_refresh=False)
            self._live.start()

    def show(self, step: int, text: str) -> None:
        done = step - self._first
        eta = (time.perf_counter() - self._started) / max(done, 1) * (self._total - step)
        text = f"{text}  ETA {duration(eta)}"
        if self._live:
            self._live.update(Text(text), refresh=True)
        else:
            self.console.print(text, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self._live:
            self._live.stop()


def duration(seconds: float) -> str:
    seconds = round(seconds)
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return f"{hours}:{minutes:02}:{seconds % 60:02}" if hours else f"{minutes}:{seconds % 60:02}"


def _next_free(base: Path) -> Path:
    if not base.exists():
        return base
    number = 2
    while (candidate := base.with_name(f"{base.name}-{number}")).exists():
        number += 1
    return candidate


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _not_finite(value) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _commit() -> str | None:
    """The checkout's commit, with -dirty where files differ from it; None where this file is installed elsewhere."""
    checkout = Path(__file__).resolve().parents[1]
    if not (checkout / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None

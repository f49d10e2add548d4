"""The run folder: config, environment, metrics.jsonl, status."""

import contextlib
import errno
import itertools
import json
import math
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from fastsiam.config import Config, load_config
from fastsiam.config.yaml_file import shortened
from fastsiam.errors import UserError
from fastsiam.run.resume import asks_for_less, differences_against_resuming
from fastsiam.run.tensorboard import EventFiles
from fastsiam.runtime.files import Appender, replace_file

SCHEMA = 1


EXIT_CODES = {"done": 0, "collapsed": 3, "failed": 4}


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    status: str
    """done | collapsed | preempted | failed (the loss is no longer finite)"""
    run_dir: str
    step: int
    knn_top1: float | None = None
    """Percent, at the end; None without data.val."""
    signal: int | None = None
    """What preempted the run."""

    @property
    def exit_code(self) -> int:
        """0 done, 3 collapsed, 4 failed, 128 + the signal's number where one stopped the run."""
        return EXIT_CODES[self.status] if self.signal is None else 128 + self.signal


class RunFolder:
    """`runs/NAME/`. Made only when the run really starts.

    `path` is that of `run_path`. `warn(sentence)` is told once when the disk takes no more; training goes on meanwhile.
    """

    def __init__(self, config: Config, path: Path, warn: Callable[[str], None]):
        self.config, self.path = config, path
        self._warn = warn
        self._told = False
        self.metrics_path = self.path / "metrics.jsonl"
        self._metrics = Appender(self.metrics_path)
        self._events = EventFiles(self.path / "tensorboard", warn)
        self._lock: FileLock | None = None
        self.commit: str | None = None
        """Of the code; None where it is not known, and before `open`."""

    def exists(self) -> bool:
        return (self.path / "config.yaml").is_file()

    def check_config(self) -> None:
        """Raise `UserError` where the folder was made by a config that computes something else."""
        with self._refusal():
            if not self.exists():
                # A start that was killed before it had written its config leaves these.
                begun = ("lock", "config.yaml.tmp")
                if self.path.exists() and any(entry.name not in begun for entry in self.path.iterdir()):
                    raise UserError(f"{self.path} exists and is no run folder; set run.name or run.dir")
                return
        before = self.config_before()
        changed = differences_against_resuming(before, self.config)
        if changed:
            named = ", ".join(f"{key} ({then}, now {now})" for key, (then, now) in list(changed.items())[:4])
            more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
            sooner = "train.max_steps=N to end it sooner, " if asks_for_less(before, self.config) else ""
            raise UserError(
                f"{self.path} belongs to another config: {named}{more}; set {_as_before(changed)}{sooner}"
                "run.name=NEW to keep both, or run.fresh=true for a new folder"
            )

    def config_before(self) -> Config:
        """What the last start was asked for; raises `UserError` where that cannot be read."""
        try:
            return load_config(self.path / "config.yaml")
        except UserError as error:
            raise UserError(
                f"{self.path} cannot go on: its config.yaml is damaged or of another version of fastsiam "
                f"({shortened(str(error), 100)}); run.fresh=true starts over in a new folder"
            ) from error

    def status(self) -> dict:
        return read_status(self.path)

    def environment(self) -> dict:
        """What the last start has found and chosen; empty where that is not known."""
        return _read_json(self.path / "environment.json")

    def open(self, environment: dict) -> None:
        """Make the folder, or enter it again, and take its lock.

        Raises `UserError` where another process has it, and where the folder cannot be made or written.
        """
        with self._refusal():
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.path)
            replace_file(self.path / "config.yaml", self.config.to_yaml().encode())
            self.commit = _commit()
            described = json.dumps(environment | {"commit": self.commit}, indent=1)
            replace_file(self.path / "environment.json", described.encode())

    def check_start(self) -> None:
        """Raise the `UserError` that `open` would raise; makes nothing."""
        with self._refusal():
            there = self.path
            while not there.exists():
                there = there.parent
            if not there.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            if not os.access(there, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            if (self.path / "lock").exists():
                _locked(self.path).release()

    def write_header(self) -> None:
        """Begin metrics.jsonl anew."""
        with self._refusal():
            self.metrics_path.write_text("", encoding="utf-8")
        self.write({"kind": "header", "schema": SCHEMA, "name": self.config.run.name})
        self._events.begin()

    def write(self, line: dict) -> None:
        """Append one line to metrics.jsonl, and its numbers to TensorBoard's files; those not finite become null.

        A line that the disk does not take waits in memory and is tried again, in order, with the next one.
        """
        clean = {key: None if _not_finite(value) else value for key, value in line.items()}
        self._metrics.pending.append((json.dumps(clean, allow_nan=False) + "\n").encode())
        self._flush()
        self._events.add(clean)

    def metrics_state(self) -> dict:
        """What a checkpoint remembers of metrics.jsonl: its `size` in bytes, on the disk, and the lines `pending`."""
        self._flush()
        try:
            self._metrics.sync()
        except OSError as error:
            self._warn(
                f"{self.metrics_path} could not be synced ({error.strerror or error}); a power cut may shorten it"
            )
        return {"size": self._metrics.size(), "pending": [line.decode() for line in self._metrics.pending]}

    def restore_metrics(self, state: dict) -> None:
        """Bring metrics.jsonl back to what it was at a checkpoint, and TensorBoard's files with it: what came after is
        cut off.
        """
        with self._refusal():
            if self._metrics.size() > state["size"]:
                os.truncate(self.metrics_path, state["size"])
        self._metrics.pending = [line.encode() for line in state["pending"]]
        with self._refusal():
            there = self.metrics_path.read_bytes() if self.metrics_path.exists() else b""
        self._events.begin(parse_metrics(there + b"".join(self._metrics.pending)))
        self._flush()

    def set_status(self, status: str, **details) -> None:
        """running | done | preempted | collapsed | failed, with the reason: what a scheduler's script reads.

        Where it cannot be written, `warn` is told and the status before it stays.
        """
        path = self.path / "status.json"
        try:
            # Ranks that fail together may all write it.
            replace_file(path, json.dumps({"status": status, **details}, indent=1).encode(), f".{os.getpid()}.tmp")
        except OSError as error:
            self._warn(f"{path} could not be written ({error.strerror or error}); it should say {status}")

    def write_batch(self, path: Path, step: int, names_by_rank: list[list[str]]) -> None:
        """The names of the images of a step, a line each with its rank; where the disk refuses, `warn` is told."""
        lines = [f"rank {rank}\t{name}\n" for rank, names in enumerate(names_by_rank) for name in names]
        try:
            path.write_text(f"step {step}\n" + "".join(lines), encoding="utf-8", errors="surrogateescape")
        except OSError as error:
            self._warn(f"{path} could not be written ({error.strerror or error})")

    def close(self) -> None:
        """Try the lines that wait a last time, and give the lock back."""
        self._events.close()
        error = self._metrics.flush()
        if error:
            lost = len(self._metrics.pending)
            self._metrics.pending = []
            self._warn(
                f"{self.metrics_path} could not be written ({error.strerror or error}): {lost} lines of it are lost"
            )
        if self._lock:
            self._lock.release()

    def _flush(self) -> None:
        error = self._metrics.flush()
        if error and not self._told:
            # Set first: the warning is a line of metrics.jsonl itself.
            self._told = True
            self._warn(
                f"{self.metrics_path} could not be written ({error.strerror or error}); its lines wait in memory"
            )
        elif not error:
            self._told = False

    def _refusal(self):
        return _refusal(self.config, self.path)


def parse_metrics(data: bytes) -> list[dict]:
    """The lines of a metrics.jsonl that are JSON objects; the last one of a run that is writing may not be."""
    found = []
    for line in data.splitlines():
        with contextlib.suppress(ValueError):
            value = json.loads(line)
            found += [value] if isinstance(value, dict) else []
    return found


def run_path(config: Config) -> Path:
    """Where a run lies: with run.fresh in a folder that is not there yet."""
    base = Path(config.run.dir) / config.run.name
    if not config.run.fresh:
        return base
    numbered = itertools.chain([base], (base.with_name(f"{base.name}-{number}") for number in itertools.count(2)))
    with _refusal(config, base):
        return next(path for path in numbered if not path.exists())


def _as_before(changed: dict[str, tuple]) -> str:
    """The overrides that undo a change or two, as part of a sentence."""
    values = [then for then, _ in changed.values()]
    if len(values) > 2 or any(isinstance(then, list) for then in values):
        return ""
    typed = (then if isinstance(then, str) else json.dumps(then) for then in values)
    return " ".join(f"{key}={then}" for key, then in zip(changed, typed, strict=True)) + " to go on with it, "


@contextlib.contextmanager
def _refusal(config, path):
    try:
        yield
    except OSError as error:
        raise UserError(
            f"run.dir={config.run.dir}: the run folder {path} cannot be made or written ({error.strerror or error})"
        ) from error


def _locked(path: Path) -> FileLock:
    lock = FileLock(path / "lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(
            f"run.name: another process is training in {path}; wait for it or choose another name", "run-locked"
        ) from None
    return lock


def read_status(folder: Path) -> dict:
    """What a run has last said of itself; empty where that is not known."""
    return _read_json(folder / "status.json")


def _read_json(path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _not_finite(value) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _commit() -> str | None:
    """The checkout's commit, with -dirty where files differ from it; None where this file is installed elsewhere."""
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None

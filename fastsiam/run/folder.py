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
from fastsiam.errors import ExitCode, Notice, UserError
from fastsiam.run.lines import SCHEMA
from fastsiam.run.tensorboard import EventFiles
from fastsiam.runtime.files import Appender, json_lines, read_json, replace_file

EXIT_CODES = {"done": ExitCode.DONE, "collapsed": ExitCode.COLLAPSED, "failed": ExitCode.NOT_FINITE}


@dataclass(frozen=True)
class Result:
    """End of a run."""

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
        return int(EXIT_CODES[self.status]) if self.signal is None else 128 + self.signal


class RunFolder:
    """`runs/NAME/`. Made only when the run really starts.

    `path` is that of `run_path`. `warn(notice)` is called once when the disk is full; training continues meanwhile.
    """

    def __init__(self, config: Config, path: Path, warn: Callable[[str], None]):
        self.config, self.path = config, path
        self._warn = warn
        self._warned = False
        self.metrics_path = self.path / "metrics.jsonl"
        self._metrics = Appender(self.metrics_path)
        self._events = EventFiles(self.path / "tensorboard", warn)
        self._lock: FileLock | None = None
        self.commit: str | None = None
        """Of the code; None where it is not known, and before `open`."""
        self.weights: dict | None = None
        """What the encoder began from, see `describe_encoder`; None for random weights."""

    def exists(self) -> bool:
        return (self.path / "config.yaml").is_file()

    def check_is_ours(self) -> None:
        """Raise `UserError` where something else than a run lies at the path."""
        with self._refusal():
            # A start that was killed before it had written its config leaves these.
            begun = ("lock", "config.yaml.tmp")
            if not self.exists() and self.path.exists() and any(e.name not in begun for e in self.path.iterdir()):
                raise UserError(
                    f"run.name: {self.path} exists but is not a run folder; choose another run.name or run.dir",
                    "not-a-run-folder",
                )

    def config_before(self) -> Config:
        """Config of the last start; raises `UserError` where it cannot be read."""
        try:
            return load_config(self.path / "config.yaml")
        except UserError as error:
            raise UserError(
                f"cannot resume {self.path}: its config.yaml is damaged or of another version of fastsiam "
                f"({shortened(str(error), 100)}); run.fresh=true starts over in a new folder",
                "damaged-config",
            ) from error

    def status(self) -> dict:
        """Last status that the run has written; empty where there is none."""
        return read_status(self.path)

    def environment(self) -> dict:
        """Facts that the last start has recorded; empty where there are none."""
        return read_json(self.path / "environment.json")

    def open(self, environment: dict) -> None:
        """Make the folder, or enter it again, and take its lock.

        Raises `UserError` where another process has it, and where the folder cannot be made or written.
        """
        with self._refusal():
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.path)
            replace_file(self.path / "config.yaml", self.config.to_yaml().encode())
            self.commit = _commit()
            weights = {"weights": self.weights} if self.weights else {}
            described = json.dumps(environment | {"commit": self.commit, **weights}, indent=1)
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
        """State of metrics.jsonl for a checkpoint: its `size` in bytes, on the disk, and the lines `pending`."""
        self._flush()
        try:
            self._metrics.sync()
        except OSError as error:
            self._warn(self._unwritten(self.metrics_path, error, "not synced; a power cut may shorten it"))
        return {"size": self._metrics.size(), "pending": [line.decode() for line in self._metrics.pending]}

    def restore_metrics(self, state: dict) -> None:
        """Cut off the lines of metrics.jsonl, and TensorBoard's points, that came after a checkpoint."""
        with self._refusal():
            if self._metrics.size() > state["size"]:
                os.truncate(self.metrics_path, state["size"])
        self._metrics.pending = [line.encode() for line in state["pending"]]
        with self._refusal():
            there = self.metrics_path.read_bytes() if self.metrics_path.exists() else b""
        self._events.begin(json_lines(there + b"".join(self._metrics.pending)))
        self._flush()

    def set_status(self, status: str, **details) -> None:
        """running | done | preempted | collapsed | failed, with the reason: what a scheduler's script reads.

        Where it cannot be written, `warn` is called and the status before it stays.
        """
        path = self.path / "status.json"
        try:
            # Ranks that fail together may all write it.
            replace_file(path, json.dumps({"status": status, **details}, indent=1).encode(), f".{os.getpid()}.tmp")
        except OSError as error:
            self._warn(self._unwritten(path, error, f"it should say {status}"))

    def write_batch(self, path: Path, step: int, names_by_rank: list[list[str]]) -> None:
        """Write the names of the images of a step, a line each with its rank; warns where the disk refuses."""
        lines = [f"rank {rank}\t{name}\n" for rank, names in enumerate(names_by_rank) for name in names]
        try:
            path.write_text(f"step {step}\n" + "".join(lines), encoding="utf-8", errors="surrogateescape")
        except OSError as error:
            self._warn(self._unwritten(path, error, "the images of that step are not recorded"))

    def close(self) -> None:
        """Try the lines that wait a last time, and give the lock back."""
        self._events.close()
        error = self._metrics.flush()
        if error:
            lost = len(self._metrics.pending)
            self._metrics.pending = []
            self._warn(self._unwritten(self.metrics_path, error, f"{lost} lines of it are lost"))
        if self._lock:
            self._lock.release()

    def _flush(self) -> None:
        error = self._metrics.flush()
        if error and not self._warned:
            # Set first: the warning is a line of metrics.jsonl itself.
            self._warned = True
            self._warn(self._unwritten(self.metrics_path, error, "its lines wait in memory"))
        elif not error:
            self._warned = False

    @staticmethod
    def _unwritten(path, error, effect):
        return Notice(f"{path} could not be written ({error.strerror or error}); {effect}", "disk-refuses")

    def _refusal(self):
        return _refusal(self.config, self.path)


def run_path(config: Config) -> Path:
    """Folder of a run; with run.fresh one that does not exist yet."""
    base = Path(config.run.dir) / config.run.name
    if not config.run.fresh:
        return base
    numbered = itertools.chain([base], (base.with_name(f"{base.name}-{number}") for number in itertools.count(2)))
    with _refusal(config, base):
        return next(path for path in numbered if not path.exists())


@contextlib.contextmanager
def _refusal(config, path):
    try:
        yield
    except OSError as error:
        raise UserError(
            f"run.dir: cannot write the run folder {path} ({error.strerror or error}); choose another run.dir",
            "run-folder-unwritable",
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
    """Last status that a run has written; empty where there is none."""
    return read_json(folder / "status.json")


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

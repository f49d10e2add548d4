"""Atomic checkpoints: written beside, fsynced, renamed; the previous one stays until the new one is whole."""

import contextlib
import hashlib
import os
import pickle
import re
import time
import zipfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import BinaryIO

import torch

from fastsiam.config import CheckpointConfig
from fastsiam.config.views import described
from fastsiam.errors import Notice, UserError
from fastsiam.runtime.files import DAMAGED_ZIP, check_records, sync_folder
from fastsiam.training.progress import Progress
from fastsiam.training.state import State

# Another number where a checkpoint holds other things than before.
LAYOUT = 3
ZIP_MAGIC = b"PK\x03\x04"
# Seconds; torchrun kills 30 after it has passed a signal on, which an evaluation may outlast.
SAVED_LONG_AGO = 30.0


class SaveError(UserError):
    """A checkpoint could not be written: the disk is full, the folder is gone or read-only."""


def path_of(folder: Path, age: int) -> Path:
    """checkpoint.pt is the newest (age 0), checkpoint.1.pt the one before."""
    return folder / (f"checkpoint.{age}.pt" if age else "checkpoint.pt")


class Checkpoints:
    """Decides when a run writes checkpoints. All ranks call its methods together; the first one writes."""

    def __init__(self, folder: Path, settings: CheckpointConfig, progress: Progress, is_first: bool, warn: Callable):
        """`warn(notice)` is called for one that cannot be written on the way."""
        self._folder, self._settings, self._progress = folder, settings, progress
        self._is_first, self._warn = is_first, warn
        self._saved_at = time.perf_counter()
        self._saved_step: int | None = None

    def is_due(self) -> bool:
        """True when the next one is due, by the clock of this rank."""
        return time.perf_counter() - self._saved_at >= self._settings.every_seconds

    def save(self, contents: Callable[[], dict]) -> None:
        """Write what `contents()` returns; raises `SaveError` where the disk refuses."""
        self._saved_at, self._saved_step = time.perf_counter(), self._progress.state.step
        if self._is_first:
            with self._progress.saving():
                save(self._folder, contents(), self._settings.keep)

    def save_on_the_way(self, contents: Callable[[], dict]) -> None:
        """`save`, with a warning where the disk refuses."""
        try:
            self.save(contents)
        except SaveError as error:
            self._warn(Notice(f"at step {self._progress.state.step:,}: {error}", error.code))

    def save_unless_recent(self, contents: Callable[[], dict], seconds: float = SAVED_LONG_AGO) -> None:
        """Before work that may take long: `save_on_the_way` if the last checkpoint is older, and of another step."""
        if time.perf_counter() - self._saved_at > seconds and self._saved_step != self._progress.state.step:
            self.save_on_the_way(contents)


def save(folder: Path, state: dict, keep: int) -> None:
    """Write `state` as the newest of `keep` checkpoints. A kill at any moment leaves a whole one.

    Raises `SaveError` where the system refuses; the checkpoints before it are whole then, and the space of what had
    been written is given back. A checkpoint.tmp that a killed save has left is written over, and never loaded.
    """
    temporary = folder / "checkpoint.tmp"
    try:
        _write(temporary, state)
        _make_room(folder, keep)
        temporary.replace(path_of(folder, 0))
        sync_folder(folder)
        for age, path in _existing(folder).items():
            if age >= keep:
                path.unlink()
    except OSError as error:
        before = "the checkpoint before it stays" if _existing(folder) else "there is none before it"
        text = f"{path_of(folder, 0)} could not be written ({error.strerror or error}); {before}"
        raise SaveError(text, "checkpoint-unwritten") from error
    finally:
        # The error to report is that of the write, not that a read-only file system lets nothing be removed either.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def load_newest(folder: Path, warn: Callable[[str], None]) -> dict | None:
    """The newest whole checkpoint on the CPU, or None where there is no file.

    One that cannot be loaded is reported through `warn(notice)`, and the one before it is taken. Raises `UserError`
    where none can.
    """
    paths = existing(folder)
    for path in paths:
        try:
            return load(path)
        except UserError as error:
            warn(Notice(f"{error}; trying the checkpoint before it", error.code))
    if paths:
        names = ", ".join(path.name for path in paths)
        raise UserError(
            f"no whole checkpoint in {folder} ({names}); run.fresh=true starts over in a new folder",
            "no-whole-checkpoint",
        )
    return None


def existing(folder: Path) -> list[Path]:
    """The checkpoints of a folder, the newest first."""
    return list(_existing(folder).values())


def load(path: Path) -> dict:
    """A checkpoint on the CPU: tensors and plain values; no code of the file is run.

    Raises `UserError` for a file that is damaged, of another program, or not readable.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            check_records(archive)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, *DAMAGED_ZIP, pickle.UnpicklingError, LookupError, AttributeError, TypeError) as error:
        lines = (getattr(error, "strerror", None) or str(error)).splitlines() or ["it ends too early"]
        text = f"cannot load {path} ({lines[0][:100].rstrip('.')})"
        raise UserError(text, "damaged-checkpoint") from error


def identity(source, specs, backend: str) -> dict:
    """The facts that a checkpoint must find again: the data by relative names and sizes, the views, the backend."""
    return {
        "data": source.fingerprint() if source is not None else "synthetic",
        "images": len(source) if source is not None else 0,
        "views": hashlib.sha256(described(specs).encode()).hexdigest()[:16],
        "backend": backend,
    }


def check_layout(saved: dict, folder: Path) -> None:
    """Raise `UserError` for the checkpoint of another version, or of another program."""
    known = {field.name for field in fields(State)}
    if not isinstance(saved, dict) or saved.get("layout") != LAYOUT or not known.issuperset(saved["state"]):
        raise UserError(
            f"cannot resume {folder}: its checkpoint is of another version of fastsiam; run.fresh=true starts over in "
            "a new folder",
            "other-version",
        )


def check_identity(then: dict, now: dict, folder: Path) -> None:
    """Raise `UserError` where a run would be resumed with other data, views or another backend."""
    advice = "run.fresh=true starts over in a new folder"
    if then["data"] != now["data"]:
        raise UserError(
            f"cannot resume {folder}: it was trained on other data ({then['images']:,} images, now {now['images']:,}; "
            f"names and sizes of the files are compared); {advice}",
            "other-data",
        )
    if then["views"] != now["views"]:
        raise UserError(f"cannot resume {folder}: it was trained with other views; {advice}", "other-views")
    if then["backend"] != now["backend"]:
        raise UserError(
            f"cannot resume {folder}: it was trained with data.backend={then['backend']}, and now {now['backend']} "
            f"would run; set data.backend={then['backend']}; {advice}",
            "other-backend",
        )


class _Recorder:
    """A file as torch.save sees it, which answers the OSError of a write with a RuntimeError that hides the reason."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.flush = file.flush
        self.error: OSError | None = None

    def write(self, data) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise


def _write(path: Path, state: dict) -> None:
    with open(path, "wb") as file:
        recorder = _Recorder(file)
        try:
            torch.save(state, recorder)
        except RuntimeError:
            if recorder.error:
                raise recorder.error from None
            raise
        file.flush()
        os.fsync(file.fileno())


def _make_room(folder: Path, keep: int) -> None:
    """Make each checkpoint one older, up to the first age that is free: where a kill has left a gap, none is lost."""
    existing = _existing(folder)
    free = next((age for age in range(keep) if age not in existing), keep - 1)
    for age in range(free, 0, -1):
        existing[age - 1].replace(path_of(folder, age))


def _existing(folder: Path) -> dict[int, Path]:
    """The checkpoints of a folder by age, the newest first."""
    if not folder.is_dir():
        return {}
    matches = [re.fullmatch(r"checkpoint(?:\.([1-9]\d*))?\.pt", path.name) for path in folder.iterdir()]
    ages = sorted(int(match[1] or 0) for match in matches if match)
    return {age: path_of(folder, age) for age in ages}

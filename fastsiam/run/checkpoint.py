"""Atomic checkpoints: written beside, fsynced, renamed; the previous one stays until the new one is whole."""

import contextlib
import errno
import hashlib
import mmap
import os
import pickle
import pickletools
import re
import zipfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import BinaryIO

import torch

from fastsiam.config.views import described
from fastsiam.errors import UserError
from fastsiam.run.folder import RunFolder
from fastsiam.runtime.files import DAMAGED_ZIP
from fastsiam.training.state import State

ZIP_MAGIC = b"PK\x03\x04"


# Another number where a checkpoint holds other things than before.
LAYOUT = 3


class SaveError(UserError):
    """A checkpoint could not be written: the disk is full, the folder is gone or read-only."""


def path_of(folder: Path, age: int) -> Path:
    """checkpoint.pt is the newest (age 0), checkpoint.1.pt the one before."""
    return folder / (f"checkpoint.{age}.pt" if age else "checkpoint.pt")


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
        _sync_folder(folder)
        for age, path in _existing(folder).items():
            if age >= keep:
                path.unlink()
    except OSError as error:
        before = "the checkpoint before it stays" if _existing(folder) else "there is none before it"
        raise SaveError(f"{path_of(folder, 0)} could not be written ({error.strerror or error}); {before}") from error
    finally:
        # What is told is why the write failed, not that a read-only file system lets nothing be removed either.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def load_newest(folder: Path, warn: Callable[[str], None]) -> dict | None:
    """The newest whole checkpoint on the CPU, or None where there is no file.

    A damaged one (cut off, or a record without its CRC-32) is reported through `warn(sentence)` and the one before it
    is taken. Raises `UserError` where none is whole, where a file would run code, and where a file that is not damaged
    cannot be loaded: an older one is never taken for such a file. Loads tensors and plain values only.
    """
    paths = list(_existing(folder).values())
    for path in paths:
        reason = _damage(path)
        if reason is None:
            return _load(path)
        warn(f"{path} is damaged ({reason}); looking for the checkpoint before it")
    if paths:
        raise UserError(
            f"no whole checkpoint in {folder}: {', '.join(path.name for path in paths)} cannot be read; "
            "run.fresh=true starts over in a new folder"
        )
    return None


def of_run(folder: RunFolder, warn: Callable[[str], None]) -> dict | None:
    """The newest whole checkpoint of a run that may go on with the folder's config; None for a new run.

    Raises `UserError` as `load_newest` does, and where the folder belongs to another config or another version.
    """
    folder.check_config()
    saved = load_newest(folder.path, warn)
    if saved is None:
        return None
    check_layout(saved, folder.path)
    if "computation" not in saved:
        # Of an earlier version; its environment.json says what it computed with.
        before = folder.environment()
        kept = {key: before[key] for key in ("device", "dtype", "compile", "ranks") if key in before}
        if kept.get("compile") and kept.get("ranks") == 1:
            # How the compiled step of one process had it.
            kept["norm"] = "batch norm view by view"
        saved["computation"] = kept | {"threads": saved["threads"]}
        saved["budget"] = folder.config_before().to_spend.amount
    return saved


def identity(source, specs, backend: str) -> dict:
    """What a checkpoint must find again: the data by relative names and sizes, the views, the backend."""
    return {
        "data": source.fingerprint() if source is not None else "synthetic",
        "images": len(source) if source is not None else 0,
        "views": hashlib.sha256(described(specs).encode()).hexdigest()[:16],
        "backend": backend,
    }


def check_layout(saved: dict, folder: Path) -> None:
    """Raise `UserError` for what another version has written, or another program."""
    known = {field.name for field in fields(State)}
    if saved.get("layout") != LAYOUT or not known.issuperset(saved["state"]):
        raise UserError(
            f"{folder} cannot go on: its checkpoint was written by another version of fastsiam; run.fresh=true starts "
            "over in a new folder"
        )


def check_identity(then: dict, now: dict, folder: Path) -> None:
    """Raise `UserError` where a run would go on with other data, views or another backend."""
    advice = "; run.fresh=true starts over in a new folder"
    if then["data"] != now["data"]:
        raise UserError(
            f"{folder} cannot go on: it was trained on other data ({then['images']:,} images, now {now['images']:,}; "
            f"names and sizes of the files are compared){advice}"
        )
    if then["views"] != now["views"]:
        raise UserError(f"{folder} cannot go on: it was trained with other views than are asked for now{advice}")
    if then["backend"] != now["backend"]:
        raise UserError(
            f"{folder} cannot go on: it was trained with data.backend={then['backend']}, and now {now['backend']} "
            f"would run; set data.backend={then['backend']}{advice}"
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


def _sync_folder(folder: Path) -> None:
    """Make renames outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot sync a folder and say so with one of these (PostgreSQL, fd.c: fsync_fname_ext).
        if error.errno not in (errno.EINVAL, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def _damage(path: Path) -> str | None:
    """Why a file is not a whole zip archive; None where each record has its CRC-32, which torch.load does not check.

    Raises `UserError` for a bare pickle that names what is to be called, and for a file that cannot be opened.
    """
    try:
        with open(path, "rb") as file:
            is_zip = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC
            file.seek(0)
            if is_zip:
                with zipfile.ZipFile(file) as archive:
                    record = archive.testzip()
                return record and f"the CRC-32 of {record!r} is another"
            # Mapped, because a length that garbage spells is allocated by the read of a file, and only cut off here.
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                runs_code = _names_a_global(mapped)
    except OSError as error:
        # EINVAL: damaged bytes send zipfile to a place before the file. Other errors say nothing about the bytes.
        if error.errno not in (errno.EIO, errno.EINVAL):
            raise UserError(f"{path} cannot be opened ({error.strerror})") from error
        return error.strerror
    except DAMAGED_ZIP as error:
        return str(error).rstrip(".") or "it ends too early"
    if runs_code:
        raise _would_run_code(path)
    return "it is no zip archive"


def _names_a_global(file: mmap.mmap) -> bool:
    """Whether a file begins with pickles of which one names a class or function to call; nothing of it is called."""
    strings = 0
    try:
        while True:
            for opcode, argument, _ in pickletools.genops(file):
                strings += isinstance(argument, str)
                # STACK_GLOBAL takes module and name from the stack; without them it is one byte of garbage.
                if opcode.name in ("GLOBAL", "INST") or (opcode.name == "STACK_GLOBAL" and strings >= 2):
                    return True
    except ValueError:
        return False


def _load(path: Path) -> dict:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise _would_run_code(path) from None
    except (RuntimeError, ValueError, EOFError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise UserError(
            f"{path} cannot be loaded ({reason}); removing it goes on from the checkpoint before it"
        ) from error


def _would_run_code(path: Path) -> UserError:
    return UserError(
        f"{path} would run code when it is loaded and was not written by fastsiam; "
        "remove it if you do not know where it comes from"
    )

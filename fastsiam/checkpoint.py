"""Atomic checkpoints: written beside, fsynced, renamed; the previous one stays until the new one is whole."""

import hashlib
import os
import pickle
import zipfile
from pathlib import Path

import torch

from fastsiam.config import UserError


def path_of(folder: Path, age: int) -> Path:
    """checkpoint.pt is the newest (age 0), checkpoint.1.pt the one before."""
    return folder / (f"checkpoint.{age}.pt" if age else "checkpoint.pt")


def save(folder: Path, state: dict, keep: int) -> None:
    """Write `state` as the newest of `keep` checkpoints. A kill at any moment leaves a whole one."""
    temporary = folder / "checkpoint.tmp"
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    for age in range(keep - 1, 0, -1):
        if path_of(folder, age - 1).exists():
            path_of(folder, age - 1).replace(path_of(folder, age))
    temporary.replace(path_of(folder, 0))
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_newest(folder: Path, warn) -> dict | None:
    """The newest whole checkpoint on the CPU, or None where there is no file.

    A damaged one is reported through `warn(sentence)` and the one before it is taken; raises `UserError` where
    none is whole. Loads tensors and plain values only: a file that would run code counts as damaged.
    """
    paths = [path_of(folder, 0), *sorted(folder.glob("checkpoint.[0-9]*.pt"))]
    paths = [path for path in paths if path.exists()]
    for path in paths:
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, zipfile.BadZipFile, pickle.UnpicklingError, ValueError) as error:
            reason = str(error).partition("\n")[0].rstrip(".")
            warn(f"{path} is damaged ({reason}); looking for the checkpoint before it")
    if paths:
        raise UserError(
            f"no whole checkpoint in {folder}: {', '.join(path.name for path in paths)} cannot be read; "
            "run.fresh=true starts over in a new folder"
        )
    return None


def identity(source, specs, backend: str) -> dict:
    """What a checkpoint must find again: the data by relative names and sizes, the views, the backend."""
    return {
        "data": source.fingerprint() if source is not None else "synthetic",
        "images": len(source) if source is not None else 0,
        "views": hashlib.sha256(repr(specs).encode()).hexdigest()[:16],
        "backend": backend,
    }


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

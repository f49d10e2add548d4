"""Files and folders of an export, whole or not at all."""

import io
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save

from fastsiam.errors import UserError
from fastsiam.export.feeding import Feeding, weights
from fastsiam.runtime.files import replace_file


def put_file(out: Path, data: bytes) -> None:
    """Replaces the file `out`; raises `UserError` where the disk refuses."""
    try:
        replace_file(out, data)
    except OSError as error:
        raise _unwritten(out, error) from error


def put_sidecar(out: Path, encoder: torch.nn.Module, code: str, more: dict) -> None:
    """Writes `out`.json beside a file that has no place for a description: how to load it, `more`, how to feed it."""
    said = {"load": code, **more, "feed": Feeding.of(encoder).text(), "fastsiam": encoder.description}
    put_file(sidecar(out), as_json(said))


def sidecar(out: Path) -> Path:
    return out.with_name(f"{out.name}.json")


def put_folder(out: Path, files: dict[str, bytes]) -> None:
    """Replaces the folder `out` by one of these files.

    Raises `UserError` for a folder with other files, which would be lost, and where the disk refuses.
    """
    # A link to a folder stays.
    folder = out.resolve()
    others = sorted(path.name for path in folder.iterdir() if path.name not in files) if folder.exists() else []
    if others:
        raise UserError(f"--out: {out} holds other files ({others[0]}, ...); give a new folder", "folder-in-use")
    new, old = (folder.with_name(f"{folder.name}.{end}") for end in ("tmp", "old"))
    try:
        new.mkdir()
        try:
            for name, data in files.items():
                replace_file(new / name, data)
            if folder.exists():
                folder.rename(old)
            new.rename(folder)
        finally:
            for left in (new, old):
                shutil.rmtree(left, ignore_errors=True)
    except OSError as error:
        raise _unwritten(out, error) from error


def state_bytes(encoder: torch.nn.Module, suffix: str) -> bytes:
    """The encoder's weights by their own names: safetensors with the description, else what torch.load reads."""
    if suffix == ".safetensors":
        # transformers and older versions of timm ask for the format.
        return save(weights(encoder), {"format": "pt", "fastsiam": json.dumps(encoder.description)})
    buffer = io.BytesIO()
    torch.save(weights(encoder), buffer)
    return buffer.getvalue()


def reading(out: Path) -> str:
    """Code that reads what `state_bytes` has made; it needs torch or safetensors.torch."""
    if out.suffix == ".safetensors":
        return f"safetensors.torch.load_file({str(out)!r})"
    return f"torch.load({str(out)!r}, weights_only=True)"


def as_json(value: dict) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _unwritten(out, error):
    return UserError(f"--out: cannot write {out} ({error.strerror or error}); choose another place", "export-unwritten")

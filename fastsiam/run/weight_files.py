"""Files of weights that other programs have written. No code of a file is run, whatever it holds."""

import argparse
import contextlib
import hashlib
import pathlib
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fastsiam.config.yaml_file import shortened
from fastsiam.errors import UserError
from fastsiam.runtime.files import DAMAGED_ZIP, check_records

# In folders of the Hugging Face hub, the first that is there.
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_CLASS = re.compile(r"(?:GLOBAL|class|function) [<'\"]*(?:class|built-in function|function)?[ <'\"]*([\w.]+)")
# Classes that hold values and do nothing: options of a command line, paths, and numbers of numpy under its two names.
_SCALAR = np.float64(0).__reduce__()[0]
_SAFE = [
    argparse.Namespace, pathlib.PosixPath, pathlib.PurePosixPath,
    np.dtype, *(getattr(np.dtypes, name) for name in np.dtypes.__all__ if name != "ObjectDType"),
    (_SCALAR, "numpy.core.multiarray.scalar"), (_SCALAR, "numpy._core.multiarray.scalar"),
]  # fmt: skip
_BEGINNINGS = {
    b"<": "is a web page and not a file of weights; open its address in a browser and save the file itself",
    b"version https://git-lfs": "is a pointer of Git LFS and not the file itself; run git lfs pull where it lies",
}


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_tensors(state: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names and bytes of tensors on any device, whatever their order, in 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def read_file(path: Path) -> object:
    """What a .pth, .pt, .ckpt, .bin, .pth.tar or .safetensors holds, on the CPU: tensors in dicts, and plain values.

    Raises `UserError` for a file that is empty, damaged, something else, or that holds what only code could rebuild;
    `OSError` for one that cannot be read.
    """
    with open(path, "rb") as file:
        start = file.read(512)
    if not start:
        raise UserError(f"{path} is empty; copy it again", "not-an-encoder")
    for beginning, sentence in _BEGINNINGS.items():
        if start.lstrip().startswith(beginning):
            raise UserError(f"{path} {sentence}", "not-an-encoder")
    # Eight bytes of a length, then JSON.
    if start[8:9] == b"{":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise _damaged(path, error, "damaged-file") from error
    # A zip since torch 1.6, a pickle before.
    if not start.startswith((b"PK\x03\x04", b"\x80")):
        raise UserError(f"{path} is neither a file of torch nor a safetensors file", "not-an-encoder")
    return _of_torch(path)


def _of_torch(path):
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                names = {name.rpartition("/")[2] for name in archive.namelist()}
                if "data.pkl" not in names:
                    raise UserError(f"{path} is an archive without weights of torch; unpack it", "not-an-encoder")
                if "constants.pkl" in names:
                    raise UserError(
                        f"{path} is TorchScript, which is code; where you trust it, keep its tensors alone: "
                        "torch.save(torch.jit.load(FILE).state_dict(), NEW)",
                        "code-in-file",
                    )
                check_records(archive)
        with torch.serialization.safe_globals(_SAFE):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _would_run_code(path, error) from error
    except UserError:
        raise
    except (*DAMAGED_ZIP, LookupError, AttributeError, TypeError) as error:
        raise _damaged(path, error) from error


def _would_run_code(path, error):
    found = _CLASS.search(str(error))
    if not found:
        return _damaged(path, error)
    return UserError(
        f"{path} would run code when it is read ({shortened(found[1], 50)}), which fastsiam does not allow; where you "
        "trust it, keep its tensors alone: torch.save(torch.load(FILE, weights_only=False)['state_dict'], NEW), of a "
        "whole module its state_dict()",
        "code-in-file",
    )


def _damaged(path, error, code="damaged-checkpoint"):
    lines = [line for line in str(error).splitlines() if line.strip() and "PyTorch 2.6" not in line]
    said = next((line for line in lines if "Unsupported" in line), lines[0] if lines else "it ends too early")
    return UserError(
        f"{path} is no whole file of torch or safetensors ({shortened(said.strip().rstrip('.'), 100)}); copy it again",
        code,
    )


def hub_file(folder: Path) -> Path | None:
    """The weights in a folder as the Hugging Face hub has it; None where there are none."""
    return next((folder / name for name in HUB_FILES if (folder / name).is_file()), None)


@contextlib.contextmanager
def unchanged(path: Path):
    """Raises `UserError` where a file was replaced inside the block, so that what was read is what was hashed."""
    before = path.stat()
    yield
    after = path.stat()
    if (before.st_ino, before.st_size, before.st_mtime_ns) != (after.st_ino, after.st_size, after.st_mtime_ns):
        raise UserError(f"{path} was written while it was read; start again, or copy it first", "file-in-use")

"""A file of named arrays: numpy's .npz without pickles, written whole."""

import io
from pathlib import Path

import numpy as np

from fastsiam.runtime.files import DAMAGED_ZIP, replace_file


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Replace `path`; raises `OSError` where the disk refuses, and what was there stays."""
    assert not any(array.dtype.hasobject for array in arrays.values())
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    replace_file(path, buffer.getvalue())


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """What `write_arrays` has written; empty where there is no file, or where it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive)
    except (OSError, *DAMAGED_ZIP):
        return {}

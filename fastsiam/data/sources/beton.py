"""Data sets written for ffcv by `python -m fastsiam.prepare ffcv`.

`OUT.beton` holds the images, `OUT.beton.npz` names, labels, classes, stored bytes and original sizes, so that a run
needs no originals. Imports no torch.
"""

import zipfile
from pathlib import Path

import numpy as np

from fastsiam.data.sources.source import ImageSource
from fastsiam.errors import UserError

SUFFIX = ".beton"
ARRAYS = ("names", "file_sizes", "labels", "classes", "image_sizes", "kinds")


def is_beton(location: str | Path) -> bool:
    return str(location).endswith(SUFFIX)


def index_path(beton: Path) -> Path:
    """Path of the file with names and sizes of a .beton."""
    return beton.with_name(beton.name + ".npz")


def open_beton(path: Path, key: str) -> ImageSource:
    """Returns the images of a .beton, with their original names and sizes; raises `UserError` for the key `key`."""
    index = index_path(path)
    command = f"python -m fastsiam.prepare ffcv SRC {path}"
    if not path.is_file():
        raise UserError(f"{key}: there is no {path}; {command} writes it", "no-beton")
    try:
        with np.load(index, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ARRAYS}
    except FileNotFoundError:
        raise UserError(f"{key}: {path} has no {index.name} beside it; {command} writes both", "no-beton") from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{key}: {index} cannot be read ({error}); write {path} anew", "bad-beton") from error
    return ImageSource(root=path, **{**arrays, "classes": tuple(arrays["classes"].tolist())})

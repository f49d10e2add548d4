"""Image files of a folder, labelled or not, nested or flat."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastsiam.data.sources.annotations import label_folder
from fastsiam.data.sources.excluded import in_words
from fastsiam.data.sources.tables import shown
from fastsiam.errors import UserError

# Archives, whose images a run does not find.
ARCHIVES = (".7z", ".bz2", ".gz", ".rar", ".tar", ".tbz", ".tgz", ".txz", ".xz", ".zip", ".zst")


@dataclass(frozen=True)
class Packed:
    """Places of N images inside tar files."""

    shards: tuple[str, ...]
    """File names below the source's root."""
    shard: np.ndarray
    """[N] int32: index into `shards`."""
    offset: np.ndarray
    """[N] int64: of the image's first byte."""


class Files(NamedTuple):
    """N image files below one root."""

    root: Path
    names: np.ndarray
    """[N] bytes ('S'): paths relative to `root`, or names of members."""
    file_sizes: np.ndarray
    """[N] int64, bytes."""
    labels: np.ndarray
    """[N] int64; -1 where there are no labels."""
    classes: tuple[str, ...]
    packed: Packed | None = None
    """None where each image is a file of its own."""
    excluded: Mapping[str, int] = {}
    """Numbers of excluded files and folders, by a reason of `fastsiam.data.sources.excluded`."""
    labelling: str = ""
    """Origin of the labels (`by val_annotations.txt`), or why there are none where some could be expected."""


def fingerprint(names: np.ndarray, file_sizes: np.ndarray) -> str:
    """Hash of relative names and file sizes, the same for the same data under another root."""
    digest = hashlib.sha256(names.tobytes())
    digest.update(file_sizes.astype("<i8").tobytes())
    return digest.hexdigest()[:16]


def no_images(root: Path, key: str, excluded: Mapping[str, int]) -> UserError:
    """Returns the error of a folder without an image; `excluded`: numbers of the files in it, by reason."""
    text = f"{key}: no images under {shown(root)}: {_what_is_there(root)}"
    if excluded:
        text += f"; excluded: {in_words(excluded, 3)}"
    return UserError(f"{text}; {_advice(root, key)}", "no-images")


def files_of_folder(root: Path, found: list[tuple[str, int]]) -> Files:
    """Returns the files that `walk` has found, sorted by name, with labels of `fastsiam.data.sources.annotations`."""
    found = sorted(found)
    labelling = label_folder(root, [name for name, _ in found])
    return make_files(root, found, labelling.labels, labelling.classes, labelling=labelling.how)


def is_outside(name: str) -> bool:
    """True for a relative name that leads out of its folder, judged without the file system."""
    return name.startswith("/") or os.path.normpath(name).split("/")[0] == ".."


def make_files(root: Path, found: list[tuple[str, int]], labels: list[int], classes: tuple[str, ...], **more) -> Files:
    """Returns `Files`; `found`: name and size in bytes of each, `more`: other fields."""
    names, file_sizes = zip(*found, strict=True)
    return Files(
        root=root,
        names=np.array([os.fsencode(name) for name in names]),
        file_sizes=np.array(file_sizes, np.int64),
        labels=np.array(labels, np.int64),
        classes=classes,
        **more,
    )


def _what_is_there(root):
    names = sorted(os.listdir(root))
    if not names:
        return "the folder is empty"
    some = ", ".join(shown(name, 20) for name in names[:3]) + (", ..." if len(names) > 3 else "")
    return f"it holds {len(names)} {'entry' if len(names) == 1 else 'entries'} ({some})"


def _advice(root, key):
    packed = [name for name in sorted(os.listdir(root)) if name.lower().endswith(ARCHIVES)]
    if packed:
        return f"unpack {shown(packed[0], 40)} first"
    return f"set {key}=PATH to the folder that holds your images" if "." in key else "name a folder that holds images"

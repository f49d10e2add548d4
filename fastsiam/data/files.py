"""The image files of a folder, labelled, nested or flat."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastsiam.config import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


@dataclass(frozen=True)
class Packed:
    """Where N images lie inside tar files."""

    shards: tuple[str, ...]
    """File names below the source's root."""
    shard: np.ndarray
    """[N] int32: which of them."""
    offset: np.ndarray
    """[N] int64: of the image's first byte."""


class Directory(NamedTuple):
    """What changes where a file is added to a folder, taken away or renamed."""

    name: str
    """Relative to the root, "" for the root itself."""
    mtime_ns: int
    inode: int


class Files(NamedTuple):
    """N files below one root."""

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
    left_out: Mapping[str, int] = {}
    """How many files and folders are passed over, by a reason of `fastsiam.data.left_out`."""
    labelling: str = ""
    """How the labels were read (`by val_annotations.txt`), or why there are none where some could be expected."""


def fingerprint(names: np.ndarray, file_sizes: np.ndarray) -> str:
    """Hash of relative names and file sizes: the same data under another root has the same one."""
    digest = hashlib.sha256(names.tobytes())
    digest.update(file_sizes.astype("<i8").tobytes())
    return digest.hexdigest()[:16]


def no_images(root: Path, key: str) -> UserError:
    return UserError(f"{key}: no images under {root}: {_what_is_there(root)}; looked for {' '.join(EXTENSIONS)}")


def files_of_folder(root: Path, found: list[tuple[str, int]]) -> Files:
    """What `walk` has found, sorted by relative names.

    The first level of folders gives the classes, where there are two and no image in it.
    """
    found = sorted(found)
    firsts = [name.partition("/")[0] if "/" in name else None for name, _ in found]
    classes = tuple(sorted(set(firsts))) if None not in firsts else ()
    if len(classes) < 2:
        classes = ()
    number = {name: label for label, name in enumerate(classes)}
    return make_files(root, found, [number.get(first, -1) for first in firsts], classes)


def is_outside(name: str) -> bool:
    """Whether a relative name, taken by its words, leaves the folder that it is relative to."""
    return name.startswith("/") or os.path.normpath(name).split("/")[0] == ".."


def walk(root: Path, directories: list[Directory]) -> Iterator[tuple[str, int]]:
    """Relative names and sizes of the image files below `root`, following links but no loop; hidden ones not.

    Every folder is added to `directories`, as it was before it was read.
    """
    seen = set()
    stack = [""]
    while stack:
        folder = stack.pop()
        status = os.stat(os.path.join(root, folder))
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        directories.append(Directory(folder, status.st_mtime_ns, status.st_ino))
        with os.scandir(os.path.join(root, folder)) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                name = f"{folder}/{entry.name}" if folder else entry.name
                if entry.is_dir():
                    stack.append(name)
                elif entry.name.lower().endswith(EXTENSIONS) and entry.is_file():
                    yield name, entry.stat().st_size


def make_files(root: Path, found: list[tuple[str, int]], labels: list[int], classes: tuple[str, ...], **more) -> Files:
    """`found`: name and size in bytes of each; `more`: other fields of `Files`."""
    names, file_sizes = zip(*found, strict=True)
    return Files(
        root=root,
        names=np.array([os.fsencode(name) for name in names]),
        file_sizes=np.array(file_sizes, np.int64),
        labels=np.array(labels, np.int64),
        classes=classes,
        **more,
    )


def _what_is_there(root: Path) -> str:
    names = sorted(os.listdir(root))
    if not names:
        return "the folder is empty"
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f"it holds {len(names)} {'entry' if len(names) == 1 else 'entries'} ({shown})"

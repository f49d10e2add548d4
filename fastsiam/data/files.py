"""The image files of a folder (labelled, nested or flat) and of a text list."""

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


def files_of_list(path: Path, key: str) -> Files:
    """In the list's order: a path a line, relative to the list and below its folder; a label after a tab."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise UserError(f"{key}: {path} is neither a folder nor a text file with a path a line") from None
    if not lines:
        raise UserError(f"{key}: the list {path} is empty")
    entries = [line.partition("\t") for line in lines]
    given = [label.strip() for _, _, label in entries]
    if any(given) and not all(given):
        line = given.index("") + 1
        raise UserError(f"{key}: in {path} some lines have a label after a tab, but entry {line} has none")
    classes = tuple(sorted(set(given))) if all(given) else ()
    number = {name: label for label, name in enumerate(classes)}
    found = []
    for name in (name.strip() for name, _, _ in entries):
        if is_outside(name):
            raise UserError(
                f"{key}: {path} lists {name}, outside {path.parent}; paths are relative to the list's folder"
            )
        try:
            found.append((name, (path.parent / name).stat().st_size))
        except OSError:
            raise UserError(f"{key}: {path} lists {name}, but there is no {path.parent / name}") from None
    return make_files(path.parent, found, [number.get(label, -1) for label in given], classes)


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


def make_files(
    root: Path, found: list[tuple[str, int]], labels: list[int], classes: tuple[str, ...], packed: Packed | None = None
) -> Files:
    """`found`: name and size in bytes of each."""
    names, file_sizes = zip(*found, strict=True)
    return Files(
        root=root,
        names=np.array([os.fsencode(name) for name in names]),
        file_sizes=np.array(file_sizes, np.int64),
        labels=np.array(labels, np.int64),
        classes=classes,
        packed=packed,
    )


def _what_is_there(root: Path) -> str:
    names = sorted(os.listdir(root))
    if not names:
        return "the folder is empty"
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f"it holds {len(names)} {'entry' if len(names) == 1 else 'entries'} ({shown})"

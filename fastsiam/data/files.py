"""The image files of a folder (labelled, nested or flat) and of a text list."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastsiam.config import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


class Files(NamedTuple):
    """N files below one root."""

    root: Path
    names: np.ndarray
    """[N] bytes ('S'): paths relative to `root`."""
    file_sizes: np.ndarray
    """[N] int64, bytes."""
    labels: np.ndarray
    """[N] int64; -1 where there are no labels."""
    classes: tuple[str, ...]


def files_of_folder(root: Path, key: str) -> Files:
    """Sorted by relative names; the first level of folders gives the classes, where there are two and no file in it."""
    found = sorted(walk(root))
    if not found:
        raise UserError(f"{key}: no images under {root}: {_what_is_there(root)}; looked for {' '.join(EXTENSIONS)}")
    firsts = [name.partition("/")[0] if "/" in name else None for name, _ in found]
    classes = tuple(sorted(set(firsts))) if None not in firsts else ()
    if len(classes) < 2:
        classes = ()
    number = {name: label for label, name in enumerate(classes)}
    return _files(root, found, [number.get(first, -1) for first in firsts], classes)


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
    return _files(path.parent, found, [number.get(label, -1) for label in given], classes)


def is_outside(name: str) -> bool:
    """Whether a relative name, taken by its words, leaves the folder that it is relative to."""
    return name.startswith("/") or os.path.normpath(name).split("/")[0] == ".."


def walk(root: Path) -> Iterator[tuple[str, int]]:
    """Relative names and sizes of the image files below `root`, following links but no loop; hidden ones not."""
    seen = set()
    stack = [""]
    while stack:
        folder = stack.pop()
        status = os.stat(os.path.join(root, folder))
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(os.path.join(root, folder)) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                name = f"{folder}/{entry.name}" if folder else entry.name
                if entry.is_dir():
                    stack.append(name)
                elif entry.name.lower().endswith(EXTENSIONS) and entry.is_file():
                    yield name, entry.stat().st_size


def _files(root, found, labels, classes) -> Files:
    names, file_sizes = zip(*found, strict=True)
    return Files(
        root=root,
        names=np.array([os.fsencode(name) for name in names]),
        file_sizes=np.array(file_sizes, np.int64),
        labels=np.array(labels, np.int64),
        classes=classes,
    )


def _what_is_there(root: Path) -> str:
    names = sorted(os.listdir(root))
    if not names:
        return "the folder is empty"
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f"it holds {len(names)} {'entry' if len(names) == 1 else 'entries'} ({shown})"

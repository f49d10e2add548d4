"""Parts of a labelled data set for semi-supervised training: class-balanced lists by a seed, and lists of others."""

import bisect
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastsiam.data import rng
from fastsiam.data.sources.source import ImageSource
from fastsiam.data.sources.tables import Entries, read_entries, read_text, shown
from fastsiam.errors import UserError
from fastsiam.runtime.files import replace_file


@dataclass(frozen=True)
class Subset:
    """Images whose labels are used."""

    indices: np.ndarray
    """[M] int64 into the source, sorted."""
    notes: tuple[str, ...] = ()
    """Sentences on what a user would not expect."""


def balanced(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Indices [M] int64, sorted, of `share` of the labelled images; classes differ by one image at most.

    A class with fewer images gives all of them, and the others give more in its place. Each class gives one image at
    least. The images of a smaller share are among those of a larger one with the same seed. `labels`: [N] int64, -1
    for none.
    """
    labelled = np.flatnonzero(labels >= 0)
    classes, sizes = np.unique(labels[labelled], return_counts=True)
    total = max(round(share * len(labelled)), len(classes))
    levels = range(int(sizes.max()) + 1)
    level = bisect.bisect_right(levels, total, key=lambda level: np.minimum(sizes, level).sum()) - 1
    quota = np.minimum(sizes, level)
    # The images that are left go to classes that have more, by their order.
    order = np.argsort(rng.subset_keys(seed, int(classes[-1]) + 1)[classes], kind="stable")
    more = order[sizes[order] > level][: total - quota.sum()]
    quota[more] += 1
    # By class, then by key; the first of each class up to its quota.
    order = labelled[np.lexsort((rng.subset_keys(seed, len(labels))[labelled], labels[labelled]))]
    place = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.sort(order[place < np.repeat(quota, sizes)])


def share_of_labels(source: ImageSource, share: float, seed: int) -> Subset:
    """`balanced` for a source, with a sentence where the share is less than one image of a class."""
    labelled = int((source.labels >= 0).sum())
    if share == 1:
        return Subset(np.flatnonzero(source.labels >= 0))
    indices = balanced(source.labels, share, seed)
    classes = len(np.unique(source.labels[indices]))
    notes = ()
    if share * labelled < classes:
        text = f"{share:.4g} of {labelled:,} images is less than one for each of {classes:,} classes; each gives one"
        notes = (f"{text}: {len(indices):,} images, {len(indices) / labelled:.2%}",)
    return Subset(indices, notes)


def listed(path: Path, source: ImageSource, key: str) -> Subset:
    """The images that a text list names: a line each, CSV or TSV, with any columns beside the file name.

    Names are paths below the source's root, absolute paths, or bare file names (`n01440764_10026.JPEG`, the lists of
    SimCLR). Labels are those of the source. Raises `UserError`, beginning with `key`, for names that are not among the
    images, that fit several, or that have no label.
    """
    text, encoding = read_text(path, key)
    names = _Names(source)
    try:
        entries = read_entries(text, encoding, names.find)
    except ValueError as error:
        raise UserError(f"{key}: {shown(path)}: {error}", "bad-list") from None
    if not entries.found:
        raise UserError(f"{key}: the list {shown(path)} is empty; write a file name a line", "empty-list")
    _check(path, entries, names, source, key)
    indices = np.unique(np.array(entries.found, np.int64))
    notes = []
    if len(indices) < len(entries.found):
        notes.append(f"{len(entries.found) - len(indices):,} lines of {path.name} name an image again")
    absent = len(source.classes) - len(np.unique(source.labels[indices]))
    if absent:
        notes.append(f"{absent:,} of {len(source.classes):,} classes have no image in {path.name}")
    return Subset(indices, tuple(notes))


def write_list(path: Path, source: ImageSource, indices: np.ndarray) -> None:
    """Writes `PATH<tab>CLASS` lines, which `--labels` and `--train` read. Raises `OSError` where the disk refuses.

    Paths are absolute, those of images in shards are the members' names.
    """
    folder = b"" if source.packed or not source.root.is_dir() else os.fsencode(os.path.abspath(source.root)) + b"/"
    classes = [os.fsencode(name) for name in source.classes]
    lines = [folder + bytes(source.names[i]) + b"\t" + classes[source.labels[i]] + b"\n" for i in indices.tolist()]
    replace_file(path, b"".join(lines))


class _Names:
    """Index of each image by its name below the root, its absolute path, or its bare file name."""

    def __init__(self, source: ImageSource):
        names = [os.fsdecode(name) for name in source.names.tolist()]
        self._by_name = {name: index for index, name in enumerate(names)}
        self._by_file: dict[str, int] = {}
        self.several: dict[str, tuple[str, str]] = {}
        """Two of the images that have a bare file name."""
        for index, name in enumerate(names):
            file = name.rpartition("/")[2]
            first = self._by_file.setdefault(file, index)
            if first != index:
                self.several.setdefault(file, (names[first], name))
        self._roots = tuple({f"{os.path.abspath(source.root)}/", f"{os.path.realpath(source.root)}/"})

    def find(self, name: str) -> int | None:
        for root in self._roots:
            name = name.removeprefix(root)
        name = name.removeprefix("./")
        if name in self._by_name:
            return self._by_name[name]
        return None if "/" in name or name in self.several else self._by_file.get(name)


def _check(path: Path, entries: Entries, names: _Names, source: ImageSource, key: str) -> None:
    for index, name, line in zip(entries.found, entries.names, entries.lines, strict=True):
        where = f"{key}: line {line} of {shown(path)} names {shown(name)}"
        if name in names.several and index is None:
            one, other = map(shown, names.several[name])
            raise UserError(f"{where}, which is {one} and {other}; write the folders", "ambiguous-name")
        if index is None:
            raise UserError(
                f"{where}, which is not among the {len(source):,} images under {shown(source.root)}; give a list of "
                "their names",
                "file-missing",
            )
        if source.labels[index] < 0:
            raise UserError(f"{where}, which has no label under {shown(source.root)}; take it out", "label-missing")

"""Labels of a folder's images from a file: val_annotations.txt, metadata.csv and other usual names."""

import os
from pathlib import Path

from fastsiam.data.sources.labels import Labelling, are_splits, by_folder, by_values
from fastsiam.data.sources.tables import label_values, read_entries, read_text, shown
from fastsiam.errors import UserError

_NAMES = (
    "metadata.jsonl", "metadata.csv", "metadata.tsv", "val_annotations.txt", "annotations.csv", "annotations.tsv",
    "annotations.txt", "labels.csv", "labels.tsv", "labels.txt", "train.csv",
)  # fmt: skip
# Ends of names that begin with the name of the images' folder.
_OF_FOLDER = (".csv", ".tsv", ".txt", "_labels.csv", "_labels.txt", "_annotations.csv", "_annotations.txt")
_GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"


def places(root: Path) -> list[str]:
    """Returns names relative to `root` of possible files: in it, in its images/ and above it."""
    name = root.resolve().name
    names = [*(name + end for end in _OF_FOLDER), *_NAMES]
    return [place + name for place in ("", "images/", "../") for name in names]


def label_folder(root: Path, names: list[str]) -> Labelling:
    """Returns labels of the images `names` below `root`: by class folders, else by the first useful file of `places`.

    Without labels `how` says what is wrong with the first such file; "" where there is none.
    """
    labelling = by_folder(names)
    found = [place for place in places(root) if os.path.isfile(root / place)]
    if labelling is not None and not (found and are_splits(labelling.classes)):
        unused = [place for place in found if place.startswith("metadata.")]
        how = f"{labelling.how}, not by {unused[0]}" if unused else labelling.how
        return labelling._replace(how=how)
    reasons = []
    images = _Images(root, names) if found else None
    for place in found:
        by_file = _by_file(root, place, images)
        if by_file.classes:
            return by_file
        reasons.append(by_file.how)
    if labelling is not None:
        return labelling
    if os.path.isfile(root / _GROUND_TRUTH) or os.path.isfile(root / ".." / _GROUND_TRUTH):
        reasons.insert(0, f"{_GROUND_TRUTH} has numbers whose synsets only the devkit knows; make a folder a class")
    beside = sum("/" not in name for name in names)
    if len({name.partition("/")[0] for name in names if "/" in name}) > 1 and beside:
        reasons.append(f"{beside:,} of {len(names):,} images lie beside the folders, too many to be strays")
    reasons = [reason for reason in reasons if reason]
    return Labelling([-1] * len(names), (), reasons[0] if reasons else "")


class _Images:
    """Index of a folder's images by the names that annotations give them."""

    def __init__(self, root: Path, names: list[str]):
        self._folder = root.resolve().name
        self.count = len(names)
        self._paths = {name: index for index, name in enumerate(names)}
        self._lasts, self._stems = {}, {}
        for index, name in enumerate(names):
            last = name.rpartition("/")[2]
            for known, word in ((self._lasts, last), (self._stems, last.rpartition(".")[0])):
                # None: several images have this name.
                known[word] = None if word in known else index

    def find(self, name: str) -> int | None:
        """Returns the image of a path below the folder, of one with the folder's name, or of a unique last part."""
        name = os.path.normpath(name.replace("\\", "/")) if name else ""
        _, inside, rest = f"/{name}".rpartition(f"/{self._folder}/")
        for path in (name, rest) if inside else (name,):
            if path in self._paths:
                return self._paths[path]
            if f"images/{path}" in self._paths:
                return self._paths[f"images/{path}"]
        if inside:
            name = rest
        if "/" in name:
            return None
        index = self._lasts.get(name)
        return self._stems.get(name) if index is None else index


def _by_file(root, place, images):
    last = place.rpartition("/")[2]
    unlabelled = [-1] * images.count
    try:
        entries = read_entries(*read_text(root / place, place), images.find)
    except (UserError, ValueError) as error:
        return Labelling(unlabelled, (), f"{last}: {error}")
    known = sum(index is not None for index in entries.found)
    if place.startswith("../") and 2 * known < images.count:
        return Labelling(unlabelled, (), "")
    if not known:
        return Labelling(unlabelled, (), f"{last} names none of the images")
    chosen = label_values(entries.columns)
    if chosen is None:
        return Labelling(unlabelled, (), f"{last} has no column label ({shown(', '.join(entries.header))})")
    values, column, classes = chosen
    given, line_of = [""] * images.count, {}
    for index, value, line in zip(entries.found, values, entries.lines, strict=True):
        if index is None:
            continue
        if line_of.setdefault(index, line) != line and given[index] != value:
            return Labelling(unlabelled, (), f"{last}: line {line} has another label than line {line_of[index]}")
        given[index] = value
    used = set(given)
    how = ", ".join(filter(None, (f"by {last}", column if " " in column else f"column {column}", entries.how)))
    if known < len(entries.found):
        others = len(entries.found) - known
        how += f" ({others:,} of its lines {'names' if others == 1 else 'name'} no image here)"
    return by_values(given, how, [name for name in classes if name in used])

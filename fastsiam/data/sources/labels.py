"""Labels of images in folders and tar shards: by class folders, or by members beside an image.

Every function returns a `Labelling`, or None where the images are not labelled in its way.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from fastsiam.data.sources.tables import LABEL_COLUMNS, is_numbered, label_values, sorted_classes

# Folders that divide a data set and are not classes.
SPLITS = frozenset(("train", "training", "val", "valid", "validation", "test", "testing"))
_YEAR = re.compile(r"[-_ ]?(19|20)\d\d$")
# A larger number in a .cls than this is the name of a class; up to here every number below the largest is a class.
_COUNTED = 1_000_000
# Names of shards that hold images of every class.
_PARTS = SPLITS | {"data", "dataset", "extra", "image", "images", "img", "part", "shard", "shards", "chunk", "split"}
_WORDNET = re.compile(r"n\d{8}")
_NUMBERED = re.compile(r"[-_. ]?\d+$")
_TEXT_CHARACTERS = 64


class Labelling(NamedTuple):
    labels: list[int]
    """One an image; -1 for none."""
    classes: tuple[str, ...]
    how: str
    """`by .cls`; where there are no classes, why."""


def are_splits(folders: Iterable[str]) -> bool:
    """True where all of these folders divide a data set (`Train`, `val2017`)."""
    return SPLITS.issuperset(_YEAR.sub("", folder.lower()) for folder in folders)


def by_values(values: Sequence[str], how: str, classes: Sequence[str] | None = None) -> Labelling:
    """Labels by a word or number for each image, "" for none. `classes`: the values in their order."""
    classes = sorted_classes(values) if classes is None else classes
    number = {name: label for label, name in enumerate(classes)}
    return Labelling([number.get(value, -1) for value in values], tuple(classes), how)


def by_folder(names: Sequence[str]) -> Labelling | None:
    """Labels by the first level with two folders or more, below folders that hold everything and folders of splits.

    Images beside the folders have no label. Where they are the majority, no image has one.
    """
    rest = list(names)
    while True:
        firsts = [None if name is None or "/" not in name else name.partition("/")[0] for name in rest]
        counts = Counter(firsts)
        del counts[None]
        beside = len(names) - counts.total()
        if not counts or counts.total() <= beside:
            return None
        rest = [None if first is None else name[len(first) + 1 :] for first, name in zip(firsts, rest, strict=True)]
        deepest = not any("/" in name for name in rest if name)
        if len(counts) > 1 and (deepest or not are_splits(counts)):
            return by_values([first or "" for first in firsts], "by folder", sorted(counts))
        if deepest:
            return None


def by_cls(values: Sequence[str]) -> Labelling | None:
    """Labels by .cls members: numbers are classes from 0 to the largest, words are classes by letters."""
    if not any(values):
        return None
    if not is_numbered(set(values) - {""}):
        return by_values(values, "by .cls")
    numbers = [-1 if value == "" else max(int(value), -1) for value in values]
    most = max(numbers)
    if most > _COUNTED:
        return by_values(["" if number < 0 else str(number) for number in numbers], "by .cls")
    return Labelling(numbers, tuple(map(str, range(most + 1))), "by .cls") if most >= 0 else None


def by_json(fields: Sequence[Mapping[str, str]]) -> Labelling | None:
    """Labels by the keys of .json members that name one (`fastsiam.data.sources.tables.LABEL_COLUMNS`)."""
    columns = {name: [known.get(name, "") for known in fields] for name in LABEL_COLUMNS}
    chosen = label_values({name: values for name, values in columns.items() if any(values)})
    if chosen is None:
        return None
    values, name, classes = chosen
    return by_values(values, f"by {name} in .json", classes)


def by_text(values: Sequence[str | None]) -> Labelling | None:
    """Labels by .txt members, where each image has a short line and lines repeat, unlike captions."""
    if not all(values) or len(values) < 2 * len(set(values)) or len(set(values)) < 2:
        return None
    if any("\n" in value or len(value) > _TEXT_CHARACTERS for value in set(values)):
        return None
    return by_values(values, "by .txt")


def by_shard(shards: Sequence[str], numbers: Sequence[int]) -> Labelling | None:
    """Labels by folders of shards (`cat/0.tar`), or by names of shards (`cat.tar`, `dog-001.tar`)."""
    labelled = by_folder(shards)
    if labelled is None or -1 in labelled.labels:
        stems = [name.rpartition("/")[2].rpartition(".")[0] for name in shards]
        names = [stem if _WORDNET.fullmatch(stem) else _NUMBERED.sub("", stem) for stem in stems]
        if "" in names or len(set(names)) < 2 or any(name.lower() in _PARTS for name in names):
            return None
        labelled = by_values(names, "by shard")
    return Labelling([labelled.labels[number] for number in numbers], labelled.classes, "by shard")

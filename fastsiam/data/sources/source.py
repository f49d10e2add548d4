"""Images of a data set: their names, labels and headers, and how their bytes are read."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fastsiam.data.sources import excluded
from fastsiam.data.sources.image_header import ODD, UNKNOWN, UNREADABLE, BadImageError, read_header
from fastsiam.data.sources.labels import Labelling
from fastsiam.data.sources.levels import Levels
from fastsiam.data.sources.tables import shown

_READERS = 8
_EIGHT_BITS = Levels()


@dataclass(frozen=True)
class Packed:
    """Places of N images inside tar files."""

    shards: tuple[str, ...]
    """File names below the source's root."""
    shard: np.ndarray
    """[N] int32: index into `shards`."""
    offset: np.ndarray
    """[N] int64: of the image's first byte."""


@dataclass(frozen=True)
class ImageSource:
    """N images below one root, in a fixed order that runs depend on.

    Names are one bytes array, not N Python objects: a list would be copied page by page into every worker. Which images
    there are is fixed; `image_sizes` and `kinds` fill up as headers are read, and only the methods of this class write
    them.
    """

    root: Path
    names: np.ndarray
    """[N] bytes ('S'): paths relative to `root`, or names of members."""
    file_sizes: np.ndarray
    """[N] int64, bytes."""
    labels: np.ndarray
    """[N] int64; -1 where there are no labels."""
    classes: tuple[str, ...]
    """Class names by label; empty where there are no labels."""
    image_sizes: np.ndarray
    """[N, 2] int32 heights and widths as displayed (EXIF orientation applied), 0 until read by `look`."""
    kinds: np.ndarray
    """[N] uint8, of `fastsiam.data.sources.image_header`: UNKNOWN until read by `look`."""
    packed: Packed | None = None
    """None where each image is a file of its own."""
    cached_kinds: np.ndarray | None = None
    """`kinds` in the index cache. A file that cannot be read stays UNKNOWN there, so the next start reads it again."""
    known_fingerprint: str | None = None
    """Fingerprint in the index; None: `fingerprint` computes it."""
    excluded: Mapping[str, int] = field(default_factory=dict)
    """Numbers of files and folders below the root that are not used, by reason. Only empty files are among the N."""
    labelling: str = ""
    """Origin of the labels in words, or why there are none where some could be expected."""
    excluded_by_scan: str = ""
    """Sentence on the images that a scan excludes; empty for none."""
    levels: Levels = _EIGHT_BITS
    """Map from pixels of more than eight bits to eight."""
    converted: set[int] = field(default_factory=set)
    """Images that this process has found to be decoded by PIL only."""

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> Path:
        """Path of the image's file, or of the shard that holds it."""
        if self.packed:
            return self.root / self.packed.shards[self.packed.shard[index]]
        return self.root / os.fsdecode(bytes(self.names[index]))

    def paths(self, indices: np.ndarray) -> list[bytes]:
        """Paths of images' files, where each is a file of its own; an eighth of the time that `path` takes for each."""
        root = os.path.join(os.fsencode(self.root), b"")
        return [root + name for name in self.names[indices].tolist()]

    def name(self, index: int) -> str:
        """Name for messages: path of the file, or of the shard and the member in it."""
        return f"{self.path(index)}/{os.fsdecode(bytes(self.names[index]))}" if self.packed else str(self.path(index))

    def read(self, index: int) -> bytes:
        """Returns the image's encoded bytes; raises `BadImageError` where they cannot be read."""
        try:
            with open(self.path(index), "rb") as file:
                if not self.packed:
                    return file.read()
                data = os.pread(file.fileno(), self.file_sizes[index], self.packed.offset[index])
        except OSError as error:
            raise BadImageError(f"{self.name(index)} cannot be read: {error}") from error
        if len(data) != self.file_sizes[index]:
            raise BadImageError(f"{self.name(index)} cannot be read: the shard ends after {len(data)} bytes of it")
        return data

    def look(self, indices: np.ndarray) -> dict[int, str]:
        """Reads headers that have not been read yet; returns the reasons why some cannot be read, by index."""
        missing = np.unique(indices[self.kinds[indices] == UNKNOWN])
        reasons = {}
        if len(missing):
            with ThreadPoolExecutor(min(_READERS, len(missing))) as pool:
                found = list(pool.map(self._header, missing.tolist()))
            for index, header in zip(missing.tolist(), found, strict=True):
                if isinstance(header, str):
                    reasons[index] = header
                    self.mark(index, UNREADABLE)
                else:
                    self.learn(index, header[:2], header.kind)
        return reasons

    def learn(self, indices, sizes, kinds, cache: bool = True) -> None:
        """Sets sizes (height, width) and kinds of some images, as their headers say; `cache`: also for later starts."""
        self.image_sizes[indices] = sizes
        self.kinds[indices] = kinds
        if cache and self.cached_kinds is not None:
            self.cached_kinds[indices] = kinds

    def mark(self, indices, kind: int) -> None:
        """Sets the kind of some images for this process only: UNREADABLE or UNWANTED, or UNKNOWN to read them again."""
        self.kinds[indices] = kind

    def forget(self, indices: Iterable[int]) -> None:
        """Drops some images from the cache, whose headers were wrong; the next start reads them again."""
        if self.cached_kinds is not None:
            self.cached_kinds[list(indices)] = UNKNOWN

    def convert(self, indices: Iterable[int]) -> None:
        """Leaves some images to PIL, whatever their headers say, in this run and in later ones."""
        chosen = list(indices)
        self.learn(chosen, self.image_sizes[chosen], ODD)
        self.converted.update(chosen)

    def sizes(self, indices: np.ndarray) -> np.ndarray:
        """Returns heights and widths [n, 2] int32 of some images, 0 where the header cannot be read."""
        self.look(indices)
        return self.image_sizes[indices]

    def label_text(self) -> str:
        """Number of classes, some names, and how they were read; "" where no labels could be expected."""
        if not self.classes:
            return f"none under {self.root}: {self.labelling}" if self.labelling else ""
        some = ", ".join(shown(name, 20) for name in self.classes[:3]) + (", ..." if len(self.classes) > 3 else "")
        what = "class" if len(self.classes) == 1 else "classes"
        text = f"{len(self.classes):,} {what} ({some}) {self.labelling}".rstrip()
        unlabelled = np.flatnonzero(self.labels < 0)
        if len(unlabelled):
            has = "1 image has" if len(unlabelled) == 1 else f"{len(unlabelled):,} images have"
            text += f"; {has} none and cannot serve kNN, for example {shown(os.fsdecode(self.names[unlabelled[0]]))}"
        return text

    def exclusion_texts(self) -> list[str]:
        """Sentences on excluded files and on images that a scan excludes; empty for none."""
        files = f"{excluded.in_words(self.excluded)} under {self.root}" if self.excluded else ""
        return [text for text in (files, self.excluded_by_scan) if text]

    def fingerprint(self) -> str:
        """Hash of relative names and file sizes, the same for the same data under another root."""
        return self.known_fingerprint or fingerprint(self.names, self.file_sizes)

    def _header(self, index):
        try:
            return read_header(self.read(index) if self.packed else self.path(index), self.name(index))
        except BadImageError as error:
            return str(error)


def fingerprint(names: np.ndarray, file_sizes: np.ndarray) -> str:
    """Hash of relative names and file sizes, the same for the same data under another root."""
    digest = hashlib.sha256(names.tobytes())
    digest.update(file_sizes.astype("<i8").tobytes())
    return digest.hexdigest()[:16]


def new_source(root: Path, found: list[tuple[str, int]], labelling: Labelling | None = None, **more) -> ImageSource:
    """Returns a source of files whose headers are not read yet.

    `found`: name and size in bytes of each file; `more`: other fields of `ImageSource`.
    """
    names, file_sizes = zip(*found, strict=True)
    count = len(names)
    labels, classes, how = labelling or ([-1] * count, (), "")
    return ImageSource(
        root=root,
        names=np.array([os.fsencode(name) for name in names]),
        file_sizes=np.array(file_sizes, np.int64),
        labels=np.array(labels, np.int64),
        classes=classes,
        image_sizes=np.zeros((count, 2), np.int32),
        kinds=np.zeros(count, np.uint8),
        labelling=how,
        **more,
    )

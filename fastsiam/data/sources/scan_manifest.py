"""Manifest of a scan: a line a file, with sizes, decoders and verdicts for later runs."""

import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastsiam.data.sources.image_header import ODD, PLAIN, UNKNOWN, UNREADABLE, UNWANTED
from fastsiam.data.sources.source import ImageSource
from fastsiam.errors import UserError
from fastsiam.runtime.files import replace_file


class Verdict(NamedTuple):
    kind: int | None
    """UNREADABLE or UNWANTED where runs exclude the image; None where it is only reported."""
    meaning: str


OK, UNREAD, EMPTY, NOT_AN_IMAGE, TRUNCATED = "ok", "unreadable", "empty", "not an image", "truncated"
UNSUPPORTED = "not supported"
TOO_LARGE, DUPLICATE, CONSTANT = "too large", "duplicate", "constant"
ANIMATED, CMYK, DEEP, GREYSCALE = "animated", "CMYK", "16-bit", "greyscale"
WIDE, FLOAT = "32-bit", "float"
# More than eight bits a channel.
DEEPER = (DEEP, WIDE, FLOAT)

VERDICTS = {
    OK: Verdict(None, "decodes"),
    UNREAD: Verdict(UNREADABLE, "the file system or the shard does not give its bytes"),
    EMPTY: Verdict(UNREADABLE, "no bytes"),
    NOT_AN_IMAGE: Verdict(UNREADABLE, "another kind of file under an image's name"),
    UNSUPPORTED: Verdict(UNREADABLE, "a TIFF of 2 or 5 and more bands, or one for pip install tifffile imagecodecs"),
    TRUNCATED: Verdict(UNREADABLE, "begins as an image and cannot be decoded to its end"),
    TOO_LARGE: Verdict(UNWANTED, "more pixels than --max-pixels"),
    DUPLICATE: Verdict(UNWANTED, "the same bytes as an earlier file, which stays"),
    CONSTANT: Verdict(UNWANTED, "one colour everywhere: its two views are the same"),
    ANIMATED: Verdict(None, "several frames: the first is used"),
    CMYK: Verdict(None, "converted to RGB"),
    DEEP: Verdict(None, "16 bits a channel: data.deep_pixels says which values become black and white"),
    WIDE: Verdict(None, "32 bits a channel: the same"),
    FLOAT: Verdict(None, "floating-point numbers: the same"),
    GREYSCALE: Verdict(None, "one channel: repeated to three"),
}

_KINDS = {PLAIN: b"plain", ODD: b"odd", UNKNOWN: b"-"}
_COLUMNS = b"name\tbytes\theight\twidth\tverdict\tkind\thash"


class Row(NamedTuple):
    """One file of a scan."""

    name: bytes
    file_size: int
    height: int
    """0, as the width, where the header cannot be read."""
    width: int
    verdict: str
    kind: int
    """PLAIN or ODD of the header, UNKNOWN where it cannot be read."""
    digest: str
    """Hash of the file's bytes."""

    def line(self) -> bytes:
        name = self.name.replace(b"\\", b"\\\\").replace(b"\t", b"\\t").replace(b"\n", b"\\n")
        numbers = f"{self.file_size}\t{self.height}\t{self.width}\t{self.verdict}".encode()
        return b"\t".join((name, numbers, _KINDS[self.kind], self.digest.encode())) + b"\n"


def default_path(cache_folder: Path) -> Path:
    """Path of a manifest where a scan writes and runs look by default."""
    return cache_folder / "manifest.tsv"


def begin(path: Path) -> None:
    """Makes the file if there is none, and cuts off the unfinished last line of an interrupted scan.

    Raises `UserError` for a file that is not a manifest, and leaves it as it is.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or not path.stat().st_size:
            path.write_bytes(_COLUMNS + b"\n")
        data = path.read_bytes()
        if not data.startswith(_COLUMNS + b"\n"):
            raise _not_a_manifest(path, "--out")
        os.truncate(path, data.rfind(b"\n") + 1)
    except OSError as error:
        raise UserError(
            f"--out: the manifest {path} cannot be written ({error.strerror}); name a file elsewhere", "disk"
        ) from error


def read_rows(path: Path) -> list[Row]:
    """Returns the rows of a manifest; raises `UserError` for another file."""
    kinds = {text: kind for kind, text in _KINDS.items()}
    return [
        Row(name, int(size), int(height), int(width), verdict.decode(), kinds[kind], digest.decode())
        for name, size, height, width, verdict, kind, digest in zip(*_columns(path, "--out"), strict=True)
    ]


def write_rows(path: Path, rows: list[Row]) -> None:
    replace_file(path, b"".join((_COLUMNS + b"\n", *(row.line() for row in rows))))


def apply(path: Path, source: ImageSource, key: str) -> str:
    """Fills in sizes and kinds of a source from a manifest; returns the exclusions in words, "" for none.

    A line counts for a file of its name and size in bytes. Raises `UserError`, for the config key `key`, where there is
    no manifest, or all images are excluded.
    """
    names, file_sizes, heights, widths, verdicts, kinds, _ = _columns(path, key)
    # A dtype of bytes, also where a scan has just begun and there is no line yet.
    verdicts, kinds = np.array(verdicts, "S"), np.array(kinds, "S5")
    # Earlier manifests call a PNG of 16 bits a colour plain.
    kinds[np.isin(verdicts, [name.encode() for name in DEEPER])] = _KINDS[ODD]
    rows = _rows_of(source.names, np.array(names, "S"))
    indices = np.flatnonzero(rows >= 0)
    indices = indices[np.array(file_sizes).astype(np.int64)[rows[indices]] == source.file_sizes[indices]]
    if not len(indices):
        if key == "data.manifest":
            raise UserError(
                f"{key}: {path} names none of the images under {source.root}; scan them again", "manifest-names-none"
            )
        return ""
    rows = rows[indices]
    missing = source.kinds[indices] == UNKNOWN
    sizes = np.array([heights, widths]).astype(np.int32).T if missing.any() else None
    for kind in (PLAIN, ODD):
        chosen = missing & (kinds[rows] == _KINDS[kind])
        if not chosen.any():
            continue
        source.learn(indices[chosen], sizes[rows[chosen]], kind)
    reasons = Counter()
    for name, verdict in VERDICTS.items():
        chosen = verdicts[rows] == name.encode()
        if verdict.kind is not None and chosen.any():
            source.mark(indices[chosen], verdict.kind)
            reasons[name] = int(chosen.sum())
    if not reasons:
        return ""
    if (source.kinds >= UNREADABLE).all():
        raise UserError(f"{key}: none of the images under {source.root} can be used, by {path}", "none-usable")
    text = ", ".join(f"{count:,} {name}" for name, count in reasons.items())
    return f"{reasons.total():,} of the {len(source):,} images under {source.root}, by {path}: {text}"


def _columns(path, key):
    try:
        head, _, data = path.read_bytes().partition(b"\n")
    except OSError as error:
        raise UserError(
            f"{key}: the manifest {path} cannot be read ({error.strerror}); python -m fastsiam.prepare scan writes one",
            "no-manifest",
        ) from None
    # The last line may be incomplete: a scan is writing it, or was killed.
    data = data[: data.rfind(b"\n") + 1]
    # One flat list: with a list a line a million lines take 10 s in place of 1, most of it garbage collection.
    fields = data.replace(b"\n", b"\t").split(b"\t")[:-1]
    columns = [fields[column::7] for column in range(7)]
    whole = head == _COLUMNS and data.count(b"\t") == 6 * data.count(b"\n")
    if not whole or set(columns[4]) - {name.encode() for name in VERDICTS} or set(columns[5]) - set(_KINDS.values()):
        raise _not_a_manifest(path, key)
    if b"\\" in data:
        columns[0] = [_name(name) for name in columns[0]]
    return columns


def _not_a_manifest(path, key):
    return UserError(
        f"{key}: {path} is not a manifest of python -m fastsiam.prepare scan; name another", "bad-manifest"
    )


def _rows_of(asked, names):
    """Returns the manifest's row of each of the source's names; -1 where there is none."""
    if np.array_equal(asked, names):
        return np.arange(len(names))
    first = {}
    for row, name in enumerate(names.tolist()):
        first.setdefault(name, row)
    return np.array([first.get(name, -1) for name in asked.tolist()], np.int64)


def _name(text):
    return re.sub(rb"\\(.)", lambda match: {b"t": b"\t", b"n": b"\n"}.get(match[1], match[1]), text)

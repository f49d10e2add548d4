"""Images in tar shards, in WebDataset's layout and in others.

Members of one key belong together, KEY.jpg and KEY.cls. WebDataset's key is a member's name up to the first dot of its
last part (webdataset's `base_plus_ext`). Other names have dots as well (`2019.07.jpg`). Therefore every member that is
an image counts, except fields of another image (`a.seg.png` beside `a.png`). Its label is that of the longest beginning
of its name that has one.
"""

import bz2
import gzip
import json
import lzma
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastsiam.data.sources import excluded, formats, labels
from fastsiam.data.sources.folder import is_outside
from fastsiam.data.sources.source import ImageSource, Packed, new_source
from fastsiam.data.sources.tables import LABEL_COLUMNS, json_text, shown, whole_number
from fastsiam.data.sources.walk import is_system
from fastsiam.errors import UserError

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
_TOOLS = {"gz": "gunzip -k", "bz2": "bunzip2 -k", "bz": "bunzip2 -k", "xz": "unxz -k", "zst": "unzstd"}
_OPENERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
# Errors of reading a shard that is damaged, or not a tar file.
DAMAGED = (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError)
# Largest label files in bytes, and .json members read without a label before the rest are skipped. _KINDS: of members
# without labels that a message names.
_KINDS = 3
_LABEL_BYTES, _JSON_BYTES, _JSONS = 4096, 1 << 20, 1000
_FIELD = re.compile(r"[a-z]", re.IGNORECASE)


class NoImagesError(UserError):
    """Whole tar files without an image."""


class _Image(NamedTuple):
    name: str
    size: int
    offset: int
    shard: int
    cls: str = ""
    json: dict[str, str] | None = None
    text: str | None = None


@dataclass
class _Found:
    """Images of the shards, in their order, and what is known of other members."""

    images: list[_Image] = field(default_factory=list)
    excluded: Counter = field(default_factory=Counter)
    beside: set[str] = field(default_factory=set)
    """Extensions of members beside images that are not read."""
    jsons: int = 0
    """Number of .json members read in a row without a label."""
    unread: str = ""
    """A .cls that is not a word, in words."""


def shards_of_folder(root: Path, folders: list[str]) -> list[str]:
    """Returns the tar files in `root`, sorted by name; those in `folders` below it where it has none itself."""
    here = _tars(root, "")
    return here or sorted(name for folder in folders if folder for name in _tars(root, folder))


def compressed_shards(root: Path) -> list[str]:
    """Returns names of the compressed tar files in `root` that are not beside their unpacked form."""
    names = sorted(path.name for path in root.iterdir() if not path.name.startswith("."))
    found = [(name, end) for name in names for end in COMPRESSED if name.lower().endswith(end)]
    return [name for name, end in found if name[: -len(end)] + ".tar" not in names]


def no_plain_shards(root: Path, compressed: list[str], key: str) -> UserError:
    """Returns the error of a folder that has compressed shards only."""
    name = compressed[0]
    tool = next(tool for end, tool in _TOOLS.items() if name.lower().endswith(end))
    return UserError(
        f"{key}: the tar shards in {shown(root)} are compressed ({shown(name, 30)}); make plain ones by python -m "
        f"fastsiam.prepare pack SRC OUT, or unpack them by {tool} *.{name.rpartition('.')[2]}",
        "compressed-shards",
    )


def source_of_shards(root: Path, shards: list[str], key: str, opener: Callable = open) -> ImageSource:
    """Returns the images of `shards`, in the order of the members; `key` is the config key that errors name.

    `opener`: `open`, or `open_shard` for compressed ones, whose offsets count decompressed bytes.
    """
    found = _Found()
    for number, name in enumerate(shards):
        _Reader(root / name, number, found, key, opener).read()
    if not found.images:
        what = excluded.in_words(found.excluded, 3) or "nothing"
        tars = "tar shard" if len(shards) == 1 else f"{len(shards):,} tar shards"
        raise NoImagesError(f"{key}: no images in the {tars} in {shown(root)}, but {what}", "no-images")
    names, sizes, offsets, numbers, cls, json_labels, texts = zip(*found.images, strict=True)
    labelling = (
        labels.by_cls(cls)
        or labels.by_json([known or {} for known in json_labels])
        or labels.by_folder([name.removeprefix("./") for name in names])
        or labels.by_text(texts)
        or labels.by_shard(shards, numbers)
        or labels.Labelling([-1] * len(names), (), found.unread or _why_none(found))
    )
    packed = Packed(tuple(shards), np.array(numbers, np.int32), np.array(offsets, np.int64))
    return new_source(
        root, list(zip(names, sizes, strict=True)), labelling, packed=packed, excluded=dict(found.excluded)
    )


def split_key(name: str) -> tuple[str, str]:
    """Splits a name into key and extension: `a.b/c.d.jpg` is ("a.b/c", "d.jpg")."""
    folder, slash, last = name.rpartition("/")
    key, _, extension = last.partition(".")
    return folder + slash + key, extension


def check_member(member: tarfile.TarInfo, shard: Path, key: str) -> None:
    """Raises `UserError` for links, devices, and paths that lead out of the archive."""
    if not member.issparse() and (member.isreg() or member.isdir()):
        return _check_name(member.name, shard, key)
    raise UserError(
        f"{key}: {shown(shard)} holds {shown(member.name)}, neither a plain file nor a folder; pack the files "
        "themselves under relative names",
        "not-a-file",
    )


def open_shard(path: Path, mode: str = "rb"):
    """Opens a shard's tar file, decompressing it where necessary; raises `OSError`."""
    return _opener_of(path)(path, mode)


def _opener_of(path):
    with open(path, "rb") as file:
        beginning = file.read(8)
    return next((opener for mark, opener in _OPENERS.items() if beginning.startswith(mark)), open)


def _tars(root, folder):
    below = f"{folder}/" if folder else ""
    paths = sorted((root / folder).iterdir())
    return [below + path.name for path in paths if path.suffix.lower() == ".tar" and not is_hidden(path.name)]


def is_hidden(name: str) -> bool:
    return name.startswith(".") or is_system(name)


def _check_name(name, shard, key):
    if is_outside(name) or ".." in name.split("/"):
        raise UserError(
            f"{key}: {shown(shard)} holds {shown(name)}, a path that leads out of the archive; pack the files "
            "themselves under relative names",
            "leads-outside",
        )


class _Reader:
    """Reader of one shard."""

    def __init__(self, path: Path, number: int, found: _Found, key: str, opener: Callable):
        self._path, self._number, self._found, self._key, self._open = path, number, found, key, opener
        self._images: dict[str, _Image] = {}
        self._texts: dict[str, dict] = {"cls": {}, "json": {}, "txt": {}}
        self._others: list[tuple[str, str]] = []

    def read(self) -> None:
        """Adds the shard's images and labels; raises `UserError` where it is not a whole tar file."""
        try:
            with self._open(self._path, "rb") as file:
                place = 0
                while place is not None:
                    file.seek(place)
                    with tarfile.TarFile(fileobj=file, mode="r") as tar:
                        for member in tar:
                            self._member(member, file)
                        place = _after_the_end(file, tar.offset)
        except DAMAGED as error:
            if self._open is open and _opener_of(self._path) is not open:
                cure = "it is compressed; add .gz to its name, and python -m fastsiam.prepare pack reads it"
                code = "compressed-shards"
            else:
                cure, code = f"{error}; copy or unpack it again", "damaged-shard"
            whole = "whole uncompressed" if self._open is open else "whole"
            raise UserError(f"{self._key}: {shown(self._path)} is not a {whole} tar file: {cure}", code) from error
        self._join()

    def _member(self, member, file):
        name = member.name
        _check_name(name, self._path, self._key)
        parts = name.removeprefix("./").split("/")
        stem, dot, extension = name.rpartition(".")
        extension = extension.lower()
        if member.isdir():
            return
        if any(map(is_system, parts)):
            self._found.excluded[excluded.SYSTEM] += 1
        elif not member.isreg() or member.issparse():
            if formats.is_image(name):
                self._found.excluded[excluded.NOT_PLAIN] += 1
        elif dot and extension in self._texts and "/" not in extension:
            self._label(stem, extension, member, file)
        else:
            reason = self._kind(name, member, file)
            if reason is formats.IMAGE:
                if self._images.pop(name, None):
                    self._found.excluded[excluded.REPLACED] += 1
                self._images[name] = _Image(name, member.size, member.offset_data, self._number)
            else:
                self._others.append((split_key(name)[0], reason))

    def _kind(self, name, member, file):
        """Returns IMAGE, or the reason to exclude a member."""
        extension = formats.extension_of(name)
        if extension == ".gz" and formats.is_image(name[:-3]):
            return excluded.GZIPPED
        known = formats.by_extension().get(extension)
        if known is None:
            file.seek(member.offset_data)
            known = formats.by_beginning(file.read(min(member.size, formats.BEGINNING)), extension)
        return known

    def _label(self, stem, extension, member, file):
        found = self._found
        most = _JSON_BYTES if extension == "json" else _LABEL_BYTES
        if extension == "json" and found.jsons >= _JSONS:
            return
        if member.size > most:
            if extension == "cls":
                found.unread = found.unread or f"{self._path.name} holds {shown(member.name)} of {member.size:,} bytes"
            return
        file.seek(member.offset_data)
        data = file.read(member.size)
        if extension == "json":
            known = _json_labels(data)
            found.jsons = 0 if known else found.jsons + 1
            self._texts["json"][stem] = known
            return
        try:
            value = whole_number(data.decode().strip())
        except UnicodeDecodeError:
            value = "\0"
        if extension == "cls" and (not value or "\0" in value or "\n" in value):
            found.unread = found.unread or f"{self._path.name} holds {shown(member.name)} with {data[:20]!r}"
            value = ""
        self._texts[extension][stem] = value

    def _join(self):
        """Joins labels to images, and excludes images that are fields of another."""
        found = self._found
        plain = {_stems(name)[0] for name in self._images}
        keys = set()
        for name, image in self._images.items():
            stems = _stems(name)
            stem, key = stems[0], stems[-1]
            keys.add(key)
            if key != stem and key in plain and _FIELD.match(stem[len(key) + 1 :]):
                found.excluded[excluded.FIELDS] += 1
                continue
            cls, known, text = (_first(self._texts[kind], stems) for kind in ("cls", "json", "txt"))
            found.images.append(image._replace(cls=cls or "", json=known, text=text))
        for key, reason in self._others:
            if key not in keys or excluded.is_missed(reason):
                found.excluded[reason] += 1
            elif len(found.beside) < _KINDS:
                found.beside.add(reason)


def _stems(name):
    """Returns a name without its extension, and its beginnings with fewer and fewer dots in the last part."""
    folder, slash, last = name.rpartition("/")
    stem = last.rpartition(".")[0] or last
    parts = stem.split(".")
    # A leading dot is not the end of a key.
    shorter = [".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1) if any(parts[:count])]
    return [folder + slash + part for part in (stem, *shorter)]


def _first(texts, stems):
    return next((texts[stem] for stem in stems if stem in texts), None) if texts else None


def _after_the_end(file, place):
    """Returns the offset of the next archive in joined tar files; None where there is none.

    tarfile takes an incomplete header for the end of the archive.
    """
    file.seek(place)
    block = file.read(tarfile.BLOCKSIZE)
    if block != tarfile.NUL * tarfile.BLOCKSIZE:
        raise tarfile.ReadError("it has no end")
    while block:
        if block.count(0) < len(block):
            begins = next(number for number, byte in enumerate(block) if byte) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
            return place + begins if _is_header(block[begins : begins + tarfile.BLOCKSIZE]) else None
        place += len(block)
        block = file.read(1 << 16)
    return None


def _is_header(block):
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _json_labels(data):
    try:
        fields = json.loads(data)
    except ValueError:
        return {}
    if not isinstance(fields, dict):
        # A bare number or word.
        return {"label": text} if (text := json_text(fields)) else {}
    fields = {str(name).lower(): value for name, value in fields.items()}
    return {name: text for name in LABEL_COLUMNS if name in fields and (text := json_text(fields[name]))}


def _why_none(found):
    if found.jsons:
        return "its .json members have no label, class, class_name, target or category that is a word or a number"
    return f"its {', '.join(sorted(found.beside))} members are not read for labels" if found.beside else ""

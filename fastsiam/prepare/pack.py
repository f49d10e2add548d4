"""Writer of the original bytes of a source into tar shards in WebDataset's layout, with an index that training opens.

OUT/shard-00000.tar, ... hold KEY.jpg and, where there are labels, KEY.cls with the class's number as text; keys are
unique and in the source's order. OUT/fastsiam-index/ is written at the end.
"""

import io
import os
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fastsiam.data.sources.image_header import UNREADABLE, BadImageError, read_header
from fastsiam.data.sources.index_cache import PACK_INCOMPLETE, PACK_INDEX, write_index
from fastsiam.data.sources.source import ImageSource, Packed
from fastsiam.data.sources.tar import split_key
from fastsiam.errors import UserError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def pack(
    source: ImageSource, out: Path, shard_bytes: int, progress: Callable[[int, int], None] = lambda done, total: None
) -> int:
    """Packs all images but those that a scan excludes; returns the number of shards.

    A shard is closed before the image that would make it larger than `shard_bytes`. Raises `UserError` where `out`
    holds something else, or a file cannot be read. An interrupted pack starts again.
    """
    _clear(out)
    kept = np.flatnonzero(source.kinds < UNREADABLE)
    out.mkdir(parents=True, exist_ok=True)
    (out / PACK_INCOMPLETE).touch()
    shards = _Shards(out, shard_bytes)
    members = _member_names(source.names[kept].tolist())
    file_sizes = np.empty(len(kept), np.int64)
    image_sizes, kinds = np.zeros((len(kept), 2), np.int32), np.zeros(len(kept), np.uint8)
    shard, offset = np.empty(len(kept), np.int32), np.empty(len(kept), np.int64)
    try:
        for row, (index, member) in enumerate(zip(kept.tolist(), members, strict=True)):
            data = source.read(index)
            label = int(source.labels[index])
            shard[row], offset[row] = shards.add(member, data, label if label >= 0 else None)
            file_sizes[row] = len(data)
            try:
                header = read_header(data)
                image_sizes[row], kinds[row] = header[:2], header.kind
            except BadImageError:
                kinds[row] = UNREADABLE
            progress(row + 1, len(kept))
    finally:
        shards.close()
    packed = Packed(tuple(shards.names), shard, offset)
    columns = source.names[kept], file_sizes, source.labels[kept], source.classes, image_sizes, kinds
    write_index(out / PACK_INDEX, ImageSource(out, *columns, packed, labelling=source.labelling), {})
    (out / PACK_INCOMPLETE).unlink()
    return len(shards.names)


def parse_size(text: str) -> int:
    """Returns the bytes of `500MB`, `1.5GB`, `1000000`: units of a thousand."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B?)", text.strip().upper())
    unit = None if match is None else match[2] if match[2] in _UNITS else match[2] + "B"
    if unit not in _UNITS or not float(match[1]) * _UNITS[unit] >= 1:
        raise UserError(f"--shard-size: {text} is not a size; write for example 500MB or 1GB", "bad-size")
    return int(float(match[1]) * _UNITS[unit])


class _Shards:
    """Writer of tar files of about a size; the same images give the same bytes."""

    def __init__(self, folder: Path, shard_bytes: int):
        self.names: list[str] = []
        self._folder, self._limit = folder, shard_bytes
        self._tar = self._file = None

    def add(self, member: str, data: bytes, label: int | None) -> tuple[int, int]:
        """Writes one image; returns the number of the shard and the offset of the data in it."""
        blocks = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        if self._tar is None or (self._file.tell() and self._file.tell() + blocks > self._limit):
            self._open_next()
        self._write(member, data)
        offset = self._file.tell() - blocks
        if label is not None:
            self._write(split_key(member)[0] + ".cls", str(label).encode())
        return len(self.names) - 1, offset

    def close(self) -> None:
        if self._tar is not None:
            self._tar.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._tar = None

    def _open_next(self):
        self.close()
        self.names.append(f"shard-{len(self.names):05d}.tar")
        self._file = open(self._folder / self.names[-1], "wb")  # noqa: SIM115
        self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.PAX_FORMAT, encoding="utf-8")

    def _write(self, name, data):
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))


def _member_names(names):
    """Returns names with unique keys; a dot in a file's stem would end its key."""
    taken = set()
    members = []
    for name in names:
        stem, suffix = os.path.splitext(os.path.normpath(os.fsdecode(name)))
        folder, slash, last = stem.rpartition("/")
        key = first = folder + slash + last.replace(".", "_")
        number = 2
        while key in taken:
            key = f"{first}_{number}"
            number += 1
        taken.add(key)
        members.append(key + suffix)
    return members


def _clear(out):
    """Deletes the files of an interrupted pack; raises `UserError` for everything else in `out`."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"OUT: {out} is a file; name a new folder", "exists")
    left = [path for path in out.iterdir() if path.name != PACK_INCOMPLETE]
    if left and not (out / PACK_INCOMPLETE).exists():
        raise UserError(f"OUT: {out} is not empty; name a new folder, or delete this one", "exists")
    strange = [path.name for path in left if not re.fullmatch(rf"shard-\d+\.tar|\.?{PACK_INDEX}.*", path.name)]
    if strange:
        raise UserError(f"OUT: {out} holds {strange[0]}, which is not part of a pack; name a new folder", "exists")
    for path in left:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()

"""Cache of the list of a folder's images, under ~/.cache/fastsiam/index (or $XDG_CACHE_HOME), for later starts.

It holds one memory-mapped array a column, and index.json with the state of the folder. The list is read from there
while every directory keeps its mtime and inode, and a sample of the files size and mtime.
"""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from fastsiam.data.sources import excluded, formats
from fastsiam.data.sources.annotations import label_folder, places
from fastsiam.data.sources.folder import is_outside, no_images
from fastsiam.data.sources.image_header import PLAIN, UNKNOWN, UNREADABLE
from fastsiam.data.sources.source import ImageSource, Packed, fingerprint, new_source
from fastsiam.data.sources.tar import (
    NoImagesError,
    compressed_shards,
    no_plain_shards,
    shards_of_folder,
    source_of_shards,
)
from fastsiam.data.sources.walk import Directory, Walk, is_still_closed
from fastsiam.errors import UserError
from fastsiam.runtime.cache_dirs import cache_root

# Names in a folder that `fastsiam.prepare pack` has written, or is writing.
PACK_INDEX, PACK_INCOMPLETE = "fastsiam-index", "fastsiam-pack.incomplete"

# The version changes where the same files would be listed, labelled or judged otherwise. A pack is not listed, so
# earlier versions are read.
_VERSION, _PACK_VERSIONS = 4, (1, 2, 4)
_SAMPLE = 1000
# A tar file made of the images beside it has about their size.
_OUTWEIGHS = 2
# A change in the same tick of the file system's clock as the listing is not visible; some count whole seconds.
_SETTLED_NS = 2_000_000_000


def cache_folder(location: Path) -> Path:
    """Folder for the index and the scan of a folder or list; it may not exist."""
    return cache_root() / "index" / hashlib.sha256(os.fsencode(location.resolve())).hexdigest()[:16]


def open_folder(root: Path, key: str) -> ImageSource:
    """Returns the images of a folder: files, tar shards, or a pack with its own index. `key`: the config key of errors.

    Lists the folder where the cache is empty or the folder has changed. Works without a cache that cannot be written.
    """
    if os.path.exists(root / PACK_INCOMPLETE):
        raise UserError(
            f"{key}: {root} was not packed to the end; run python -m fastsiam.prepare pack SRC {root} again",
            "pack-incomplete",
        )
    if os.path.isdir(root / PACK_INDEX):
        found = read_index(root / PACK_INDEX, root)
        if found is None:
            raise UserError(f"{key}: {root / PACK_INDEX} is damaged; pack the images again", "damaged-index")
        return found
    folder = cache_folder(root) / "index"
    found = read_index(folder, root, cached=True)
    if found is None:
        found, state = _list(root, key)
        changes = [directory.mtime_ns for directory in state["directories"]] + [
            mtime for *_, mtime in state["files"] + state["watched"]
        ]
        if max(changes) < state["listed_ns"] - _SETTLED_NS:
            with contextlib.suppress(OSError):
                # Another process may have written it in the meantime, and keeps it mapped.
                write_index(folder, found, state, lambda: read_index(folder, root, cached=True) is not None)
            found = read_index(folder, root, cached=True) or found
    return found


def write_index(folder: Path, source: ImageSource, state: dict, keep: Callable[[], bool] = lambda: False) -> None:
    """Writes beside `folder`, fsyncs, renames; raises `OSError` where that is not possible.

    Replaces an existing folder, unless `keep()`. Images that cannot be decoded are written as UNKNOWN, so that the next
    start reads them again.
    """
    columns = {name: getattr(source, name) for name in ("names", "file_sizes", "labels", "image_sizes")}
    columns["kinds"] = np.where(source.kinds < UNREADABLE, source.kinds, UNKNOWN).astype(np.uint8)
    if source.packed:
        columns |= {"shard": source.packed.shard, "offset": source.packed.offset}
    note = {
        "version": _VERSION,
        "fingerprint": fingerprint(source.names, source.file_sizes),
        "classes": source.classes,
        "shards": source.packed.shards if source.packed else None,
        "left_out": dict(source.excluded),
        "labelling": source.labelling,
        **state,
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name, column in columns.items():
            with open(temporary / f"{name}.npy", "wb") as file:
                np.save(file, column)
                _to_disk(file)
        with open(temporary / "index.json", "w", encoding="ascii") as file:
            json.dump(note, file)
            _to_disk(file)
        temporary.chmod(0o755)
        if folder.exists():
            if keep():
                return
            folder.rename(temporary / "before")
        temporary.rename(folder)
        shutil.rmtree(folder / "before", ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_index(folder: Path, root: Path, cached: bool = False) -> ImageSource | None:
    """Returns the index in `folder`, of images below `root`; None where there is none or it is damaged.

    `cached`: None also where `root` has changed; the arrays write to the files where that is permitted.
    """
    try:
        note = json.loads((folder / "index.json").read_text(encoding="ascii"))
        known = (_VERSION,) if cached else _PACK_VERSIONS
        if note["version"] not in known or (cached and not _is_unchanged(root, note)):
            return None
        load = {name: _load(folder / f"{name}.npy", "r") for name in ("names", "file_sizes", "labels")}
        packed = None
        # A pack may come from an untrusted place: only the names of its shards are paths, and they are checked.
        if not cached and not note["shards"]:
            return None
        if note["shards"] is not None:
            if any(is_outside(shard) for shard in note["shards"]):
                return None
            places = (_load(folder / f"{name}.npy", "r") for name in ("shard", "offset"))
            packed = Packed(tuple(note["shards"]), *places)
        more = {"classes": tuple(note["classes"]), "known_fingerprint": note["fingerprint"], "packed": packed}
        more |= {"excluded": note.get("left_out", {}), "labelling": note.get("labelling", "")}
        mode = "r+" if cached and os.access(folder / "kinds.npy", os.W_OK) else "c"
        image_sizes, cached_kinds = (_load(folder / f"{name}.npy", mode) for name in ("image_sizes", "kinds"))
        if len({len(column) for column in (*load.values(), image_sizes, cached_kinds)}) > 1:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    # A crash may have lost one of the two files.
    kinds = np.where((image_sizes > 0).all(1), cached_kinds, UNKNOWN).astype(np.uint8)
    if note["version"] == 1:
        # Version 1 calls PNGs of 16 bits a colour plain.
        kinds[(kinds == PLAIN) & np.char.endswith(np.char.lower(load["names"]), b".png")] = UNKNOWN
    more["cached_kinds"] = cached_kinds if mode == "r+" else None
    return ImageSource(root=root, **load, image_sizes=image_sizes, kinds=kinds, **more)


def _list(root, key):
    """Returns the files, and the state of the folder by which a change of it is detected."""
    listed_ns = time.time_ns()
    walk = Walk(root)
    found = list(walk)
    counts = +walk.excluded
    # Where there are none, no folder is listed twice.
    looked = [directory.name for directory in walk.directories] if counts[".tar"] or not found else []
    shards = shards_of_folder(root, looked)
    source = _of_shards(root, shards, found, key)
    watched = []
    if source is not None:
        names = shards
        counts[".tar"] -= len(names)
        counts[excluded.BESIDE] += len(found)
        compressed = compressed_shards(root)
        counts[excluded.COMPRESSED] += len(compressed)
        counts.subtract(formats.extension_of(name) for name in compressed)
    elif found:
        found.sort()
        source = new_source(root, found, label_folder(root, [name for name, _ in found]))
        watched = places(root)
        count = len(found)
        sample = np.random.default_rng(0).choice(count, min(count, _SAMPLE), replace=False)
        names = [os.fsdecode(bytes(name)) for name in source.names[np.sort(sample)]]
    else:
        compressed = compressed_shards(root)
        raise no_plain_shards(root, compressed, key) if compressed else no_images(root, key, counts)
    state = {
        "listed_ns": listed_ns,
        "directories": walk.directories,
        "files": [[name, *_size_and_mtime(root, name)] for name in names],
        "watched": [[name, *_size_and_mtime(root, name)] for name in watched],
        "closed": walk.closed,
        "decoders": formats.decoders(),
    }
    return replace(source, excluded=dict(+(counts + Counter(source.excluded)))), state


def _of_shards(root, shards, found, key):
    """Returns the images in tar shards; None without shards, and where the images beside them (`found`) are more."""
    if not shards or (found and not outweigh(root, shards, found)):
        return None
    try:
        source = source_of_shards(root, shards, key)
    except NoImagesError:
        if found:
            return None
        raise
    return source if len(source) > len(found) else None


def outweigh(root: Path, shards: list[str], found: list[tuple[str, int]]) -> bool:
    """True where tar files have so many bytes that the images beside them (names and sizes) may be strays."""
    most = _OUTWEIGHS * sum(size for _, size in found)
    return sum(_size_and_mtime(root, name)[0] for name in shards) > most


def _is_unchanged(root, state):
    if state["decoders"] != formats.decoders() or not all(is_still_closed(root, name) for name in state["closed"]):
        return False
    for directory in itertools.starmap(Directory, state["directories"]):
        status = os.stat(os.path.join(root, directory.name))
        if (status.st_mtime_ns, status.st_ino) != (directory.mtime_ns, directory.inode):
            return False
    known = state["files"] + state["watched"]
    return all(_size_and_mtime(root, name) == [size, mtime] for name, size, mtime in known)


def _size_and_mtime(root, name):
    """Returns size and mtime; [0, 0] where there is no such file."""
    try:
        status = os.stat(os.path.join(root, name))
    except OSError:
        return [0, 0]
    return [status.st_size, status.st_mtime_ns]


def _load(path, mode):
    """Returns a plain array over the file; every slice of a `np.memmap` would be one too."""
    return np.asarray(np.load(path, mmap_mode=mode, allow_pickle=False))


def _to_disk(file):
    file.flush()
    os.fsync(file.fileno())

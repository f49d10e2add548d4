"""The list of a folder's images, kept under ~/.cache/fastsiam/index (or $XDG_CACHE_HOME) for the next start.

One memory-mapped array a column, and index.json with the state of the folder that they were listed from. The list is
taken from there while every directory has the mtime and inode it had, and a sample of the files size and mtime.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastsiam.data.sources import excluded, formats
from fastsiam.data.sources.annotations import places
from fastsiam.data.sources.folder import Files, Packed, files_of_folder, fingerprint, is_outside, no_images
from fastsiam.data.sources.image_header import PLAIN, UNKNOWN, UNREADABLE
from fastsiam.data.sources.tar import (
    NoImagesError,
    compressed_shards,
    files_of_shards,
    no_plain_shards,
    shards_of_folder,
)
from fastsiam.data.sources.walk import Directory, Walk, is_still_closed
from fastsiam.errors import UserError
from fastsiam.runtime.cache_dirs import cache_root

# In a folder that `fastsiam.prepare pack` has written, or has begun to write.
PACK_INDEX, PACK_INCOMPLETE = "fastsiam-index", "fastsiam-pack.incomplete"

# Another number where the same files would be listed, labelled or judged otherwise. A pack is not listed: earlier
# ones are read as they are.
_VERSION, _PACK_VERSIONS = 4, (1, 2, 4)
_SAMPLE = 1000
# A tar file that somebody made of the images beside it weighs as much as they do.
_OUTWEIGHS = 2
# A change in the same tick of the file system's clock as the listing would go unseen: whole seconds on some.
_SETTLED_NS = 2_000_000_000


class Index(NamedTuple):
    """The files of a source, and what is known of their headers."""

    files: Files
    image_sizes: np.ndarray
    """[N, 2] int32 heights and widths, 0 where UNKNOWN; where it is cached, what is written here is kept."""
    kinds: np.ndarray
    """[N] uint8 of `fastsiam.data.sources.image_header`."""
    cached_kinds: np.ndarray | None
    """The same in the cache, where what was read of a header is written too; None where there is no cache."""
    fingerprint: str | None
    """None where nobody has computed it."""


def cache_folder(location: Path) -> Path:
    """Where the index of a folder or list is kept, and what a scan has found in it; need not exist."""
    return cache_root() / "index" / hashlib.sha256(os.fsencode(location.resolve())).hexdigest()[:16]


def open_folder(root: Path, key: str) -> Index:
    """The images of a folder: files, tar shards, or a pack with its own index. `key`: the config key of errors.

    Listed anew where the cache holds nothing or the folder has changed. A cache that cannot be written is done without.
    """
    if os.path.exists(root / PACK_INCOMPLETE):
        raise UserError(
            f"{key}: {root} was not packed to the end; run python -m fastsiam.prepare pack SRC {root} again"
        )
    if os.path.isdir(root / PACK_INDEX):
        found = read_index(root / PACK_INDEX, root)
        if found is None:
            raise UserError(f"{key}: {root / PACK_INDEX} is damaged; pack the images again")
        return found
    folder = cache_folder(root) / "index"
    found = read_index(folder, root, cached=True)
    if found is None:
        files, state = _list(root, key)
        found = unread(files)
        changes = [directory.mtime_ns for directory in state["directories"]] + [
            mtime for *_, mtime in state["files"] + state["watched"]
        ]
        if max(changes) < state["listed_ns"] - _SETTLED_NS:
            with contextlib.suppress(OSError):
                # Another start may have written it meanwhile, and has it mapped.
                write_index(folder, found, state, lambda: read_index(folder, root, cached=True) is not None)
            found = read_index(folder, root, cached=True) or found
    return found


def unread(files: Files) -> Index:
    """The index of files that nobody has looked at yet."""
    count = len(files.names)
    return Index(files, np.zeros((count, 2), np.int32), np.zeros(count, np.uint8), None, None)


def write_index(folder: Path, index: Index, state: dict, keep: Callable[[], bool] = lambda: False) -> None:
    """Write beside `folder`, fsync, rename; raises `OSError` where that is not possible.

    A folder that is there is replaced, unless `keep()`. What cannot be decoded is written as UNKNOWN: the next start
    looks again.
    """
    files = index.files
    columns = {"names": files.names, "file_sizes": files.file_sizes, "labels": files.labels}
    columns["image_sizes"] = index.image_sizes
    columns["kinds"] = np.where(index.kinds < UNREADABLE, index.kinds, UNKNOWN).astype(np.uint8)
    if files.packed:
        columns |= {"shard": files.packed.shard, "offset": files.packed.offset}
    note = {
        "version": _VERSION,
        "fingerprint": fingerprint(files.names, files.file_sizes),
        "classes": files.classes,
        "shards": files.packed.shards if files.packed else None,
        "left_out": dict(files.excluded),
        "labelling": files.labelling,
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


def read_index(folder: Path, root: Path, cached: bool = False) -> Index | None:
    """The index in `folder`, of images below `root`; None where there is none or it is damaged.

    `cached`: None also where `root` is no longer as it was; and what is written to the arrays is kept, if it can be.
    """
    try:
        note = json.loads((folder / "index.json").read_text(encoding="ascii"))
        known = (_VERSION,) if cached else _PACK_VERSIONS
        if note["version"] not in known or (cached and not _is_unchanged(root, note)):
            return None
        load = {name: _load(folder / f"{name}.npy", "r") for name in ("names", "file_sizes", "labels")}
        packed = None
        # A pack may come from anywhere: only the names of its shards are paths, and they are checked.
        if not cached and not note["shards"]:
            return None
        if note["shards"] is not None:
            if any(is_outside(shard) for shard in note["shards"]):
                return None
            places = (_load(folder / f"{name}.npy", "r") for name in ("shard", "offset"))
            packed = Packed(tuple(note["shards"]), *places)
        more = {"excluded": note.get("left_out", {}), "labelling": note.get("labelling", "")}
        files = Files(root=root, **load, classes=tuple(note["classes"]), packed=packed, **more)
        mode = "r+" if cached and os.access(folder / "kinds.npy", os.W_OK) else "c"
        image_sizes, cached_kinds = (_load(folder / f"{name}.npy", mode) for name in ("image_sizes", "kinds"))
        if {len(column) for column in (*load.values(), image_sizes, cached_kinds)} != {len(files.names)}:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    # A crash may have kept the one and lost the other.
    kinds = np.where((image_sizes > 0).all(1), cached_kinds, UNKNOWN).astype(np.uint8)
    if note["version"] == 1:
        # Called plain where they had 16 bits a colour, too.
        kinds[(kinds == PLAIN) & np.char.endswith(np.char.lower(files.names), b".png")] = UNKNOWN
    return Index(files, image_sizes, kinds, cached_kinds if mode == "r+" else None, note["fingerprint"])


def _list(root, key):
    """The files, and the state of the folder that tells whether they are still the same."""
    listed_ns = time.time_ns()
    walk = Walk(root)
    found = list(walk)
    passed_over = +walk.excluded
    # Where there are none, no folder is listed twice.
    looked = [directory.name for directory in walk.directories] if passed_over[".tar"] or not found else []
    shards = shards_of_folder(root, looked)
    files = _of_shards(root, shards, found, key)
    watched = []
    if files is not None:
        names = shards
        passed_over[".tar"] -= len(names)
        passed_over[excluded.BESIDE] += len(found)
        compressed = compressed_shards(root)
        passed_over[excluded.COMPRESSED] += len(compressed)
        passed_over.subtract(formats.extension_of(name) for name in compressed)
    elif found:
        files, watched = files_of_folder(root, found), places(root)
        count = len(found)
        sample = np.random.default_rng(0).choice(count, min(count, _SAMPLE), replace=False)
        names = [os.fsdecode(bytes(name)) for name in files.names[np.sort(sample)]]
    else:
        compressed = compressed_shards(root)
        raise no_plain_shards(root, compressed, key) if compressed else no_images(root, key, passed_over)
    state = {
        "listed_ns": listed_ns,
        "directories": walk.directories,
        "files": [],
        "watched": [[name, *_size_and_mtime(root, name)] for name in watched],
        "closed": walk.closed,
        "decoders": formats.decoders(),
    }
    for name in names:
        # A file may have gone since; whoever reads it says so.
        with contextlib.suppress(FileNotFoundError):
            state["files"].append(_file_state(root, name))
    return files._replace(excluded=dict(+(passed_over + Counter(files.excluded)))), state


def _of_shards(root, shards, found, key):
    """The images in tar shards; None without shards, and where images beside them (`found`) are more."""
    if not shards or (found and not outweigh(root, shards, found)):
        return None
    try:
        files = files_of_shards(root, shards, key)
    except NoImagesError:
        if found:
            return None
        raise
    return files if len(files.names) > len(found) else None


def outweigh(root: Path, shards: list[str], found: list[tuple[str, int]]) -> bool:
    """Whether tar files have so many bytes that the images beside them (names and sizes) may be strays."""
    most = _OUTWEIGHS * sum(size for _, size in found)
    return sum(_size_and_mtime(root, name)[0] for name in shards) > most


def _is_unchanged(root, state):
    if state["decoders"] != formats.decoders() or not all(is_still_closed(root, name) for name in state["closed"]):
        return False
    directories = (Directory(*directory) for directory in state["directories"])
    for directory in directories:
        status = os.stat(os.path.join(root, directory.name))
        if (status.st_mtime_ns, status.st_ino) != (directory.mtime_ns, directory.inode):
            return False
    if any(_size_and_mtime(root, name) != [size, mtime] for name, size, mtime in state["watched"]):
        return False
    return all(_file_state(root, name) == [name, size, mtime] for name, size, mtime in state["files"])


def _size_and_mtime(root, name):
    """[0, 0] where there is no such file."""
    try:
        status = os.stat(os.path.join(root, name))
    except OSError:
        return [0, 0]
    return [status.st_size, status.st_mtime_ns]


def _file_state(root, name):
    status = os.stat(os.path.join(root, name))
    return [name, status.st_size, status.st_mtime_ns]


def _load(path, mode):
    """A plain array over the file: a `np.memmap` would hand its subclass on to every slice."""
    return np.asarray(np.load(path, mmap_mode=mode, allow_pickle=False))


def _to_disk(file):
    file.flush()
    os.fsync(file.fileno())

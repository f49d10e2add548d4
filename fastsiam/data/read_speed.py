"""Speed at which a folder's files are read, past the page cache. Imports only the standard library."""

import contextlib
import os
import random
import re
import tarfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import NamedTuple

# Most files and seconds of listing, so that the sample is not only the first class of a million images.
_LISTED, _LISTING_SECONDS = 20_000, 3.0
_BLOCK = 1 << 20
# Names in mountinfo of file systems that another machine serves.
NETWORK = ("nfs", "nfs4", "cifs", "smb3", "lustre", "beegfs", "gpfs", "ceph", "glusterfs", "afs", "wekafs", "9p")


class ReadSpeed(NamedTuple):
    files: int
    """Number of files read to their end."""
    num_bytes: int
    seconds: float
    threads: int
    mean_image_bytes: float
    """Mean size of the files read, or of the members of a tar shard."""
    filesystem: str
    """Name in mountinfo: ext4, nfs4, fuse.sshfs, ..."""
    kind: str
    """images | shards | nothing"""


def measure(folder: str | Path, threads: int, seconds: float = 2.0) -> ReadSpeed:
    """Reads a random sample of the images (or tar shards) under a folder for up to `seconds`, as `read` does."""
    paths, kind = _sample(Path(folder))
    files, num_bytes, elapsed = read(paths, threads, seconds)
    if kind == "shards":
        mean = _mean_member(paths[0])
    else:
        mean = num_bytes / files if files else 0.0
    return ReadSpeed(files, num_bytes, elapsed, threads, mean, filesystem_of(folder), kind)


def read(paths: Iterable[str | Path], threads: int, seconds: float) -> tuple[int, int, float]:
    """Reads files for up to `seconds`, several at once, after asking the kernel to forget their pages.

    Returns the number of files read to their end, bytes, and seconds. Files that cannot be read are passed over.
    POSIX_FADV_DONTNEED leaves pages that other processes have mapped.
    """
    queue, lock = iter(paths), Lock()
    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        work = [pool.submit(_read_until, started + seconds, queue, lock) for _ in range(threads)]
        done = [future.result() for future in work]
    elapsed = time.perf_counter() - started
    return sum(files for files, _ in done), sum(num_bytes for _, num_bytes in done), elapsed


def filesystem_of(path: str | Path, mountinfo: str | None = None) -> str:
    """Returns the type of the file system of `path`, by proc(5)'s mountinfo; "unknown" where it is not listed."""
    if mountinfo is None:
        mountinfo = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    path, best, found = os.path.realpath(path), "", "unknown"
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        # Blanks and the like are written in octal.
        point = re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), left.split()[4])
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        # A later mount on the same point hides the earlier one.
        if inside and len(point) >= len(best):
            best, found = point, right.split()[0]
    return found


def is_network(filesystem: str) -> bool:
    """True where another machine serves it. FUSE stands for object stores and the like, except overlays."""
    fuse = filesystem.startswith("fuse.") and filesystem not in ("fuse.fuse-overlayfs", "fuse.lxcfs")
    return filesystem in NETWORK or fuse


def _sample(folder):
    from fastsiam.data.sources.index_cache import outweigh
    from fastsiam.data.sources.tar import shards_of_folder
    from fastsiam.data.sources.walk import Walk

    found, shards = [], []
    until = time.perf_counter() + _LISTING_SECONDS
    # A folder that may not be read gives an empty sample here; training refuses it.
    with contextlib.suppress(OSError):
        walk = Walk(folder)
        for image in walk:
            found.append(image)
            if len(found) >= _LISTED or time.perf_counter() > until:
                break
        looked = [directory.name for directory in walk.directories] if walk.excluded[".tar"] or not found else []
        names = shards_of_folder(folder, looked)
        if outweigh(folder, names, found):
            found, shards = [], [os.path.join(folder, name) for name in names]
    images = [os.path.join(folder, name) for name, _ in found]
    paths, kind = (images, "images") if images else (shards, "shards")
    random.Random(0).shuffle(paths)
    return paths, kind if paths else "nothing"


def _read_until(deadline: float, paths: Iterator[str], lock: Lock) -> tuple[int, int]:
    """Returns the numbers of files read to their end and of bytes."""
    files = num_bytes = 0
    while time.perf_counter() < deadline:
        with lock:
            path = next(paths, None)
        if path is None:
            break
        try:
            with open(path, "rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                while (block := file.read(_BLOCK)) and time.perf_counter() < deadline:
                    num_bytes += len(block)
        except OSError:
            # A scan of the data names files that cannot be read.
            continue
        files += not block
    return files, num_bytes


def _mean_member(shard: str) -> float:
    """Returns the mean size of the first images in a tar file."""
    from fastsiam.data.sources.formats import is_image

    sizes = []
    with tarfile.open(shard) as tar:
        for member in tar:
            if is_image(member.name):
                sizes.append(member.size)
            if len(sizes) == 200:
                break
    return sum(sizes) / len(sizes) if sizes else 0.0

"""Full disks and old files."""

import contextlib
import os
import resource
from pathlib import Path

LONG_AGO = 1_600_000_000


@contextlib.contextmanager
def largest_file(size):
    """No file of this process may grow beyond `size` bytes: the write that would, writes what fits and then fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def settle(root: Path) -> None:
    """Give everything below `root` an old mtime: what has just changed is not cached."""
    for path in [root, *root.rglob("*")]:
        os.utime(path, (LONG_AGO, LONG_AGO), follow_symlinks=False)

"""Folders of caches: below $XDG_CACHE_HOME or ~/.cache; below TMPDIR if HOME is missing or not writable."""

import atexit
import functools
import os
import shutil
import stat
import tempfile
from pathlib import Path


def cache_root() -> Path:
    """Returns $XDG_CACHE_HOME/fastsiam, or ~/.cache/fastsiam, or a folder of this user below TMPDIR.

    The last one is for containers without a HOME, or with one that cannot be written. The folder is not made here.
    """
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen) / "fastsiam"
    home = home_folder()
    if home is not None and can_hold(home / ".cache" / "fastsiam"):
        return home / ".cache" / "fastsiam"
    # Nothing can be read or written below a file: no cache is used.
    return temporary_root() or Path(os.devnull) / "fastsiam"


def home_folder() -> Path | None:
    """Returns the user's home folder; None where neither HOME nor the account data base names one."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def can_hold(folder: Path) -> bool:
    """Returns True where `folder` exists or can be made."""
    if folder.is_dir():
        return True
    while not os.path.lexists(folder):
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


@functools.cache
def temporary_root() -> Path | None:
    """Returns $TMPDIR/fastsiam-UID, made where absent; None where no temporary folder can be written.

    Compiled code is loaded from it. A folder of that name that others own or can write is therefore replaced by one of
    this process alone, which is removed when the process ends.
    """
    try:
        folder = Path(tempfile.gettempdir()) / f"fastsiam-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022:
            return folder
    except FileExistsError:
        pass
    except OSError:
        return None
    own = Path(tempfile.mkdtemp(prefix="fastsiam-"))
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    return own


def place_triton_cache() -> None:
    """Sets TRITON_CACHE_DIR where Triton cannot write its default, ~/.triton; call it before a kernel runs."""
    if "TRITON_CACHE_DIR" in os.environ or "TRITON_HOME" in os.environ:
        return
    home = home_folder()
    if (home is None or not can_hold(home / ".triton" / "cache")) and (root := temporary_root()):
        os.environ["TRITON_CACHE_DIR"] = str(root / "triton")

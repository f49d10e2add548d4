"""Where caches lie: below $XDG_CACHE_HOME or ~/.cache, and below TMPDIR where HOME is missing or cannot be written."""

import atexit
import functools
import os
import shutil
import stat
import tempfile
from pathlib import Path


def cache_root() -> Path:
    """$XDG_CACHE_HOME/fastsiam, or ~/.cache/fastsiam, or a folder of this user's below TMPDIR.

    The last one is for containers: no HOME, or one that cannot be written. Nothing is made here.
    """
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen) / "fastsiam"
    home = home_folder()
    if home is not None and can_hold(home / ".cache" / "fastsiam"):
        return home / ".cache" / "fastsiam"
    # Below a file nothing can be read or written: every cache is done without.
    return temporary_root() or Path(os.devnull) / "fastsiam"


def home_folder() -> Path | None:
    """The user's home folder; None where neither HOME nor the account data base names one."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def can_hold(folder: Path) -> bool:
    """True where `folder` exists, or can be made."""
    if folder.is_dir():
        return True
    while not os.path.lexists(folder):
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


@functools.cache
def temporary_root() -> Path | None:
    """$TMPDIR/fastsiam-UID, made where absent; None where no temporary folder can be written.

    Compiled code is loaded from it, so a folder of that name that others own or can write is not used: a folder of this
    process alone takes its place, and is removed at its end.
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
    """Set TRITON_CACHE_DIR where Triton could not write the default, ~/.triton; to be called before a kernel runs."""
    if "TRITON_CACHE_DIR" in os.environ or "TRITON_HOME" in os.environ:
        return
    home = home_folder()
    if (home is None or not can_hold(home / ".triton" / "cache")) and (root := temporary_root()):
        os.environ["TRITON_CACHE_DIR"] = str(root / "triton")

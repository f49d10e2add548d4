"""Caches where HOME is missing, or cannot be written, and where a stranger has made the folder below TMPDIR."""

import os
import shutil
import stat
import subprocess
import sys

import pytest

from fastsiam.runtime import cache_dirs
from tests.support.processes import REPOSITORY

# Root may write everywhere: it gives that up.
UNPRIVILEGED = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.getuid() == 0 else []
NO_ACCOUNT = """
import pwd
def missing(uid): raise KeyError(f"getpwuid(): uid not found: {uid}")
pwd.getpwuid = missing
"""
CROP = """
import os, numpy as np
from fastsiam.data.sources.index_cache import cache_folder
from fastsiam.runtime.cache_dirs import cache_root
from fastsiam.kernels import numba_cache
from fastsiam.kernels.crop_numba import crop_on_cpu
image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
crop = crop_on_cpu(np.array([image.ctypes.data]), np.array([[4, 4]]), np.array([[[0, 0, 4, 4]]]), 4)
assert (crop[0].numpy() == image).all()
print(cache_root(), os.environ.get("TRITON_CACHE_DIR"), numba_cache.NOTE, sep="\\n")
"""


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """No variable names a cache; TMPDIR is empty."""
    for name in ("XDG_CACHE_HOME", "TRITON_CACHE_DIR", "TRITON_HOME", "NUMBA_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    cache_dirs.temporary_root.cache_clear()
    yield tmp_path
    cache_dirs.temporary_root.cache_clear()


def test_home_is_preferred_and_tmpdir_is_next(nowhere, monkeypatch):
    monkeypatch.setenv("HOME", str(nowhere / "home"))
    assert cache_dirs.cache_root() == nowhere / "home/.cache/fastsiam"
    # Nothing can be made below it, by root neither.
    monkeypatch.setenv("HOME", "/proc/1")
    assert cache_dirs.cache_root() == nowhere / f"tmp/fastsiam-{os.getuid()}"
    cache_dirs.place_triton_cache()
    assert os.environ["TRITON_CACHE_DIR"] == str(cache_dirs.cache_root() / "triton")
    monkeypatch.setenv("XDG_CACHE_HOME", str(nowhere / "mine"))
    assert cache_dirs.cache_root() == nowhere / "mine/fastsiam"


@pytest.mark.parametrize("trap", ["writable by others", "a link", "a file"])
def test_a_folder_that_others_can_write_is_not_used(nowhere, trap):
    folder = nowhere / f"tmp/fastsiam-{os.getuid()}"
    if trap == "a link":
        (nowhere / "theirs").mkdir()
        folder.symlink_to(nowhere / "theirs")
    elif trap == "a file":
        folder.touch()
    else:
        folder.mkdir()
        folder.chmod(0o777)
    own = cache_dirs.temporary_root()
    assert own != folder
    assert own.parent == folder.parent
    assert stat.S_IMODE(own.stat().st_mode) == 0o700


def test_no_temporary_folder_at_all(nowhere, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "/proc/1")
    monkeypatch.setenv("HOME", "/proc/1")
    assert cache_dirs.temporary_root() is None
    with pytest.raises(OSError, match="Not a directory"):
        (cache_dirs.cache_root() / "index").mkdir(parents=True)


@pytest.mark.slow
@pytest.mark.parametrize("home", ["read-only", "absent"])
def test_kernels_compile_where_neither_the_package_nor_home_can_be_written(tmp_path, home):
    package, site = tmp_path / "app/fastsiam", tmp_path / "site"
    shutil.copytree(REPOSITORY / "fastsiam", package, ignore=shutil.ignore_patterns("__pycache__"))
    for folder, _, _ in os.walk(package):
        os.chmod(folder, 0o555)
    (tmp_path / "home").mkdir(mode=0o555)
    (tmp_path / "tmp").mkdir()
    site.mkdir()
    (site / "sitecustomize.py").write_text(NO_ACCOUNT if home == "absent" else "")
    kept = {"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path / "tmp"), "PYTHONDONTWRITEBYTECODE": "1"}
    kept["PYTHONPATH"] = f"{site}:{tmp_path / 'app'}"
    if home == "read-only":
        kept["HOME"] = str(tmp_path / "home")
    done = subprocess.run(
        [*UNPRIVILEGED, sys.executable, "-c", CROP], cwd=tmp_path, env=kept, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    root = tmp_path / f"tmp/fastsiam-{os.getuid()}"
    place, triton, note = done.stdout.splitlines()
    assert (place, triton) == (str(root), str(root / "triton"))
    assert str(root / "numba") in note
    assert list((root / "numba").rglob("*.nbi"))
    assert not (tmp_path / "~").exists()

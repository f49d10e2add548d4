"""Commit of the code beside this file: from git, or in a copy without `.git` from the file COMMIT in its root.

COMMIT is what `{ git rev-parse HEAD; git ls-tree -r HEAD; } > COMMIT` writes in a checkout: the commit and the hash of
each of its files, so that a copy can tell by itself whether it still is that commit.
"""

import hashlib
import os
import subprocess
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
COMMIT = "COMMIT"

# Result files are what a run writes while it measures; they change nothing that is measured.
_NOT_CODE = "benchmarks/results"
# Of such files one that the commit does not have would be imported or read.
_CODE = (".py", ".yaml", ".toml", ".sh")
_LINK = "120000"


def checkout_state(folder: Path) -> dict:
    """`{"commit", "dirty"}` of the tree in `folder`.

    commit: 40 hex digits; dirty: whether a tracked file differs from it, or one that is not tracked is not ignored
    (without git: is code in a folder of the commit's); files in benchmarks/results do not count. Both are None where
    neither git nor COMMIT tells.
    """
    if (folder / ".git").exists():
        try:
            changed = _git(folder, "status", "--porcelain", "--", ".", f":(exclude){_NOT_CODE}")
            return {"commit": _git(folder, "rev-parse", "HEAD").strip(), "dirty": bool(changed.strip())}
        except (OSError, subprocess.CalledProcessError):
            # No git here, or it does not trust the owner of the folder.
            pass
    try:
        commit, *tracked = (folder / COMMIT).read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, ValueError):
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": _differs(folder, tracked)}


def _differs(folder: Path, tracked: list[str]) -> bool:
    """`tracked`: lines of git ls-tree, "MODE blob HASH<tab>PATH"."""
    known = {}
    for line in tracked:
        what, path = line.split("\t", 1)
        mode, _, digest = what.split()
        known[path] = mode, digest
    if any(not _is_there(folder / path, *of) for path, of in known.items() if not path.startswith(_NOT_CODE)):
        return True
    folders = {path.partition("/")[0] for path in known if "/" in path}
    found = {path.relative_to(folder).as_posix() for name in folders for path in _code_in(folder / name)}
    return any(path not in known for path in found if not path.startswith(_NOT_CODE))


def _is_there(path: Path, mode: str, digest: str) -> bool:
    try:
        data = os.readlink(path).encode() if mode == _LINK else path.read_bytes()
    except OSError:
        return False
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == digest


def _code_in(folder: Path):
    for root, _, names in os.walk(folder):
        yield from (Path(root) / name for name in names if name.endswith(_CODE))


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout

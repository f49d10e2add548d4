"""State of a run folder as another process sees it: is it one, has its run ended. Changes nothing and takes no lock."""

import os
import socket
from pathlib import Path

import psutil

from fastsiam.errors import UserError
from fastsiam.run.folder import read_status

# A process that takes the number of an ended one began after its status was written; file systems round times.
_CLOCK_SECONDS = 2.0


def has_begun(folder: Path) -> bool:
    """True where a run has written its config or its log."""
    return (folder / "config.yaml").is_file() or (folder / "metrics.jsonl").is_file()


def check_is_run(folder: Path) -> None:
    """Raises `UserError` where `folder` is not the folder of a run."""
    if not folder.is_dir():
        raise UserError(
            f"RUN: {folder} is not a folder; give a run folder, for example runs/quickstart", "no-run-folder"
        )
    if not has_begun(folder):
        inside = sorted(entry.parent.name for entry in folder.glob("*/config.yaml"))
        cure = f"give a run folder in it, for example {folder / inside[0]}" if inside else "give a run folder"
        raise UserError(f"RUN: {folder} has neither config.yaml nor metrics.jsonl; {cure}", "not-a-run")


def check_may_begin(folder: Path) -> None:
    """As `check_is_run`, for a command that waits for the run: a folder that is empty or does not exist yet will do.

    The folder above it must exist, so that a mistaken path is refused.
    """
    waits = folder.parent.is_dir() if not folder.exists() else folder.is_dir() and not any(folder.glob("*/config.yaml"))
    if not waits:
        check_is_run(folder)


def ending(folder: Path) -> str | None:
    """How the run of a folder has ended: `done`, `collapsed`, `failed`, `preempted`, or `killed` where its status is
    `running` and its process has gone. None while it runs, before it has begun, and for one on another machine.
    """
    status = read_status(folder)
    said = status.get("status")
    if said != "running":
        return said
    return "killed" if _process_has_gone(folder, status) else None


def _process_has_gone(folder, status):
    pid, host = status.get("pid"), status.get("host", socket.gethostname())
    if not isinstance(pid, int) or host != socket.gethostname():
        return False
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return True
        return process.create_time() > os.stat(folder / "status.json").st_mtime + _CLOCK_SECONDS
    except psutil.NoSuchProcess:
        return True
    except (psutil.Error, OSError):
        return False

"""The report that a run writes at its end, by a process of its own: nothing that happens there reaches the run."""

import os
import subprocess
import sys
from pathlib import Path

# Seconds; a page takes 4 on a busy core.
PATIENCE = 120.0


def write_own_report(folder: Path) -> tuple[str, str | None]:
    """Write `folder`/report.html; returns a line that says where it is, or why there is none, and its style."""
    command = [sys.executable, "-m", "fastsiam.report", str(folder)]
    # This process may have been told of the package by sys.path alone.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"warning: the report could not be written ({error})", "yellow"
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
        return f"warning: the report could not be written ({said[-1].removeprefix('fastsiam: ')})", "yellow"
    return done.stdout.decode(errors="replace").strip().splitlines()[-1], None

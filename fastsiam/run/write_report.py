"""Report of a run at its end, written by a process of its own: no failure there reaches the run."""

import os
import subprocess
import sys
from pathlib import Path

# Seconds; a page takes 4 on a busy core.
PATIENCE = 120.0


def write_own_report(folder: Path) -> tuple[str, str | None]:
    """Writes `folder`/report.html; returns a line for the console with its path or the reason, and the line's style."""
    command = [sys.executable, "-m", "fastsiam.report", str(folder)]
    # The package may be on sys.path alone, which a process does not inherit.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"warning: the report was not written ({error})", "yellow"
    if done.returncode:
        last = (done.stderr.decode(errors="replace").splitlines() or [f"exit code {done.returncode}"])[-1]
        return f"warning: the report was not written ({last.removeprefix('fastsiam: ')})", "yellow"
    return done.stdout.decode(errors="replace").splitlines()[-1], None

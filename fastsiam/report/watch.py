"""Page of a running run, rewritten while its log grows."""

import time
from collections.abc import Callable
from pathlib import Path

from fastsiam.run.reading import ending, has_begun


def watch(folder: Path, seconds: float, write: Callable[[bool], None], say: Callable[[str], None]) -> str:
    """Calls `write(is_running)` for a run until it has ended, at most every `seconds`, and only for new lines.

    Waits for a run that has not begun. Returns how the run has ended, as `ending` does.
    """
    written = None
    if not has_begun(folder):
        say(f"waiting   for the run in {folder} to begin")
    while True:
        # Before the log is read: what was written until the end is in the last page.
        ended = ending(folder)
        if has_begun(folder):
            state = _state(folder)
            # The last page is written in any case: it no longer reloads itself.
            if state != written or ended:
                write(ended is None)
                written = state
        if ended:
            return ended
        time.sleep(seconds)


def _state(folder):
    """Size and time of metrics.jsonl; None where there is none."""
    try:
        found = (folder / "metrics.jsonl").stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns

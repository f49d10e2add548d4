"""Progress line: painted at once, then after the first step and by time."""

import os
import time
from collections.abc import Callable

from rich.console import Console
from rich.live import Live
from rich.text import Text

# Seconds from one line to the next: in a terminal, which has one live line, and in a file or pipe, which has them all.
LIVE_EVERY, PLAIN_EVERY = 2.0, 60.0
SHOW_CURSOR = b"\x1b[?25h"


class ProgressLine:
    """One live line in a terminal (wrapped where it is narrow), a plain line from time to time elsewhere."""

    def __init__(self, console: Console, doing: str, clock: Callable[[], float] = time.perf_counter):
        """`doing`: text that a terminal shows before the first numbers."""
        self._console, self._clock = console, clock
        self._every = LIVE_EVERY if console.is_terminal else PLAIN_EVERY
        self._first: tuple[float, float] | None = None
        self._shown_at: float | None = None
        self._live = None
        if console.is_terminal:
            self._live = Live(Text(doing), console=console, transient=True, auto_refresh=False)
            self._live.start(refresh=True)

    def is_due(self) -> bool:
        """True where numbers should be shown now: the first ones at once, the next after some seconds."""
        return self._shown_at is None or self._clock() - self._shown_at >= self._every

    def doing(self, text: str) -> None:
        """Show the work in progress, in a terminal."""
        if self._live:
            self._live.update(Text(text), refresh=True)

    def show(self, share: float, text: str) -> None:
        """`share`: of the run, done by now. The time left is shown from the second line on: the first step compiles,
        opens files and fills buffers.
        """
        self._shown_at = self._clock()
        if self._first is None:
            self._first = share, self._shown_at
        elif share > self._first[0]:
            each = (self._shown_at - self._first[1]) / (share - self._first[0])
            text += f"  ETA {duration(each * (1 - share))}"
        if self._live:
            self._live.update(Text(text), refresh=True)
        else:
            self._console.print(text, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self._live:
            self._live.stop()

    def give_back_cursor(self) -> None:
        """Show the cursor, which the live line hides; called by another thread before an end without unwinding."""
        if self._live:
            os.write(self._console.file.fileno(), SHOW_CURSOR + b"\n")


def duration(seconds: float) -> str:
    seconds = round(seconds)
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return f"{hours}:{minutes:02}:{seconds % 60:02}" if hours else f"{minutes}:{seconds % 60:02}"

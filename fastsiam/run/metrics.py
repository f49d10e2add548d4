"""Console and metrics.jsonl of a run. The first rank prints and writes; the others keep silent."""

from collections.abc import Callable

from rich.console import Console

from fastsiam.errors import Notice
from fastsiam.run.progress_line import ProgressLine
from fastsiam.runtime.distributed import World


class Journal:
    """Console, progress line and lines of metrics.jsonl, which are kept until the run folder is open."""

    def __init__(self, world: World):
        self.console = Console(quiet=not world.is_first)
        self._is_first = world.is_first
        self._write: Callable[[dict], None] | None = None
        self._where: Callable[[], dict] | None = None
        self._progress: ProgressLine | None = None
        self._early: list[tuple[str, bool, dict]] = []
        self._warned: set[str] = set()

    def say(self, text: str, style: str | None = None) -> None:
        self.console.print(text, style=style, highlight=False, soft_wrap=True, markup=False)

    def warn(self, notice: str) -> None:
        """Print a warning, and write it to metrics.jsonl once there is one."""
        self.say(f"warning: {notice}", "yellow")
        code = {"code": notice.code} if isinstance(notice, Notice) else {}
        fields = {"message": str(notice), **code}
        if self._progress is None:
            self._early.append(("warning", True, fields))
        else:
            self.write("warning", **fields)

    def warn_once(self, notice: str) -> None:
        """`warn`, unless this process has printed it before."""
        if notice not in self._warned:
            self._warned.add(notice)
            self.warn(notice)

    def attach(self, write: Callable[[dict], None], where: Callable[[], dict]) -> None:
        """Write lines from now on, through `write(line)`; `where()` gives the position of the run."""
        self._write, self._where = write, where

    def begin_progress(self, doing: str) -> None:
        """Write the lines kept so far, and show `doing` until there are numbers."""
        self._progress = ProgressLine(self.console, doing)
        early, self._early = self._early, []
        for kind, fully, fields in early:
            (self.write if fully else self.write_at_step)(kind, **fields)

    def write(self, kind: str, **fields) -> None:
        """A line of metrics.jsonl with the position of the run, see `lines`."""
        self._put(kind, True, fields)

    def write_at_step(self, kind: str, **fields) -> None:
        """A line of metrics.jsonl with the step alone."""
        self._put(kind, False, fields)

    def progress_is_due(self) -> bool:
        """True when the next line on the screen is due, by the clock of this rank."""
        return self._progress.is_due()

    def progress(self, share: float, text: str) -> None:
        self._progress.show(share, text)

    def doing(self, text: str) -> None:
        """Show in a terminal the work that goes on between two numbers."""
        self._progress.doing(text)

    def give_back_cursor(self) -> None:
        """Before the process ends without unwinding."""
        if self._progress:
            self._progress.give_back_cursor()

    def close(self) -> None:
        if self._progress:
            self._progress.close()

    def _put(self, kind, fully, fields):
        if self._write is None:
            self._early.append((kind, fully, fields))
        elif self._is_first:
            where = self._where()
            self._write({"kind": kind, **(where if fully else {"step": where["step"]}), **fields})

"""What a run says and writes down. The first rank does; the others keep silent."""

from rich.console import Console

from fastsiam.run.folder import RunFolder
from fastsiam.run.progress_line import ProgressLine
from fastsiam.runtime.distributed import World
from fastsiam.training.state import State, Stopwatch


class Journal:
    """Console, metrics.jsonl and progress line of a run."""

    def __init__(self, folder: RunFolder, world: World, state: State, clock: Stopwatch):
        self.console = Console(quiet=not world.is_first)
        self.folder, self.state, self.clock = folder, state, clock
        self._writes = world.is_first
        self._progress: ProgressLine | None = None
        self._early: list[str] = []
        self._told: set[str] = set()

    def say(self, text: str, style: str | None = None) -> None:
        self.console.print(text, style=style, highlight=False, soft_wrap=True, markup=False)

    def warn(self, sentence: str) -> None:
        """Said now, and in metrics.jsonl, once there is one."""
        self.say(f"warning: {sentence}", "yellow")
        if self._progress is None:
            self._early.append(sentence)
        else:
            self.write("warning", message=sentence)

    def warn_once(self, sentence: str) -> None:
        """Unless it has been said by this process."""
        if sentence not in self._told:
            self._told.add(sentence)
            self.warn(sentence)

    def write(self, kind: str, **fields) -> None:
        """A line of metrics.jsonl with where the run is."""
        self.clock.update_state()
        state = self.state
        where = {
            "step": state.step,
            "epoch": state.epoch,
            "images_seen": state.images_seen,
            "train_seconds": state.train_seconds,
            "wall_seconds": state.wall_seconds,
        }
        self.write_plain({"kind": kind, **where, **fields})

    def write_plain(self, line: dict) -> None:
        """A line of metrics.jsonl as it is."""
        if self._writes:
            self.folder.write(line)

    def set_status(self, status: str, **details) -> None:
        if self._writes:
            self.folder.set_status(status, **details)

    def begin_progress(self, doing: str) -> None:
        """The folder has been entered: from now on warnings are written, too, those of before first. `doing` is shown
        until there are numbers.
        """
        self._progress = ProgressLine(self.console, doing)
        for sentence in self._early:
            self.write("warning", message=sentence)

    def progress_is_due(self) -> bool:
        """By the clock of this rank."""
        return self._progress.is_due()

    def progress(self, share: float, text: str) -> None:
        self._progress.show(share, text)

    def doing(self, text: str) -> None:
        """What goes on between the numbers, for who watches a terminal."""
        self._progress.doing(text)

    def give_back_cursor(self) -> None:
        """Before the process ends without unwinding."""
        if self._progress:
            self._progress.give_back_cursor()

    def close(self) -> None:
        if self._progress:
            self._progress.close()

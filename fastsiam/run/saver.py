"""When a run writes its checkpoints, and what becomes of one that cannot be written."""

import time
from collections.abc import Callable
from pathlib import Path

from fastsiam.config import CheckpointConfig
from fastsiam.run import checkpoint
from fastsiam.run.metrics import Journal
from fastsiam.runtime.distributed import World
from fastsiam.training.progress import Pace

# Seconds; torchrun kills 30 after it has passed a signal on, which an evaluation may outlast.
SAVED_LONG_AGO = 30.0


class Saver:
    """All ranks call its methods together; the first one's clock decides, and it writes."""

    def __init__(
        self,
        folder: Path,
        settings: CheckpointConfig,
        contents: Callable[[], dict],
        journal: Journal,
        pace: Pace,
        world: World,
    ):
        """`contents()` is what a checkpoint holds."""
        self._folder, self._settings, self._contents = folder, settings, contents
        self._journal, self._pace, self._world = journal, pace, world
        self._saved_at = time.perf_counter()
        self._saved_step: int | None = None

    def is_due(self) -> bool:
        """By the clock of this rank."""
        return time.perf_counter() - self._saved_at >= self._settings.every_seconds

    def save(self) -> None:
        """Raises `SaveError` where a checkpoint cannot be written."""
        self._saved_at, self._saved_step = time.perf_counter(), self._journal.state.step
        if self._world.is_first:
            with self._pace.saving():
                checkpoint.save(self._folder, self._contents(), self._settings.keep)

    def save_on_the_way(self) -> None:
        """Warns where a checkpoint cannot be written."""
        try:
            self.save()
        except checkpoint.SaveError as error:
            self._journal.warn(f"at step {self._journal.state.step:,}: {error}")

    def save_unless_recent(self, seconds: float = SAVED_LONG_AGO) -> None:
        """Before what may take long: where the last checkpoint is older, and of another step."""
        if time.perf_counter() - self._saved_at > seconds and self._saved_step != self._journal.state.step:
            self.save_on_the_way()

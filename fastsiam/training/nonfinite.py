"""Whether the numbers of a run are still numbers, looked at where somebody reads the device anyway."""

from collections import deque

import numpy as np
import torch

from fastsiam.data.sources.source import ImageSource
from fastsiam.run.folder import RunFolder
from fastsiam.runtime.distributed import World
from fastsiam.training.step import Reading, TrainingStep


class Soundness:
    """Remembers the images of the steps since the last look; all ranks look at the same steps."""

    def __init__(self, step: TrainingStep, source: ImageSource | None, folder: RunFolder, world: World):
        self._step, self._source, self._folder, self._world = step, source, folder, world
        self._recent: deque[tuple[int, np.ndarray]] = deque()
        self.reading: Reading | None = None
        """Of the last look."""
        self.reason: str | None = None
        """What went wrong."""

    def remember(self, number: int, indices: np.ndarray) -> None:
        self._recent.append((number, indices))

    def look(self, loss: torch.Tensor) -> bool:
        """Waits for the device; False where the loss of a step since the last look was not finite."""
        self.reading = self._step.read(loss)
        if self.reading.first_bad_step is not None:
            self._write_down_batch(self.reading.first_bad_step)
        self._recent.clear()
        return self.reason is None

    def _write_down_batch(self, first):
        """The files of the first step whose loss was not finite, of the ranks where it was not."""
        mine = next((indices for number, indices in self._recent if number == first), ())
        names = [self._source.name(index) for index in mine] if self._source and self.reading.guilty else []
        names_by_rank = self._world.collect(names)
        path = self._folder.path / "nonfinite.txt"
        if self._world.is_first:
            self._folder.write_batch(path, first, names_by_rank)
        self.reason = (
            f"the loss of step {first:,} is not finite; {path} names the images of that step, and the checkpoint "
            "before it stays; lower optimizer.base_lr, add optimizer.warmup, or set train.precision=fp32"
        )

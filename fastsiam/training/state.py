"""Where a run is, and where its time goes."""

import time
from dataclasses import dataclass

from fastsiam.training.data_wait import DataWait, OnHost


@dataclass
class State:
    """Where a run is; a checkpoint holds it."""

    step: int = 0
    epoch: int = 0
    cursor: int = 0
    """Images of this epoch that finished steps have consumed, over all processes."""
    images_seen: int = 0
    progress: float = 0.0
    """The share of the budget that is spent; every schedule is a function of it."""
    epoch_progress: float = 0.0
    """Progress when this epoch began."""
    train_seconds: float = 0.0
    """Spent waiting for data and stepping; evaluation and saving not counted."""
    wall_seconds: float = 0.0
    evaluation_cost: float | None = None
    """What the last kNN took, in the unit of the budget, where that is time or energy."""
    untrained_knn: float | None = None
    raw_pixels_knn: float | None = None

    def advance(self, batch_size: int) -> None:
        self.step += 1
        self.cursor += batch_size
        self.images_seen += batch_size

    def next_epoch(self) -> None:
        self.epoch += 1
        self.cursor = 0
        self.epoch_progress = self.progress


class Stopwatch:
    """Seconds since the last `split`, added up by name; tells a state how long its run has taken so far.

    `wait` is the time that the device stood still for want of a batch; what else of the host's waiting there is on a
    GPU passes while it does a step, and is part of `step`.
    """

    def __init__(self, state: State, data_wait: DataWait | None = None):
        """`data_wait`: that of the device; None: a CPU's."""
        self.totals = {"wait": 0.0, "step": 0.0, "other": 0.0}
        self._last = self._began = time.perf_counter()
        self._data_wait = data_wait or OnHost()
        self._state, self._wall_before, self._train_before = state, state.wall_seconds, state.train_seconds

    def split(self, name: str) -> None:
        """What has passed since the last split was `wait`, at whose end a batch is here, `step` or `other`."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        if name == "wait":
            self._data_wait.arrived(seconds)
            self.totals["step"] += seconds
            self._settle()
        else:
            self.totals[name] += seconds
        if name == "step":
            self._data_wait.launched()

    def so_far(self) -> tuple[float, float]:
        """Seconds of waiting and of stepping."""
        self._settle()
        return self.totals["wait"], self.totals["step"]

    def update_state(self) -> None:
        """Bring the seconds of the state up to now, earlier starts included."""
        self._state.wall_seconds = self._wall_before + time.perf_counter() - self._began
        self._state.train_seconds = self._train_before + self.totals["wait"] + self.totals["step"]

    def _settle(self):
        waited = self._data_wait.seconds()
        self.totals["wait"] += waited
        self.totals["step"] -= waited

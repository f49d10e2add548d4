"""Time of a run: seconds by what they were spent on, and rates between two lines of a log."""

import time
from dataclasses import dataclass

from fastsiam.training.cost import CostMeter
from fastsiam.training.data_wait import OnDevice, OnHost
from fastsiam.training.state import State


class Stopwatch:
    """Seconds since the last `split`, added up by name; keeps the seconds of a state up to date.

    `wait` is the time that the device stood still for want of a batch. On a GPU the host's other waiting passes during
    a step, and is part of `step`.
    """

    def __init__(self, state: State, data_wait: OnHost | OnDevice | None = None, began: float | None = None):
        """`data_wait`: that of the device; None: a CPU's. `began`: start of the wall clock, by `time.perf_counter`."""
        self.totals = {"wait": 0.0, "step": 0.0, "other": 0.0}
        self._last = time.perf_counter()
        self._began = self._last if began is None else began
        self._data_wait = data_wait or OnHost()
        self._state, self._wall_before, self._train_before = state, state.wall_seconds, state.train_seconds

    def split(self, name: str) -> None:
        """Name the time since the last split: `wait`, at whose end a batch is here, `step` or `other`."""
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


@dataclass(frozen=True)
class Lap:
    """Images, seconds and energy between two lines of a log or on the screen."""

    images: int
    waited: float
    """Seconds of waiting for data."""
    stepped: float
    """Seconds of training steps."""
    joules_per_image: float | None
    """None where energy is not known."""

    @property
    def images_per_second(self) -> float:
        return self.images / self._seconds

    @property
    def wait_fraction(self) -> float:
        return self.waited / self._seconds

    @property
    def _seconds(self):
        return max(self.waited + self.stepped, 1e-9)


class Laps:
    """Successive laps of a run, the first of which starts now."""

    def __init__(self, state: State, clock: Stopwatch, cost: CostMeter):
        self._state, self._clock, self._cost = state, clock, cost
        self._before = self._now()

    def next(self) -> Lap:
        """Finish a lap, with the energy as of the last `CostMeter.read_energy`."""
        before, self._before = self._before, self._now()
        images, waited, stepped = (now - then for now, then in zip(self._before[:3], before[:3], strict=True))
        joules, joules_before = self._before[3], before[3]
        known = images and None not in (joules, joules_before)
        return Lap(images, waited, stepped, (joules - joules_before) / images if known else None)

    def _now(self):
        return self._state.images_seen, *self._clock.so_far(), self._cost.joules

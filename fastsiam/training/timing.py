"""From one line to the next, of a log or on a screen: the images, the seconds and the energy in between."""

from dataclasses import dataclass

from fastsiam.training.cost import Spent
from fastsiam.training.state import State, Stopwatch


@dataclass(frozen=True)
class Lap:
    """What lies between two lines."""

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
    """The first one begins now."""

    def __init__(self, state: State, clock: Stopwatch, spent: Spent):
        self._state, self._clock, self._spent = state, clock, spent
        self._before = self._now()

    def next(self) -> Lap:
        """What has been since the last call."""
        before, self._before = self._before, self._now()
        images, waited, stepped = (now - then for now, then in zip(self._before[:3], before[:3], strict=True))
        joules, joules_before = self._before[3], before[3]
        known = images and None not in (joules, joules_before)
        return Lap(images, waited, stepped, (joules - joules_before) / images if known else None)

    def _now(self):
        return self._state.images_seen, *self._clock.so_far(), self._spent.joules

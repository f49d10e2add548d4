"""From one log line to the next: the images, the seconds and the energy in between."""

from dataclasses import dataclass

from fastsiam.spent import Spent
from fastsiam.state import State, Stopwatch


@dataclass(frozen=True)
class Lap:
    """What lies between two log lines."""

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
        self._images = state.images_seen
        self.next()

    def next(self) -> Lap:
        """What has been since the last call."""
        before, self._images = self._images, self._state.images_seen
        images = self._images - before
        return Lap(images, *self._clock.lap(), self._spent.lap(images))

"""Time that the device stands still for want of a batch, which is not the time that the host waits for it.

On a GPU the host runs ahead: it may wait for the next batch during the whole of a step that needs no batch yet.
"""

from collections import deque
from collections.abc import Callable
from functools import partial

import torch


def data_wait_on(device: torch.device) -> "OnHost | OnDevice":
    return OnDevice(partial(torch.cuda.Event, enable_timing=True)) if device.type == "cuda" else OnHost()


class OnHost:
    """For a device that has done a step when the call of it returns: it waits as long as the host."""

    def __init__(self):
        self._seconds = 0.0

    def launched(self) -> None:
        """A step has been enqueued."""

    def arrived(self, seconds: float) -> None:
        """A batch is here, for which the host has waited."""
        self._seconds += seconds

    def seconds(self) -> float:
        """Seconds of standing still that have become known since the last call."""
        found, self._seconds = self._seconds, 0.0
        return found


class OnDevice:
    """For a GPU: a batch is late only if the device has finished the step before when it arrives. Nothing waits for it.

    How much of the host's wait it then stood still lies between two events: behind that step, and behind what the
    arrival itself has enqueued, the crops and the augmentation of the batch, some hundredths of a step. The methods are
    those of `OnHost`.
    """

    def __init__(self, new_event: Callable[[], torch.cuda.Event]):
        self._new_event = new_event
        self._finished: torch.cuda.Event | None = None
        self._late: deque[tuple[float, torch.cuda.Event, torch.cuda.Event]] = deque()

    def launched(self) -> None:
        self._finished = self._new_event()
        self._finished.record()

    def arrived(self, seconds: float) -> None:
        if self._finished is not None and self._finished.query():
            arrival = self._new_event()
            arrival.record()
            self._late.append((seconds, self._finished, arrival))

    def seconds(self) -> float:
        found = 0.0
        while self._late and self._late[0][2].query():
            waited, finished, arrival = self._late.popleft()
            found += min(waited, finished.elapsed_time(arrival) / 1000)
        return found

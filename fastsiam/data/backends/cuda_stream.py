"""Makes a batch on its device: on a GPU beside the step before, in a stream of its own.

In the step's own stream a copy would begin when that step ends, and hold the memory that it reads until then.
"""

from collections.abc import Callable
from typing import Protocol

import torch


class Mark(Protocol):
    """A place in a device's work. `torch.cuda.Event` is one."""

    def synchronize(self) -> None:
        """Return once the device has passed it."""


class Passed:
    """The mark of work that is done when its call returns."""

    def synchronize(self) -> None:
        pass


class Lane(Protocol):
    def __call__(self, work: Callable[[], list[torch.Tensor]]) -> tuple[list[torch.Tensor], Mark]:
        """Returns what `work` returns, ready for whatever the caller enqueues next, and a mark behind the work.

        Memory that the work reads, and that torch does not own, must stay as it is until the mark is passed.
        """


def lane_to(device: torch.device) -> Lane:
    return _Beside(device) if device.type == "cuda" else _here


def _here(work):
    return work(), Passed()


class _Beside:
    def __init__(self, device):
        self._device, self._stream = device, torch.cuda.Stream(device)

    def __call__(self, work):
        step = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            result = work()
            mark = self._stream.record_event()
        step.wait_event(mark)
        # Allocated for this stream, and freed when the step is enqueued: not to be used again before the step is done.
        for tensor in result:
            tensor.record_stream(step)
        return result, mark

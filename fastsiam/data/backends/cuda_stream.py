"""Makes a batch on its device: on a GPU beside the step before, in a stream of its own.

In the step's own stream a copy would begin when that step ends, and hold the memory that it reads until then.
"""

from collections.abc import Callable

import torch


class Passed:
    """The mark of work that is done when its call returns; that of a GPU is a `torch.cuda.Event`."""

    def synchronize(self) -> None:
        pass


Work = Callable[[], list[torch.Tensor]]


def lane_to(device: torch.device) -> Callable[[Work], tuple[list[torch.Tensor], Passed | torch.cuda.Event]]:
    """Returns a function that does `work` and returns its result, ready for what the caller enqueues next, and a mark.

    Memory that the work reads, and that torch does not own, must stay as it is until `mark.synchronize()` returns.
    """
    if device.type != "cuda":
        return lambda work: (work(), Passed())
    stream = torch.cuda.Stream(device)

    def beside_the_step(work):
        step = torch.cuda.current_stream(device)
        with torch.cuda.stream(stream):
            result = work()
            mark = stream.record_event()
        step.wait_event(mark)
        # Allocated for this stream, and freed when the step is enqueued: not to be used again before the step is done.
        for tensor in result:
            tensor.record_stream(step)
        return result, mark

    return beside_the_step

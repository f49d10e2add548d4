"""Exponential moving average of an encoder's weights, for evaluation and export (`evaluate.average: ema`)."""

import copy

import torch
from torch import nn

# The average of t steps keeps at most t / (t + 9): its weight reaches back over about a ninth of the steps so far, and
# the random weights of the start are down to 1e-5 after ten steps (9! t! / (t + 9)!).
WARM_UP = 9


class EncoderAverage:
    """a = d a + (1 - d) w after each optimizer step t = 1, 2, ..., with d = min(decay, t / (t + 9)), in fp32.

    The running statistics of batch norm are averaged as the weights are: to first order the statistics of averaged
    weights are the average of their statistics, while the newest ones belong to other weights (benchmarks/LOG.md
    2026-11-29 has both, and statistics measured anew). Integers are those of the last step.
    """

    def __init__(self, encoder: nn.Module, decay: float):
        """`encoder` is on the device already; the average begins as its copy, and reads its weights from then on."""
        self.encoder = copy.deepcopy(encoder).eval().requires_grad_(False)
        """The averaged encoder, in evaluation mode."""
        self._decay = decay
        self._averages, self._counts = _tensors(self.encoder)
        self._weights, self._newest_counts = _tensors(encoder)

    @torch.no_grad()
    def update(self, step: int, overflowed: torch.Tensor | None = None) -> None:
        """Take in the weights after optimizer step `step`, counted from 1; nothing is read back from the device.

        `overflowed`: 1 where fp16 has skipped the step, else 0, on the device; a skipped step leaves the average as it
        is. None: no step can be skipped.
        """
        share = 1 - min(self._decay, step / (step + WARM_UP))
        if overflowed is None:
            torch._foreach_lerp_(self._averages, self._weights, share)
        else:
            # lerp takes one weight on the device for all tensors as a slow loop over them.
            changes = torch._foreach_sub(self._weights, self._averages)
            torch._foreach_mul_(changes, share * (1 - overflowed.view(())))
            torch._foreach_add_(self._averages, changes)
        if self._counts:
            torch._foreach_copy_(self._counts, self._newest_counts)


def _tensors(module):
    """Parameters and buffers that have a mean, and those that count."""
    found = [*module.parameters(), *module.buffers()]
    return [t for t in found if t.is_floating_point()], [t for t in found if not t.is_floating_point()]

"""Online linear accuracy: a linear classifier trained beside pretraining, on features that its steps compute anyway.

It sees detached features, so pretraining is the same to the bit with and without it. Its accuracy is that of a
classifier that follows a moving encoder, on augmented views: another number than that of `fastsiam evaluate linear`.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

from fastsiam.evaluate.linear import LinearHeads
from fastsiam.runtime.runtime import Runtime

NAME = "online linear (features of the training views)"
# With unit features and a bias the curvature of the loss is at most 1, where SGD with momentum 0.9 is stable up to 3.8,
# whatever the encoder, its width and the batch.
RATE = 3.0
# Of the mean of features, as batch norm's.
MEAN_MOMENTUM = 0.1


class LinearReading(NamedTuple):
    """What the classifier has done since the last reading."""

    loss: float | None
    """Mean cross entropy; None without a labelled image."""
    top1: float
    """Percent of the labelled training views, each predicted before the step that learned from it."""


class OnlineLinear:
    """A linear classifier of centred unit features in fp32, with its own SGD; all ranks must call the same methods.

    Features are l2-normalised, which is what kNN keeps of validation images, less their moving mean, and normalised
    again: their scale does not change while the encoder trains. What all features share is most of them and tells no
    classes apart: on a quickstart's features (64 dimensions) 558 steps at rate 1 come to 49 % with it and 62 % without.
    """

    def __init__(self, dim: int, classes: int, seed: int, runtime: Runtime):
        self._heads = LinearHeads(
            dim, classes, [RATE], [0.0], "sgd", seed=seed, device=runtime.device, world=runtime.world
        )
        self._world, self._mean, self._steps = runtime.world, torch.zeros(dim, device=runtime.device), 0
        self.last: LinearReading | None = None
        self.val_top1: float | None = None
        """Percent of the validation images, at the last kNN."""

    def step(self, features: torch.Tensor, labels: torch.Tensor, scale: float) -> None:
        """Learns from the features [V*N, D] of a training step, view by view; nothing is read back from the device.

        `labels`: [N] int64 on the host, -1 for an image that does not count. `scale`: factor of the learning rate.
        """
        labels = labels.to(features.device, non_blocking=True)
        unit = F.normalize(features.float(), dim=1)
        self._follow(unit.mean(0))
        self._heads.step(self._centred(unit), labels.repeat(len(features) // len(labels)), scale)

    def read(self) -> LinearReading:
        """Waits for the device."""
        (loss,), (top1,), images = self._heads.take_tally()
        self.last = LinearReading(loss if images else None, top1)
        return self.last

    def validate(self, features: torch.Tensor, labels: torch.Tensor) -> None:
        """Sets `val_top1`. `features`: unit features [n, D] of this rank's validation images, `labels`: [n] int64."""
        labels = labels.to(self._heads.weight.device)
        if not len(features):
            features = self._heads.weight.new_empty(0, self._heads.weight.shape[2])
        self.val_top1 = self._heads.accuracy(self._centred(features.float()), labels)[0][0]

    def _centred(self, unit):
        return F.normalize(unit - self._mean, dim=1)

    def _follow(self, mean):
        """Moves the mean of features to that of a batch, of all ranks; it is the plain mean of the first steps."""
        if self._world.size > 1:
            dist.all_reduce(mean)
            mean /= self._world.size
        self._steps += 1
        self._mean.lerp_(mean, max(MEAN_MOMENTUM, 1 / self._steps))

    def state_dict(self) -> dict:
        last = None if self.last is None else list(self.last)
        mean = {"mean": self._mean, "steps": self._steps}
        return {"heads": self._heads.state_dict(), **mean, "last": last, "val_top1": self.val_top1}

    def load_state_dict(self, saved: dict) -> None:
        self._heads.load_state_dict(saved["heads"])
        self._mean.copy_(saved["mean"])
        self._steps = saved["steps"]
        self.last = None if saved["last"] is None else LinearReading(*saved["last"])
        self.val_top1 = saved["val_top1"]

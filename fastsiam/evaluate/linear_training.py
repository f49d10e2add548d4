"""Training of the linear classifiers of a sweep over epochs: their rates, their best epochs, and their resumption."""

import contextlib
import io
import math
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from fastsiam.evaluate.linear import LinearHeads
from fastsiam.evaluate.linear_features import Cached, Streamed
from fastsiam.optim.build import scale_at
from fastsiam.runtime.files import DAMAGED_ZIP, replace_file
from fastsiam.runtime.runtime import Runtime


class Rule(NamedTuple):
    """What one head of a sweep has for itself."""

    base_lr: float
    """Learning rate for a batch of 256."""
    weight_decay: float


@dataclass(frozen=True)
class Sweep:
    """Heads that are trained at once."""

    rules: tuple[Rule, ...]
    optimizer: str
    """sgd or lars"""
    batch_size: int
    """Of all ranks."""
    epochs: int
    seed: int

    @property
    def rates(self) -> list[float]:
        """Learning rates of the whole batch: base_lr x batch_size / 256."""
        return [rule.base_lr * self.batch_size / 256 for rule in self.rules]

    def heads(self, dim: int, classes: int, runtime: Runtime) -> LinearHeads:
        decays = [rule.weight_decay for rule in self.rules]
        more = {"seed": self.seed, "device": runtime.device, "world": runtime.world}
        return LinearHeads(dim, classes, self.rates, decays, self.optimizer, **more)


class Epoch(NamedTuple):
    """What is known after an epoch."""

    number: int
    """From 1 on."""
    scale: float
    """Factor of the learning rates in it."""
    losses: list[float]
    """Mean of each head over the epoch."""
    val_top1: list[float]
    """Percent of each head."""
    images: int
    seconds: float


class LinearTraining:
    """Heads of a sweep on all training images, and a second set that chooses among them, where there are several.

    The second set is trained in the same way, but for the images that are held out; `scores` is its accuracy on those.
    The validation images have no part in the choice. All ranks must call the same methods.
    """

    def __init__(self, sweep: Sweep, dim: int, classes: int, runtime: Runtime, path: Path | None = None):
        """`path`: where the state is kept after each epoch, by the first rank; None for nowhere."""
        self._sweep, self._world, self._path = sweep, runtime.world, path
        self.heads = sweep.heads(dim, classes, runtime)
        self.choosing = sweep.heads(dim, classes, runtime) if len(sweep.rules) > 1 else None
        self.epoch = 0
        """Finished epochs."""
        self.best = [(-math.inf, 0)] * len(sweep.rules)
        """Best top-1 in percent on the validation images, and the epoch of it (from 1 on), of each head."""

    def resume(self) -> None:
        """Takes up the state that an earlier start has left at `path`; a damaged one is passed over."""
        saved = self._world.share(_read(self._path) if self._world.is_first else None)
        if saved is None:
            return
        self.epoch, self.best = saved["epoch"], [tuple(pair) for pair in saved["best"]]
        for heads, state in zip(self._every, saved["heads"], strict=True):
            heads.load_state_dict(state)

    def train(
        self,
        features: Streamed | Cached,
        queries: tuple[torch.Tensor, torch.Tensor],
        held_out: torch.Tensor,
        report: Callable[[Epoch], None] = lambda epoch: None,
    ) -> None:
        """To the last epoch. `queries`: validation features and labels of this rank; `held_out`: [N] bool, images.

        The cosine changes between epochs.
        """
        epochs = self._sweep.epochs
        for epoch in range(self.epoch, epochs):
            scale, began = scale_at(epoch / epochs, "cosine", 0.0), time.perf_counter()
            for batch in features.epoch(epoch):
                self.heads.step(batch.features, batch.labels, scale)
                if self.choosing is not None:
                    self.choosing.step(batch.features, batch.labels.masked_fill(held_out[batch.images], -1), scale)
            losses, _, images = self.heads.take_tally()
            (top1,) = self.heads.accuracy(*queries)
            # The first of equals.
            self.best = [max(then, (now, epoch + 1), key=_accuracy) for then, now in zip(self.best, top1, strict=True)]
            self.epoch = epoch + 1
            report(Epoch(self.epoch, scale, losses, top1, images, time.perf_counter() - began))
            self._save()

    def scores(self, features: torch.Tensor, labels: torch.Tensor) -> list[float] | None:
        """Top-1 in percent of the choosing heads on the images held out; None where there is nothing to choose."""
        return None if self.choosing is None else self.choosing.accuracy(features, labels)[0]

    def forget(self) -> None:
        """Removes what `resume` would take up."""
        if self._path is not None and self._world.is_first:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)

    @property
    def _every(self):
        return [heads for heads in (self.heads, self.choosing) if heads is not None]

    def _save(self):
        if self._path is None or not self._world.is_first:
            return
        state = {"epoch": self.epoch, "best": self.best, "heads": [heads.state_dict() for heads in self._every]}
        buffer = io.BytesIO()
        torch.save(state, buffer)
        # A full disk costs the resumption, and not the evaluation.
        with contextlib.suppress(OSError):
            replace_file(self._path, buffer.getvalue())


def _accuracy(pair):
    return pair[0]


def _read(path):
    if path is None:
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, *DAMAGED_ZIP, pickle.UnpicklingError, LookupError, AttributeError, TypeError):
        return None

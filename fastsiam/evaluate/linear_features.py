"""Features of labelled images as linear evaluation takes them: of fresh views in every epoch, or of a few passes kept.

Features are those of the backbone after pooling, as they are. The encoder is called as it is: put it into evaluation
mode first.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from fastsiam.data import rng
from fastsiam.data.backends.resident import free_bytes
from fastsiam.data.loader import EvaluationLoader, Loader
from fastsiam.errors import UserError
from fastsiam.runtime.runtime import Runtime

# Images that the encoder sees at once, on each rank.
AT_ONCE = 256


class FeatureBatch(NamedTuple):
    """Features of this rank's part of a training batch, on the device of the encoder."""

    features: torch.Tensor
    """[B, D]"""
    labels: torch.Tensor
    """[B] int64; -1 for an image that does not count."""
    images: torch.Tensor
    """[B] int64 into the source."""


class Streamed:
    """Batches whose views are augmented anew in each epoch: the encoder works in every one."""

    def __init__(self, encoder: nn.Module, loader: Loader, batch_size: int, runtime: Runtime):
        """`batch_size`: of all ranks; the batches of `loader` are smaller, and are put together."""
        self._encoder, self._loader, self._runtime = encoder, loader, runtime
        self._share = batch_size // runtime.world.size
        self.decoder = loader.backend.description

    def epoch(self, epoch: int) -> Iterator[FeatureBatch]:
        """The batches of an epoch; the last may be smaller."""
        waiting: list[FeatureBatch] = []
        for part in encoded(self._encoder, self._loader, epoch, self._runtime):
            waiting.append(part)
            while sum(len(part.labels) for part in waiting) >= self._share:
                whole = joined(waiting)
                yield FeatureBatch(*(rows[: self._share] for rows in whole))
                waiting = [FeatureBatch(*(rows[self._share :] for rows in whole))]
        if any(len(part.labels) for part in waiting):
            yield joined(waiting)


class Cached:
    """Batches of a few passes over the images, kept in half precision; each epoch shuffles one of them in turn.

    Every rank keeps the features of all. ImageNet's take 5.2 GB a pass with the 2,048 features of ResNet-50.
    """

    def __init__(self, encoder: nn.Module, loader: Loader, batch_size: int, runtime: Runtime, passes: int):
        """Takes the memory; `fill` comes next. Raises `UserError` where it does not suffice."""
        self._encoder, self._loader, self._batch_size, self._runtime = encoder, loader, batch_size, runtime
        self.decoder = loader.backend.description
        images, width = len(loader.source), encoder.num_features
        needed, free = passes * images * width * 2, free_bytes(runtime.device)
        if needed > free:
            raise UserError(
                f"--passes: {passes} of {images:,} images need {needed / 1e9:,.1f} GB for features of {width}, and "
                f"{free / 1e9:,.1f} GB are free; set fewer --passes, or leave --cached out",
                "features-do-not-fit",
            )
        self._features = torch.zeros(passes, images, width, dtype=torch.float16, device=runtime.device)
        # What a pass leaves out keeps -1.
        self._labels = torch.full((passes, images), -1, device=runtime.device)

    def fill(self, said: Callable[[int], None] = lambda done: None) -> None:
        """Makes the passes, and calls `said(done)` after each; all ranks must call.

        Raises `UserError` where half precision cannot hold the features.
        """
        for number, (features, labels) in enumerate(zip(self._features, self._labels, strict=True)):
            for part in encoded(self._encoder, self._loader, number, self._runtime):
                found, known, rows = (self._runtime.world.gather(tensor) for tensor in part)
                features[rows], labels[rows] = found.half(), known
            said(number + 1)
        self._loader.close()
        check_finite(self._features)

    def epoch(self, epoch: int) -> Iterator[FeatureBatch]:
        """The batches of an epoch; the last may be smaller."""
        features, labels = (table[epoch % len(table)] for table in (self._features, self._labels))
        order = torch.from_numpy(rng.epoch_order(self._loader.seed, epoch, len(labels))).to(labels.device)
        for rows in order.split(self._batch_size):
            mine = rows[self._runtime.world.share_of(len(rows))]
            yield FeatureBatch(features[mine], labels[mine], mine)


@torch.no_grad()
def encoded(encoder: nn.Module, loader: Loader, epoch: int, runtime: Runtime) -> Iterator[FeatureBatch]:
    """Features in the compute dtype of an epoch of one augmented view of each image."""
    for batch in loader.epoch(epoch):
        with runtime.autocast():
            features = encoder(batch.views[0])
        images = torch.from_numpy(batch.indices).to(runtime.device)
        yield FeatureBatch(features, batch.labels.to(runtime.device), images)


def joined(parts: list[FeatureBatch]) -> FeatureBatch:
    return FeatureBatch(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


@torch.no_grad()
def centre_features(
    encoder: nn.Module, loader: EvaluationLoader, images: np.ndarray, runtime: Runtime
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [n, D] in half precision and labels [n] of this rank's part of `images`, both on the device.

    Raises `UserError` where half precision cannot hold them.
    """
    mine = images[runtime.world.share_of(len(images))]
    mine = mine[~loader.skip.mask[mine]]
    features, labels = [torch.empty(0, encoder.num_features, dtype=torch.float16, device=runtime.device)], []
    for batch in loader.batches(mine) if len(mine) else ():
        with runtime.autocast():
            features.append(encoder(batch.images).half())
        labels.append(batch.labels)
    loader.backend.close()
    found = torch.cat(features)
    check_finite(found)
    return found, torch.cat([torch.empty(0, dtype=torch.int64), *labels]).to(runtime.device)


def check_finite(features: torch.Tensor) -> None:
    """Raises `UserError` for features that are not finite; the largest finite one of half precision is 65,504."""
    if not all(torch.isfinite(rows).all() for rows in features.flatten(0, -2).split(100_000)):
        raise UserError(
            "ENCODER: some of its features are not finite in half precision (at most 65,504); they are of no use to a "
            "linear classifier",
            "features-not-finite",
        )


def decoded_at_once(images: int, batch_size: int | None, ranks: int) -> int:
    """Images of all ranks in a batch of the loader: those of an epoch that do not fill one are left out.

    A multiple of `ranks` that leaves the fewest out, and divides `batch_size` where one is given.
    """
    most = min(AT_ONCE * ranks, images if batch_size is None else batch_size)
    sizes = [size for size in range(ranks, most + 1, ranks) if 8 * size > most]
    return min(sizes, key=lambda size: ((batch_size or size) % size > 0, images % size, -size))

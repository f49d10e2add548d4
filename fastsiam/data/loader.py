"""Loaders: each epoch has all batches in our order, whichever backend decodes.

A backend turns `CropRequest`s into uint8 crops and nothing else. Order, boxes, sharding, augmentation and the
count of what was delivered are here, the same for all of them.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch

from fastsiam.config.views import ViewGroup, ViewSpec
from fastsiam.data import rng
from fastsiam.data.augment import augment
from fastsiam.data.backends.base import (
    Backend,
    Batch,
    CropRequest,
    EvaluationBatch,
    LoaderError,
    UndecodableError,
    check_delivery,
)
from fastsiam.data.skip_list import SkipList
from fastsiam.data.sources.image_header import UNREADABLE
from fastsiam.data.sources.source import ImageSource
from fastsiam.errors import UserError
from fastsiam.kernels.reference import normalize, to_unit


class Loader:
    """Makes batches of augmented training views.

    `batch_size` is that of all processes together; the last, incomplete batch of an epoch is dropped, as in the
    paper's code. Process `rank` of `world_size` takes the rank-th part of every batch.
    """

    def __init__(
        self,
        source: ImageSource,
        groups: tuple[ViewGroup, ...],
        backend: Backend,
        *,
        batch_size: int,
        seed: int,
        dtype: torch.dtype,
        skip: SkipList | None = None,
        rank: int = 0,
        world_size: int = 1,
        among: np.ndarray | None = None,
    ):
        """`backend` crops at the sizes of the groups.

        `skip` knows which images are excluded; without one the first that cannot be decoded stops the run. `among`: [M]
        int64 indices into the source of the only images that are used, None for all.
        """
        check_divides(batch_size, world_size)
        self._count = len(source) if among is None else len(among)
        check_batch_size(batch_size, self._count, source.root)
        self.source, self.groups, self.backend = source, groups, backend
        self.batch_size, self.seed, self.dtype = batch_size, seed, dtype
        self.skip = skip or SkipList(len(source), 0.0, source.kinds >= UNREADABLE)
        self._among = among
        self._outside = None if among is None else ~np.isin(np.arange(len(source)), among)
        self.rank, self.world_size = rank, world_size
        self.steps_per_epoch = self._count // batch_size
        self.sizes = full_sizes(groups)
        """Sides in pixels of the groups' views in the epoch begun last."""
        self._cold = True

    def epoch(self, epoch: int, cursor: int = 0, sizes: tuple[int, ...] | None = None) -> Iterator[Batch]:
        """Yields the batches of an epoch from `cursor` on, the number of its images that finished steps have consumed.

        `sizes`: side of each group's views in pixels, None for the full ones. They change no order, box or other draw.
        Raises `LoaderError` where the backend delivers other images than asked for, or too few.
        """
        if cursor % self.batch_size:
            raise ValueError(f"cursor {cursor} is not at a batch of {self.batch_size}")
        expected = (self.steps_per_epoch - cursor // self.batch_size) * self.batch_size // self.world_size
        sizes = sizes or full_sizes(self.groups)
        if sizes != self.sizes:
            self.backend.resize(sizes)
            self.sizes, self._cold = sizes, True
        delivered = 0
        try:
            for crops, request in self._crops(epoch, cursor):
                indices = request.indices
                delivered += len(indices)
                cold, self._cold = self._cold, False
                yield Batch(self.augmented(crops, request.drawn), _labels(self.source, indices), indices, cold)
        finally:
            # A backend that is left in mid-epoch may have to start again.
            self._cold |= delivered < expected
        if delivered != expected:
            raise LoaderError(
                f"epoch {epoch} on rank {self.rank}: expected {expected} images, {self.backend.description} "
                f"delivered {delivered}"
            )

    def close(self) -> None:
        """Frees what the backend holds; the next epoch starts it again."""
        self.backend.close()
        self._cold = True

    def _crops(self, epoch, cursor):
        """A batch with files that cannot be decoded is asked for again without them."""
        finished = False
        while not finished:
            pending: deque[CropRequest] = deque()
            with ThreadPoolExecutor(1, thread_name_prefix="draws") as pool:
                try:
                    for indices, crops in self.backend.crops(self._requests(epoch, cursor, pending, pool)):
                        request = check_delivery(pending, indices, crops)
                        cursor += self.batch_size
                        yield crops, request
                    finished = True
                except UndecodableError as error:
                    self.source.forget(error.reasons)
                    self.skip.add(error.reasons)
                    self._cold = True

    def _requests(self, epoch, cursor, pending, pool: ThreadPoolExecutor | None = None):
        """`pool` draws the next batch's boxes and augmentations while this one's request is worked on."""
        order = rng.epoch_order(self.seed, epoch, self._count)
        order = order if self._among is None else self._among[order]
        share = self.batch_size // self.world_size
        asked: deque[Callable[[], CropRequest]] = deque()
        for start in range(cursor, self.steps_per_epoch * self.batch_size, self.batch_size):
            first = start + self.rank * share
            # Not in the thread: it writes down what cannot be read, and can end the run.
            indices = self._readable(epoch, order[first : first + share])
            drawing = partial(self._request, epoch, indices, self.source.sizes(indices))
            asked.append(pool.submit(drawing).result if pool else drawing)
            if len(asked) > (pool is not None):
                yield self._noted(pending, asked)
        while asked:
            yield self._noted(pending, asked)

    def _request(self, epoch, indices, sizes):
        """A function of its arguments and the seed."""
        boxes = [
            np.stack([rng.crop_boxes(spec, self.seed, epoch, indices, view, sizes) for view in views])
            for spec, views in self._numbered_views()
        ]
        return CropRequest(indices, tuple(boxes), sizes, self.drawn(epoch, indices))

    def _numbered_views(self):
        """Yields the spec and the numbers of each group's views; draws are addressed by them, counted over groups."""
        first = 0
        for count, spec in self.groups:
            yield spec, range(first, first + count)
            first += count

    @staticmethod
    def _noted(pending, asked):
        pending.append(asked.popleft()())
        return pending[-1]

    def _readable(self, epoch, asked):
        """Replaces images that are excluded, or whose header cannot be read."""
        while True:
            mask = self.skip.mask if self._outside is None else self.skip.mask | self._outside
            if mask is not self.skip.mask and mask.all():
                raise UserError("none of the chosen images can be decoded", "no-decodable-images")
            indices = rng.replace_skipped(self.seed, epoch, asked, mask)
            reasons = self.source.look(indices)
            if not reasons:
                return indices
            self.skip.add(reasons)

    def drawn(self, epoch: int, indices: np.ndarray) -> tuple[rng.AugmentDraws, ...]:
        """Returns the augmentations of these images in an epoch, [V_g*N] rows a group."""
        return tuple(
            rng.AugmentDraws.concatenate([rng.augment_draws(spec, self.seed, epoch, indices, view) for view in views])
            for spec, views in self._numbered_views()
        )

    def augmented(self, crops: list[torch.Tensor], drawn: tuple[rng.AugmentDraws, ...]) -> list[torch.Tensor]:
        """Returns views [V_g*N, 3, S_g, S_g] a group, made of uint8 crops [V_g*N, S_g, S_g, 3] and their draws."""
        groups = zip(crops, drawn, self.groups, strict=True)
        return [augment(crops, drawn, group.spec, self.dtype) for crops, drawn, group in groups]


class EvaluationLoader:
    """Delivers each image once, in the source's order: the centred crop of `crop_ratio`, resized and normalised.

    Images that cannot be decoded are excluded.
    """

    def __init__(
        self,
        source,
        spec: ViewSpec,
        backend: Backend,
        *,
        batch_size: int,
        crop_ratio: float,
        dtype,
        skip: SkipList | None = None,
    ):
        self.source, self.spec, self.backend = source, spec, backend
        self.batch_size, self.crop_ratio, self.dtype = batch_size, crop_ratio, dtype
        self.skip = skip or SkipList(len(source), 0.0, source.kinds >= UNREADABLE)

    def batches(self, indices: np.ndarray | None = None) -> Iterator[EvaluationBatch]:
        """Yields all images, or those of `indices`; the last batch may be smaller."""
        rest = np.arange(len(self.source)) if indices is None else indices
        self.skip.add(self.source.look(rest[~self.skip.mask[rest]]))
        finished = False
        while not finished:
            rest = rest[~self.skip.mask[rest]]
            pending: deque[CropRequest] = deque()
            try:
                for found, (crops, *others) in self.backend.crops(self._requests(rest, pending)):
                    check_delivery(pending, found, [crops, *others])
                    rest = rest[len(found) :]
                    images = normalize(to_unit(crops), self.spec.mean, self.spec.std, self.dtype)
                    yield EvaluationBatch(images, _labels(self.source, found), found)
                finished = True
            except UndecodableError as error:
                self.source.forget(error.reasons)
                self.skip.add(error.reasons)
        if len(rest):
            raise LoaderError(f"evaluation: the last {len(rest)} images were not delivered")

    def _requests(self, indices, pending):
        for start in range(0, len(indices), self.batch_size):
            part = indices[start : start + self.batch_size]
            sizes = self.source.sizes(part)
            request = CropRequest(part, (rng.center_boxes(sizes, self.crop_ratio)[None],), sizes)
            pending.append(request)
            yield request


def full_sizes(groups: tuple[ViewGroup, ...]) -> tuple[int, ...]:
    """Returns the side in pixels of each group's views at full size."""
    return tuple(group.spec.size for group in groups)


def check_divides(batch_size: int, world_size: int) -> None:
    """Raises `UserError` for a batch that the ranks cannot share equally."""
    if batch_size % world_size:
        raise UserError(
            f"train.batch_size: {batch_size} does not divide by {world_size} ranks; set a multiple of {world_size}",
            "batch-not-divisible",
        )


def check_batch_size(batch_size: int, num_images: int, where) -> None:
    """Raises `UserError` for a batch that the data cannot fill."""
    if batch_size > num_images:
        images = "1 image" if num_images == 1 else f"{num_images} images"
        fitting = 1 << max(num_images.bit_length() - 1, 0)
        advice = f"set train.batch_size={fitting} or less, or add images" if fitting > 1 else "add images"
        raise UserError(
            f"train.batch_size: {batch_size} is more than the {images} under {where}; {advice}", "batch-too-large"
        )


def _labels(source, indices):
    return torch.from_numpy(source.labels[indices])

"""Contract of the backends: requests for crops in, uint8 crops out, in the order of the requests.

Views come in groups: all views of a group have one size, and are delivered as one tensor.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch

from fastsiam.data.rng import AugmentDraws


class LoaderError(RuntimeError):
    """Raised when a backend delivers other images than it was asked for, or another number of crops."""


class UndecodableError(Exception):
    """Raised by a backend for a batch with files that it cannot decode; it takes requests again afterwards."""

    def __init__(self, reasons: dict[int, str]):
        super().__init__("; ".join(reasons.values()))
        self.reasons = reasons
        """Sentences that name the file, by index into the source."""


@dataclass(frozen=True)
class CropRequest:
    """One batch for a backend: N images, and V_g boxes of each for every group g of views."""

    indices: np.ndarray
    """[N] int64 into the source."""
    boxes: tuple[np.ndarray, ...]
    """[V_g, N, 4] int32 a group: top, left, height, width in pixels of the displayed image."""
    sizes: np.ndarray
    """[N, 2] int32: height and width of the displayed image, as the boxes were drawn for."""
    drawn: tuple[AugmentDraws, ...] = ()
    """[V_g*N] rows a group, view by view; empty for evaluation."""


@dataclass(frozen=True)
class Batch:
    """Views of N images, in groups: view v of image n is row `v * N + n` of its group."""

    views: list[torch.Tensor]
    """[V_g*N, 3, S_g, S_g] a group, channels-last, normalised, in the compute dtype on the compute device."""
    labels: torch.Tensor
    """[N] int64 on the host; -1 without labels."""
    indices: np.ndarray
    """[N] int64 into the source."""
    cold: bool = False
    """The backend was started for it: graphs built, kernels compiled, processes spawned."""


class EvaluationBatch(NamedTuple):
    """One view of each of N images: the whole or its centre, without augmentation."""

    images: torch.Tensor
    """[N, 3, S, S], otherwise as `Batch.views`."""
    labels: torch.Tensor
    """[N] int64 on the host; -1 without labels."""
    indices: np.ndarray
    """[N] int64 into the source."""


class Backend(Protocol):
    """Decodes each image once and crops all its views."""

    description: str
    """Decoder with its version, printed and recorded with the run."""

    def resize(self, sizes: tuple[int, ...]) -> None:
        """Sets the side of each group's crops from the next call of `crops` on; frees what was built for others."""

    def crops(self, requests: Iterable[CropRequest]) -> Iterator[tuple[np.ndarray, list[torch.Tensor]]]:
        """Yields for each request its indices, as they went through the backend, and crops [V_g*N, S_g, S_g, 3] uint8.

        Floating-point tensors [V_g*N, 3, S_g, S_g] are finished views, which the loader takes as they are.
        Raises `UndecodableError` for the first request with files that cannot be decoded.
        """

    def close(self) -> None:
        """Free threads, processes and memory; the next call of `crops` begins anew."""


def check_delivery(pending: deque[CropRequest], indices: np.ndarray, crops: list[torch.Tensor]) -> CropRequest | None:
    """Returns the oldest pending request; raises `LoaderError` unless `indices` and numbers of `crops` are its own."""
    request = pending.popleft() if pending else None
    asked = request.indices if request else np.empty(0, np.int64)
    expected = [boxes.shape[0] * boxes.shape[1] for boxes in request.boxes] if request else []
    if not np.array_equal(asked, indices) or list(map(len, crops)) != expected:
        raise LoaderError(
            f"asked for {expected} crops of the images {asked[:8].tolist()}... ({len(asked)}), "
            f"got {list(map(len, crops))} of {np.asarray(indices)[:8].tolist()}... ({len(indices)})"
        )
    return request

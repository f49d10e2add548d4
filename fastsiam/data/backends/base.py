"""Contract of the backends: requests for crops in, uint8 crops out, in the order of the requests."""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from fastsiam.data.rng import AugmentDraws


class LoaderError(RuntimeError):
    """A backend delivered something else than it was asked for."""


class UndecodableError(Exception):
    """What a backend raises for a batch with files that it cannot decode; it can be asked again then."""

    def __init__(self, reasons: dict[int, str]):
        super().__init__("; ".join(reasons.values()))
        self.reasons = reasons
        """Sentences that name the file, by index into the source."""


@dataclass(frozen=True)
class CropRequest:
    """One batch for a backend: N images and V boxes of each."""

    indices: np.ndarray
    """[N] int64 into the source."""
    boxes: np.ndarray
    """[V, N, 4] int32: top, left, height, width in pixels of the displayed image."""
    sizes: np.ndarray
    """[N, 2] int32: height and width of the displayed image, as the boxes were drawn for."""
    drawn: tuple[AugmentDraws, ...] = ()
    """V times N rows; none for evaluation."""


@dataclass(frozen=True)
class Batch:
    """V views of N images: view v of image n is `views[v * N + n]`."""

    views: torch.Tensor
    """[V*N, 3, S, S], channels-last, normalised, in the compute dtype on the compute device."""
    labels: torch.Tensor
    """[N] int64 on the host; -1 without labels."""
    indices: np.ndarray
    """[N] int64 into the source."""
    cold: bool = False
    """The backend was started for it: graphs built, kernels compiled, processes spawned."""


class Backend(Protocol):
    """Decodes each image once and crops it V times."""

    description: str
    """Decoder with its version, printed and recorded with the run."""

    def resize(self, size: int) -> None:
        """Crops are of `size` pixels from the next call of `crops` on; frees what was built for another size."""

    def crops(self, requests: Iterable[CropRequest]) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """For each request in turn its indices, as they went through the backend, and uint8 [V*N, S, S, 3].

        A backend that augments gives finished views instead, [V*N, 3, S, S] as `Batch` holds them.
        Raises `UndecodableError` for the first request with files that cannot be decoded.
        """

    def close(self) -> None:
        """Free threads, processes and memory; the next call of `crops` begins anew."""


def check_delivery(
    pending: deque[CropRequest], indices: np.ndarray, crops: torch.Tensor, num_views: int
) -> CropRequest | None:
    """The oldest pending request; `LoaderError` unless `indices` and the number of `crops` are its own."""
    request = pending.popleft() if pending else None
    asked = request.indices if request else np.empty(0, np.int64)
    if not np.array_equal(asked, indices) or len(crops) != num_views * len(asked):
        raise LoaderError(
            f"asked for {num_views} views of the images {asked[:8].tolist()}... ({len(asked)}), "
            f"got {len(crops)} crops of {np.asarray(indices)[:8].tolist()}... ({len(indices)})"
        )
    return request

"""Pictures of a run for its report: `pictures.npz` in the run folder, written while it trains.

A report can then be made elsewhere, without the data, a GPU or torch. The file is numpy's format without pickles.
Thumbnails are uint8 RGB, names are relative to data.train or data.val, labels are class names, "" without one.

| array | shape | content |
|---|---|---|
| pair_images | [2, P, S, S, 3] | the first two views of the first images of the first step, as the encoder saw them |
| pair_names, pair_labels | [P] | |
| knn_step | [] | step of the last kNN evaluation, the source of all below |
| query_images, query_names, query_labels | [Q, S, S, 3], [Q], [Q] | validation images |
| neighbour_images, neighbour_names, neighbour_labels | [Q, 5, S, S, 3], [Q, 5], [Q, 5] | most similar in training |
| neighbour_similarity | [Q, 5] float32 | cosine of their features |
| points, point_labels | [N, 2] float32, [N] | validation features on two principal components |
| explained | [2] float64 | share of the variance of each component |

At most 3.2 MB, from 0.3 MB at 32 px to 2.6 MB at 224 px and above.
"""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from fastsiam.config.views import ViewSpec
from fastsiam.data.sources.source import ImageSource
from fastsiam.errors import Notice, printable
from fastsiam.runtime.files import read_arrays, write_arrays

PAIRS, QUERIES, NEIGHBOURS = 8, 8, 5
# A legend can tell ten classes apart.
CLASSES, IMAGES_PER_CLASS = 10, 50
# Pixels of the longest side in the file.
PAIR_SIDE, THUMBNAIL_SIDE = 160, 96
_NAME_CHARACTERS = 500


class Pictures:
    """Collector on all ranks, writer where `writes`.

    A disk that refuses the file gets another attempt at the next evaluation; `warn` gets one notice.
    """

    def __init__(
        self,
        folder: Path,
        source: ImageSource | None,
        val: ImageSource | None,
        spec: ViewSpec,
        warn: Callable[[Notice], None],
        writes: bool,
    ):
        """`source`: the training images; None where there are none. `spec` tells how views are normalised."""
        self.path = folder / "pictures.npz"
        self._source, self._val, self._spec = source, val, spec
        self._warn, self._writes, self._warned = warn, writes, False
        self._first: tuple[torch.Tensor, np.ndarray] | None = None
        self._arrays: dict[str, np.ndarray] | None = None

    def remember(self, step: int, views: list[torch.Tensor], indices: np.ndarray) -> None:
        """Keeps a copy of the first pairs of the first step; nothing is read back from the device."""
        if step == 1 and self._writes and self._source is not None:
            first, *others = (view for group in views for view in group.split(len(indices)))
            # Views of two sizes make no pair; where no other has the first one's size, it stands alone.
            second = next((view for view in others if view.shape == first.shape), first)
            pairs = torch.stack([first[:PAIRS], second[:PAIRS]])
            self._first = pairs, np.array(indices[:PAIRS])

    def write_pairs(self) -> None:
        """Writes the pairs that `remember` has kept, in place of a file of an earlier start."""
        if self._first is None:
            return
        (views, indices), self._first = self._first, None
        images = to_uint8(views.flatten(0, 1), self._spec, PAIR_SIDE)
        names, labels = _names(self._source, indices)
        self._arrays = {
            "pair_images": images.reshape(2, -1, *images.shape[1:]),
            "pair_names": names,
            "pair_labels": labels,
        }
        self._write()

    def chosen(self) -> np.ndarray:
        """Returns sorted int64 indices of validation images: some of each of a few classes, spread over the source."""
        labels = self._val.labels
        rows = [np.flatnonzero(labels == label) for label in _spread(np.unique(labels[labels >= 0]), CLASSES)]
        return np.sort(np.concatenate([_spread(row, IMAGES_PER_CLASS) for row in rows]))

    def evaluated(
        self,
        step: int,
        queries: torch.Tensor,
        query_indices: np.ndarray,
        nearest: Callable[[torch.Tensor, int], tuple[np.ndarray, np.ndarray]],
        thumbnails: Callable[[ImageSource, np.ndarray], torch.Tensor],
    ) -> None:
        """Write the pictures of an evaluation; all ranks must call.

        `queries`: [N, D] features of the validation images `query_indices`. `nearest(queries, count)`, a matter of all
        ranks, returns cosines and training images [n, count]; `thumbnails(source, indices)` returns normalised
        evaluation crops [n, 3, S, S].
        """
        shown = _one_of_each(self._val.labels[query_indices])[:QUERIES]
        similarity, neighbours = nearest(queries[shown], NEIGHBOURS)
        if not self._writes:
            return
        unique, places = np.unique(neighbours, return_inverse=True)
        crops = to_uint8(thumbnails(self._source, unique), self._spec, THUMBNAIL_SIDE)
        names, labels = _names(self._val, query_indices[shown])
        neighbour_names, neighbour_labels = _names(self._source, neighbours.ravel())
        points, explained = project(F.normalize(queries.float(), dim=1).double().cpu().numpy())
        self._arrays = self._known() | {
            "knn_step": np.array(step),
            "query_images": to_uint8(thumbnails(self._val, query_indices[shown]), self._spec, THUMBNAIL_SIDE),
            "query_names": names,
            "query_labels": labels,
            "neighbour_images": crops[places.reshape(neighbours.shape)],
            "neighbour_names": neighbour_names.reshape(neighbours.shape),
            "neighbour_labels": neighbour_labels.reshape(neighbours.shape),
            "neighbour_similarity": similarity,
            "points": points.astype(np.float32),
            "point_labels": _names(self._val, query_indices)[1],
            "explained": explained,
        }
        self._write()

    def _known(self):
        """Arrays so far; after a resume those of the earlier start."""
        if self._arrays is None:
            self._arrays = read_arrays(self.path) if self._source is not None else {}
        return self._arrays

    def _write(self):
        try:
            write_arrays(self.path, self._arrays)
            self._warned = False
        except OSError as error:
            if not self._warned:
                self._warned = True
                sentence = f"cannot write {self.path} ({error.strerror or error}); the report will have no pictures"
                self._warn(Notice(sentence, "pictures-unwritten"))


def to_uint8(views: torch.Tensor, spec: ViewSpec, side: int) -> np.ndarray:
    """Returns normalised views [N, 3, S, S] as uint8 pixels [N, s, s, 3], s at most `side`."""
    mean, std = (torch.tensor(values, device=views.device).view(3, 1, 1) for values in (spec.mean, spec.std))
    pixels = views.detach().float() * std + mean
    if pixels.shape[-1] > side:
        pixels = F.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
    return pixels.mul(255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()


def project(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns `features` [N, D] on their first two principal components [N, 2], and shares of the variance [2].

    The N x N Gram matrix is smaller than the covariance. The largest coordinate of a component is positive; components
    that the features do not have are zero.
    """
    centred = features - features.mean(0)
    variances, vectors = np.linalg.eigh(centred @ centred.T)
    variances, vectors = variances[::-1].clip(0), vectors[:, ::-1]
    total = variances.sum()
    points, explained = np.zeros((len(features), 2)), np.zeros(2)
    for component in range(min(2, len(features))):
        if variances[component] <= 1e-12 * len(features):
            break
        column = vectors[:, component] * np.sqrt(variances[component])
        points[:, component] = column * np.sign(column[np.abs(column).argmax()])
        explained[component] = variances[component] / total
    return points, explained


def _spread(values: np.ndarray, count: int) -> np.ndarray:
    """Returns at most `count` of `values`, evenly spaced."""
    return values[np.linspace(0, len(values) - 1, min(count, len(values))).round().astype(np.int64)]


def _one_of_each(labels: np.ndarray) -> np.ndarray:
    """Returns rows in an order that takes one of every class before a second of any."""
    turn = np.zeros(len(labels), np.int64)
    for label in np.unique(labels):
        same = labels == label
        turn[same] = np.arange(same.sum())
    return np.lexsort((labels, turn))


def _names(source: ImageSource, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns names and labels of images."""
    names = [os.fsdecode(bytes(source.names[index])) for index in indices]
    labels = [source.classes[label] if label >= 0 else "" for label in source.labels[indices]]
    # A page cannot hold bytes that are not UTF-8.
    names, labels = ([printable(text)[-_NAME_CHARACTERS:] for text in texts] for texts in (names, labels))
    return np.array(names, dtype=str), np.array(labels, dtype=str)

"""Features of the images of a source, of a frozen encoder."""

import sys
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from fastsiam.data.sources.source import ImageSource
from fastsiam.errors import UserError
from fastsiam.evaluate.knn import extract
from fastsiam.evaluate.protocols.inputs import Inputs


class Features(NamedTuple):
    """Of the N images that could be decoded, in the source's order."""

    rows: torch.Tensor
    """[N, D] fp16 on the encoder's device, l2-normalised."""
    labels: torch.Tensor
    """[N] int64 on the CPU, -1 without a label."""
    indices: np.ndarray
    """[N] int64: which images of the source."""
    decoder: str


def features(inputs: Inputs, source: ImageSource, what: str, indices: np.ndarray | None = None) -> Features:
    """Computes the features of all images of a source, or those of sorted `indices`; `what` names them on the screen.

    Raises `UserError` where too many, or all, cannot be decoded, and where the device's memory does not suffice.
    """
    indices = np.arange(len(source)) if indices is None else indices
    if not len(indices):
        raise UserError(f"{what}: no image of {source.root} has a label", "no-labels")
    loader, found = inputs.loader(source), []

    def batches():
        steps = -(-len(indices) // loader.batch_size)
        console = Console(stderr=True)
        shown = {"description": f"features of {what}", "total": steps, "console": console, "transient": True}
        for batch in track(loader.batches(indices), disable=not sys.stderr.isatty(), **shown):
            found.append(batch.indices)
            yield batch

    try:
        rows, labels = extract(inputs.encoder, batches(), inputs.runtime.autocast, len(indices))
    except torch.OutOfMemoryError:
        rows = None
    if rows is None:
        # Outside the handler: the traceback would hold what did not fit.
        raise UserError(
            f"--batch-size: {inputs.runtime.device.type} out of memory at {loader.batch_size} images of "
            f"{inputs.spec.size} px, beside {len(indices):,} features; give a smaller --batch-size, or --device cpu",
            "out-of-memory",
        )
    loader.backend.close()
    if not found:
        text = f"{what}: none of {len(indices):,} chosen images under {source.root} can be decoded"
        raise UserError(f"{text}; give images that can", "no-decodable-images")
    return Features(rows, labels, np.concatenate(found), loader.backend.description)


def labelled_rows(source: ImageSource) -> np.ndarray:
    """Returns the sorted indices of the images that have a label."""
    return np.flatnonzero(source.labels >= 0)

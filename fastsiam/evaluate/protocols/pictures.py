"""Pictures of a kNN evaluation as PNG files: neighbours, confusion of classes, features in two dimensions."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fastsiam.data.sources.source import ImageSource
from fastsiam.errors import UserError
from fastsiam.evaluate.gallery import Pictures
from fastsiam.evaluate.knn import VOTERS, count_votes, nearest
from fastsiam.evaluate.protocols.features import Features
from fastsiam.evaluate.protocols.inputs import Inputs
from fastsiam.evaluate.protocols.result import written
from fastsiam.runtime.files import read_arrays

# Classes whose names fit beside a matrix, and characters of a name.
NAMED, LETTERS = 40, 18
_GREEN, _RED = "#2a7d3f", "#b3332b"


def write_pictures(
    folder: Path, inputs: Inputs, train: ImageSource, val: ImageSource, bank: Features, queries: Features, title: str
) -> None:
    """Writes knn_neighbours.png, knn_projection.png, and pictures.npz, from which both are drawn.

    Raises `UserError` where the disk refuses.
    """

    def fail(notice):
        raise UserError(f"--out: {notice}", notice.code)

    def thumbnails(source, indices):
        loader = inputs.loader(source)
        crops = torch.cat([batch.images for batch in loader.batches(indices)])
        loader.backend.close()
        return crops

    def neighbours(rows, count):
        similarity, places = nearest(bank.rows, rows, count)
        return similarity.cpu().numpy(), bank.indices[places.cpu()]

    pictures = Pictures(folder, train, val, inputs.spec, fail, writes=True)
    shown = np.isin(queries.indices, pictures.chosen())
    step = inputs.origin["description"].get("step") or 0
    pictures.evaluated(step, queries.rows[torch.from_numpy(shown)], queries.indices[shown], neighbours, thumbnails)
    arrays = read_arrays(pictures.path)
    _save(_neighbours(arrays, title), folder / "knn_neighbours.png")
    _save(_projection(arrays, title), folder / "knn_projection.png")


def write_confusion(folder: Path, matrix: np.ndarray, classes: list[str], title: str) -> None:
    """Writes knn_confusion.png of a matrix [C, C] of counts, true classes in rows, and the counts as .npy."""
    with written(folder / "knn_confusion.npy"):
        np.save(folder / "knn_confusion.npy", matrix)
    share = 100 * matrix / matrix.sum(1, keepdims=True).clip(1)
    side = 5.0 if len(classes) > NAMED else 3.2 + 0.22 * len(classes)
    figure = Figure(figsize=(side + 0.9, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
    figure.colorbar(image, label="percent of the true class", shrink=0.8)
    if len(classes) <= NAMED:
        names = [_short(name) for name in classes]
        axes.set_xticks(range(len(classes)), names, rotation=90, fontsize=7)
        axes.set_yticks(range(len(classes)), names, fontsize=7)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(title, fontsize=8)
    _save(figure, folder / "knn_confusion.png")


def confusion(similarity, labels, truth, classes: int, temperature: float) -> np.ndarray:
    """Returns counts int64 [C, C], true classes in rows, of the votes of neighbours [N, k]; see `count_votes`."""
    places = torch.zeros(classes * classes, dtype=torch.int64)
    for near, which, true in zip(*(rows.split(VOTERS) for rows in (similarity, labels, truth)), strict=True):
        predicted = count_votes(near, which, classes, temperature).argmax(1)
        places += torch.bincount((true * classes + predicted).cpu(), minlength=classes * classes)
    return places.view(classes, classes).numpy()


def _neighbours(arrays, title):
    rows, count = arrays["neighbour_similarity"].shape
    figure = Figure(figsize=(1.15 * (count + 1), 1.3 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, count + 1, squeeze=False)
    for row in range(rows):
        truth = str(arrays["query_labels"][row])
        _image(grid[row, 0], arrays["query_images"][row], _short(truth), "black")
        for column in range(count):
            label = str(arrays["neighbour_labels"][row, column])
            text = f"{arrays['neighbour_similarity'][row, column]:.2f} {_short(label)}"
            same = label == truth
            _image(grid[row, column + 1], arrays["neighbour_images"][row, column], text, _GREEN if same else _RED)
    figure.suptitle(f"{title}\nleft: validation images; then their nearest training images, with cosine", fontsize=8)
    return figure


def _image(axes, pixels, text, color):
    axes.imshow(pixels)
    axes.set_title(text, fontsize=6, color=color, parse_math=False)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color=color, linewidth=2)


def _projection(arrays, title):
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    axes, labels = figure.add_subplot(), arrays["point_labels"].astype(str)
    for index, name in enumerate(sorted(set(labels.tolist()))):
        there = arrays["points"][labels == name]
        axes.scatter(there[:, 0], there[:, 1], s=12, marker="os^vDPX*<>"[index % 10], label=_short(name), alpha=0.8)
    first, second = 100 * arrays["explained"]
    axes.set_xlabel(f"component 1, {first:.1f} % of the variance")
    axes.set_ylabel(f"component 2, {second:.1f} %")
    axes.set_title(f"{title}\nvalidation images on two principal components", fontsize=8)
    figure.legend(loc="outside right upper", fontsize=7)
    return figure


def _short(name):
    return name if len(name) <= LETTERS else f"{name[: LETTERS - 1]}…"


def _save(figure, path):
    FigureCanvasAgg(figure)
    with written(path):
        figure.savefig(path, dpi=120, metadata={"Software": None})

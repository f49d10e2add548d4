"""Thumbnails and class markers of a page, from the arrays of pictures.npz (see `fastsiam.evaluate.gallery`)."""

import base64
import io

import numpy as np
from markupsafe import Markup
from PIL import Image

from fastsiam.report import plots
from fastsiam.report.read_run import Run

# Shapes of `plots.CLASS_MARKERS` as SVG paths, in a box of 10 x 10.
MARKS = (
    "M5 1a4 4 0 1 0 0 8a4 4 0 1 0 0-8z",
    "M1.5 1.5h7v7h-7z",
    "M5 1l4.5 8h-9z",
    "M5 9l4.5-8h-9z",
    "M5 .5l4.5 4.5l-4.5 4.5l-4.5-4.5z",
    "M3.6 1h2.8v2.6h2.6v2.8h-2.6v2.6h-2.8v-2.6h-2.6v-2.8h2.6z",
    "M1 3l2-2l2 2l2-2l2 2l-2 2l2 2l-2 2l-2-2l-2 2l-2-2l2-2z",
    "M5 .5l1.3 3.1l3.3.3l-2.5 2.2l.8 3.3l-2.9-1.8l-2.9 1.8l.8-3.3l-2.5-2.2l3.3-.3z",
    "M1 5l8-4.5v9z",
    "M9 5l-8-4.5v9z",
)


def pairs(pictures: dict) -> list[tuple]:
    """Returns (first view, second view, name, label) of images of the first step; empty where the run has none."""
    if "pair_images" not in pictures:
        return []
    first, second = pictures["pair_images"]
    return _rows({**pictures, "first": first, "second": second}, "first", "second", "pair_names", "pair_labels")


def neighbours(pictures: dict) -> list[tuple]:
    """Returns (image, name, label, neighbours) of validation images.

    Neighbours are (image, name, label, similarity as text) of the most similar training images.
    """
    near = [f"neighbour_{of}" for of in ("images", "names", "labels", "similarity")]
    return [
        (image, name, label, [(*one, f"{value:.2f}") for *one, value in zip(*nearest, strict=True)])
        for image, name, label, *nearest in _rows(pictures, "query_images", "query_names", "query_labels", *near)
    ]


def projection(run: Run, index: int) -> tuple[Markup, list[str]] | None:
    """Returns the plot of validation images in two dimensions as SVG, and its classes; `index` makes its ids unique."""
    rows = _rows(run.pictures, "points", "point_labels")
    if not rows or "explained" not in run.pictures:
        return None
    labels = run.pictures["point_labels"].astype(str)
    classes = sorted(set(labels.tolist()))[: len(plots.CLASS_MARKERS)]
    figure = plots.projection(run.pictures["points"], labels, run.pictures["explained"], classes)
    label = f"{run.name}: validation images by the first two principal components"
    return plots.to_svg(figure, f"projection-{index}", label), classes


def is_small(pixels: np.ndarray) -> bool:
    """True up to the side where a PNG, which loses nothing, costs little; a larger JPEG has a fifth of its bytes."""
    return max(pixels.shape[:2]) <= 64


def data_uri(pixels: np.ndarray) -> str:
    """Returns uint8 [H, W, 3] as the address of an `<img>` that holds its bytes."""
    buffer = io.BytesIO()
    kind, options = ("png", {"optimize": True}) if is_small(pixels) else ("jpeg", {"quality": 85})
    Image.fromarray(pixels).save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _rows(arrays: dict, *names: str) -> list[tuple]:
    """Returns the rows of arrays of one length; none where one is missing or shorter."""
    if any(name not in arrays for name in names) or len({len(arrays[name]) for name in names}) > 1:
        return []
    return list(zip(*(arrays[name] for name in names), strict=True))

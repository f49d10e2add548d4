"""Thumbnails and class legends of a page, from the arrays of pictures.npz (see `fastsiam.evaluate.gallery`)."""

import base64
import io
from collections.abc import Callable
from html import escape

import numpy as np
from PIL import Image

from fastsiam.report import plots

# Up to this side PNG is smaller than it matters and loses nothing; above, a JPEG has a fifth of its bytes.
_PNG_SIDE = 64


def has(pictures: dict, *names: str) -> bool:
    """Whether all arrays are there, and as many of one thing as of the next."""
    return all(name in pictures for name in names) and len({len(pictures[name]) for name in names}) == 1


def pairs(pictures: dict) -> str:
    """The view pairs of the first step; empty where the run has none."""
    if not has(pictures, "pair_names", "pair_labels") or "pair_images" not in pictures:
        return ""
    found = []
    for first, second, name, label in zip(
        *pictures["pair_images"], pictures["pair_names"], pictures["pair_labels"], strict=False
    ):
        found.append(
            f'<figure><div class="two">{image(first, f"first view of {name}")}{image(second, f"second view of {name}")}'
            f"</div><figcaption>{outside(label) + ', ' if label else ''}{outside(_short(name))}</figcaption></figure>"
        )
    return f'<div class="pairs">{"".join(found)}</div>'


def neighbours(pictures: dict) -> str:
    """A row for each query: the image, and what of the training images is most similar; empty where there is none."""
    names = [f"{of}_{what}" for of in ("query", "neighbour") for what in ("images", "names", "labels")]
    if not has(pictures, *names, "neighbour_similarity"):
        return ""
    rows = []
    for query, name, label, images, near_names, near_labels, similarity in zip(
        *(pictures[key] for key in (*names, "neighbour_similarity")), strict=True
    ):
        cells = [_cell("query", query, f"validation image {name}, {label}", outside(label))]
        for near, near_name, near_label, value in zip(images, near_names, near_labels, similarity, strict=True):
            kind = "same" if near_label == label else "other"
            told = f"{near_name}, {near_label}, similarity {value:.2f}, {kind} class"
            cells.append(
                _cell(kind, near, told, f"{value:.2f}" + ("" if kind == "same" else f"<br>{outside(near_label)}"))
            )
        rows.append(f'<div class="row">{"".join(cells)}</div>')
    return f'<div class="neighbours">{"".join(rows)}</div>'


def projection(pictures: dict, key: str, describe: Callable[[str], str]) -> str:
    """The plot of validation images in two dimensions with its legend; empty where there is none."""
    if not has(pictures, "points", "point_labels") or "explained" not in pictures or not len(pictures["points"]):
        return ""
    labels = pictures["point_labels"].astype(str)
    classes = sorted(set(labels.tolist()))[: len(plots.CLASS_MARKERS)]
    figure = plots.projection(pictures["points"], labels, pictures["explained"], classes)
    svg = plots.to_svg(figure, key, escape(describe("validation images by the first two principal components")))
    legend = "".join(
        f'<li><svg class="mark" viewBox="0 0 10 10" aria-hidden="true" style="width:11px;display:inline-block">'
        f'<path d="{_MARKS[index]}" style="fill:var(--k{index})"/></svg> {outside(name) if name else "no label"}</li>'
        for index, name in enumerate(classes)
    )
    return f'<div class="projection"><figure>{svg}</figure><ul class="classes">{legend}</ul></div>'


def image(pixels: np.ndarray, alt: str) -> str:
    """An `<img>` of uint8 [H, W, 3], its bytes in it."""
    height, width = pixels.shape[:2]
    small = max(height, width) <= _PNG_SIDE
    buffer = io.BytesIO()
    if small:
        Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    else:
        Image.fromarray(pixels).save(buffer, "JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<img{" class=small" if small else ""} src="data:image/{"png" if small else "jpeg"};base64,{data}" '
        f'width="{width}" height="{height}" alt="{escape(alt)}" title="{escape(alt)}">'
    )


def outside(text: object) -> str:
    """Text from outside: nothing of it is markup, and its direction of writing stays its own."""
    return f"<bdi>{escape(str(text))}</bdi>"


def _short(name: str) -> str:
    """The end of a long name, where names differ."""
    return name if len(name) <= 48 else "…" + name[-47:]


def _cell(kind, pixels, alt, caption):
    return f'<figure class="{kind}">{image(pixels, alt)}<figcaption>{caption}</figcaption></figure>'


# The shapes of `plots.CLASS_MARKERS`, in a box of 10 x 10.
_MARKS = (
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

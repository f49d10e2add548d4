"""Views of a batch as one picture, and a table of its images."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastsiam.config.views import ViewGroup
from fastsiam.errors import UserError, printable
from fastsiam.evaluate.gallery import to_uint8
from fastsiam.runtime.files import replace_file

GAP = 2
# Beyond every pixel value after normalisation.
_FAR = 1e4
_HEAD = ("row", "image", "class", "replaces", "loss")


@dataclass
class Shown:
    """A batch of N images as a replay shows it."""

    names: Sequence[str]
    classes: Sequence[str]
    """"" without a label."""
    replaced: Sequence[str]
    """Name of the excluded image in whose place this one came; "" for none."""
    losses: np.ndarray | None = None
    """[N] float64; None where no loss was computed."""
    first: list[int] = field(default_factory=list)
    """Images that come before all others in the picture."""

    def rows(self, count: int) -> list[int]:
        """The images in the order of the picture's rows, at most `count`."""
        rest = (image for image in range(len(self.names)) if image not in set(self.first))
        return [*self.first, *rest][:count]


def write_pictures(
    folder: Path, views: list[torch.Tensor], groups: tuple[ViewGroup, ...], shown: Shown, count: int
) -> None:
    """Writes views.png, with `count` rows at most, and images.tsv with all images, into a folder that it makes.

    `views`: [V_g*N, 3, S_g, S_g] a group. Raises `UserError` where the disk refuses.
    """
    rows = shown.rows(count)
    cells = [_cells(*group, len(shown.names), rows) for group in zip(views, groups, strict=True)]
    picture = Image.fromarray(grid(cells))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / "views.png.tmp"
        try:
            picture.save(temporary, "PNG")
            temporary.replace(folder / "views.png")
        finally:
            temporary.unlink(missing_ok=True)
        replace_file(folder / "images.tsv", _table(shown, rows).encode(errors="backslashreplace"))
    except OSError as error:
        raise UserError(
            f"--out: cannot write into {folder} ({error.strerror or error}); choose another folder", "replay-unwritten"
        ) from error


def grid(groups: Sequence[np.ndarray]) -> np.ndarray:
    """Returns one picture [H, W, 3] uint8 of groups of cells [R, V_g, S_g, S_g, 3]: rows down, views to the right."""
    height = max(cells.shape[2] for cells in groups)
    columns = []
    for cells in groups:
        side = cells.shape[2]
        framed = np.full((*cells.shape[:2], height + GAP, side + GAP, 3), 255, np.uint8)
        framed[:, :, :side, :side] = cells
        columns.append(framed.transpose(0, 2, 1, 3, 4).reshape(len(cells) * (height + GAP), -1, 3))
    return np.concatenate(columns, 1)[:-GAP, :-GAP]


def _cells(views, group, num_images, rows):
    chosen = views.unflatten(0, (group.count, num_images))[:, rows].transpose(0, 1)
    # A cast of NaN to a byte is whatever the hardware makes of it: black here.
    finite = torch.nan_to_num(chosen.flatten(0, 1).float(), nan=-_FAR, posinf=_FAR, neginf=-_FAR)
    pixels = to_uint8(finite, group.spec, views.shape[-1])
    return pixels.reshape(len(rows), group.count, *pixels.shape[1:])


def _table(shown, rows):
    place = {image: row for row, image in enumerate(rows, 1)}
    lines = [_HEAD]
    for image, (name, label, replaced) in enumerate(zip(shown.names, shown.classes, shown.replaced, strict=True)):
        loss = "" if shown.losses is None else f"{shown.losses[image]:.6g}"
        lines.append((str(place.get(image, "")), name, label, replaced, loss))
    return "".join("\t".join(map(_cell, line)) + "\n" for line in lines)


def _cell(text):
    return printable(text).replace("\t", "\\t").replace("\n", "\\n")

"""Images with boxes, checked before training; what the checks changed is told in one line each."""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from fastsiam.data.sources.image_header import orientation
from fastsiam.errors import UserError

# Orientations of EXIF that exchange width and height.
_TRANSPOSED = (5, 6, 7, 8)
_SHOWN = 3
# A file is refused where more boxes than the first share leave their image as x, y, width, height, and more than the
# second lie inside it as two corners. Real boxes rarely leave their image, and rarely are wider than their x.
_OUTSIDE, _AS_CORNERS = 0.01, 0.95


@dataclass(frozen=True)
class AnnotatedImage:
    """An image and its objects. A box is x1, y1, x2, y2 in pixels of the image, of which (0, 0) is the top left corner.

    `labels` count from 1, the place of the class in `Annotations.classes` plus 1; 0 is the background.
    """

    path: Path
    height: int
    width: int
    boxes: np.ndarray
    """float64 [N, 4]."""
    labels: np.ndarray
    """int64 [N]."""
    area: np.ndarray
    """float64 [N], square pixels."""
    crowd: np.ndarray
    """bool [N]: a box around many objects; not trained on, and no error where something is found in it."""
    difficult: np.ndarray
    """bool [N]: VOC's mark; trained on, ignored in evaluation."""
    segments: tuple | None = None
    """Of each object its polygons, a tuple of arrays [2 K] of x and y in turn, or COCO's run lengths.

    None for annotations without outlines.
    """
    as_stored: bool = False
    """The boxes count the pixels as the file stores them, and not as EXIF turns them."""

    def kept(self, keep: np.ndarray) -> "AnnotatedImage":
        """The image with the objects of `keep`, bool [N]."""
        segments = self.segments and tuple(self.segments[i] for i in np.flatnonzero(keep))
        arrays = {name: getattr(self, name)[keep] for name in ("boxes", "labels", "area", "crowd", "difficult")}
        return replace(self, **arrays, segments=segments)


@dataclass(frozen=True)
class Annotations:
    """Images of one split. `form` is coco or voc; `notes` are lines for the user."""

    form: str
    images: tuple[AnnotatedImage, ...]
    classes: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def boxes(self) -> int:
        return sum(len(image.boxes) for image in self.images)


def check_boxes(boxes: np.ndarray, sizes: np.ndarray, key: str, path: Path) -> None:
    """Raises `UserError` where boxes that should be x, y, width, height look like two corners, or like fractions.

    `boxes`: [N, 4]; `sizes`: [N, 2], width and height in pixels of each box's image.
    """
    if not len(boxes):
        return
    if boxes.max() <= 1:
        text = f"{key}: no number in the boxes of {path} is above 1; COCO's boxes are in pixels, not in shares"
        raise UserError(text, "boxes-in-shares")
    first, second = boxes[:, :2], boxes[:, 2:]
    outside = (first + second > sizes + 1).any(1).mean()
    corners = ((second >= first) & (second <= sizes + 1)).all(1).mean()
    if outside > _OUTSIDE and corners > _AS_CORNERS:
        text = (
            f"{key}: the boxes of {path} look like x1, y1, x2, y2: read as COCO's x, y, width, height, "
            f"{100 * outside:.0f} % of them leave their image; store width and height"
        )
        raise UserError(text, "boxes-are-corners")


def with_sizes(paths: Sequence[Path], declared: Sequence[tuple[int, int] | None], key: str):
    """Sizes and ways of reading of image files, `[(height, width, as_stored)]`, and notes on them.

    `declared`: the width and height that the annotations give an image. Raises `UserError` for files that are missing,
    that are no images, or that have another size.
    """
    folders = {folder: set() for folder in {path.parent for path in paths}}
    for folder, names in folders.items():
        if folder.is_dir():
            names.update(path.name for path in folder.iterdir())
    missing = [path for path in paths if path.name not in folders[path.parent]]
    if missing:
        raise UserError(
            f"{key}: {len(missing):,} of {len(paths):,} images are not on the disk ({_first(missing)}); put them into "
            f"{missing[0].parent}, or for a JSON file give their folder with {key}-images",
            "images-missing",
        )
    with ThreadPoolExecutor(8) as pool:
        headers = list(pool.map(_header, paths))
    broken = [path for path, header in zip(paths, headers, strict=True) if header is None]
    if broken:
        text = f"{key}: {len(broken):,} of {len(paths):,} images cannot be read ({_first(broken)}); mend or remove them"
        raise UserError(text, "images-unreadable")
    found, wrong, stored = [], [], 0
    for path, (size, turned), said in zip(paths, headers, declared, strict=True):
        shown = size[::-1] if turned in _TRANSPOSED else size
        as_stored = said == size != shown
        stored += as_stored
        if said not in (None, size, shown):
            wrong.append(f"{path.name} has {shown[0]}x{shown[1]}, not {said[0]}x{said[1]}")
        width, height = size if as_stored else shown
        found.append((height, width, as_stored))
    if wrong:
        text = (
            f"{key}: {len(wrong):,} images have another size than their annotations say ({', '.join(wrong[:_SHOWN])}); "
            "give the images that were annotated"
        )
        raise UserError(text, "image-size-differs")
    turned = sum(header[1] != 1 for header in headers) - stored
    notes = [f"{turned:,} images are turned as EXIF says"] if turned else []
    notes += [f"{stored:,} images are not turned by EXIF: their annotations count stored pixels"] if stored else []
    return found, notes


def _header(path):
    """(width, height) as stored, and EXIF's orientation; None for what is no image."""
    try:
        with Image.open(path) as image:
            return image.size, orientation(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


def _first(paths):
    return ", ".join(path.name for path in paths[:_SHOWN]) + (", ..." if len(paths) > _SHOWN else "")


def with_sound_boxes(images: Sequence[AnnotatedImage], notes: list[str]) -> tuple[AnnotatedImage, ...]:
    """The images with boxes cut to them and without boxes that have no area then; adds what was done to `notes`."""
    done, sound = Counter(), []
    for image in images:
        limits = np.array([image.width, image.height] * 2, float)
        with np.errstate(invalid="ignore"):
            boxes = np.clip(image.boxes, 0, limits)
        keep = np.isfinite(image.boxes).all(1) & (boxes[:, 2:] > boxes[:, :2]).all(1)
        # An annotation may lie half a pixel outside without being wrong.
        done["cut"] += int((np.abs(boxes - image.boxes)[keep] > 1).any(1).sum())
        done["dropped"] += int((~keep).sum())
        sound.append(replace(image, boxes=boxes).kept(keep))
        done["empty"] += not keep.any()
    notes += [f"{done['cut']:,} boxes that left their image were cut to it"] if done["cut"] else []
    notes += [f"{done['dropped']:,} boxes without width or height were dropped"] if done["dropped"] else []
    notes += [f"{done['empty']:,} images have no box; they are kept"] if done["empty"] else []
    return tuple(sound)


def relabelled(val: Annotations, classes: tuple[str, ...]) -> Annotations:
    """The validation images with the labels of the training classes; raises `UserError` for a class that lacks there.

    A class that is declared and has no box is none.
    """
    used = {int(label) for image in val.images for label in np.unique(image.labels)}
    lacking = [name for label, name in enumerate(val.classes, 1) if label in used and name not in classes]
    if lacking:
        raise UserError(
            f"--val: {len(lacking)} of its categories have no boxes in --train ({', '.join(lacking[:_SHOWN])}); "
            "a detector cannot find what it was not trained on",
            "unknown-classes",
        )
    table = np.array([0, *(classes.index(name) + 1 if name in classes else 0 for name in val.classes)])
    absent = len(classes) - len({val.classes[label - 1] for label in used})
    notes = [f"{absent} of {len(classes)} classes have no box here and are left out of the mean"] if absent else []
    images = tuple(replace(image, labels=table[image.labels]) for image in val.images)
    return replace(val, images=images, classes=classes, notes=(*val.notes, *notes))


def check_apart(train: Annotations, val: Annotations) -> None:
    """Raises `UserError` where an image is in both."""
    both = sorted({image.path.resolve() for image in train.images} & {image.path.resolve() for image in val.images})
    if both:
        text = f"--val: {len(both):,} of its images are in --train too ({_first(both)}); choose other splits"
        raise UserError(text, "splits-overlap")


def check_masks(annotations: Annotations, key: str) -> None:
    """Raises `UserError` where an object to train on has no outline."""
    if annotations.form == "voc":
        text = f"{key}: boxes in VOC's format have no outlines, which --model mask_rcnn needs; use --model faster_rcnn"
        raise UserError(text, "no-outlines")
    without = sum(not outline for image in annotations.images for outline in image.segments)
    if without:
        text = (
            f"{key}: {without:,} objects have no segmentation, which --model mask_rcnn needs; use --model faster_rcnn"
        )
        raise UserError(text, "no-outlines")


def without_outlines(annotations: Annotations) -> Annotations:
    """The same boxes; outlines that no one uses take more memory than the boxes."""
    return replace(annotations, images=tuple(replace(image, segments=None) for image in annotations.images))

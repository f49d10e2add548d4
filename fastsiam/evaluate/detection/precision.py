"""Average precision of detections: COCO's by pycocotools, and VOC 2007's of 11 points, which is another number."""

import contextlib
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fastsiam.errors import MissingLibraryError
from fastsiam.evaluate.detection.annotations import AnnotatedImage
from fastsiam.evaluate.detection.loader import outlines

EVALUATORS = ("pycocotools", "faster-coco-eval")
# Places in COCOeval.stats.
_COCO = {"ap": 0, "ap50": 1, "ap75": 2, "ap_small": 3, "ap_medium": 4, "ap_large": 5}
# COCOeval ignores an object whose area is in no range, and still lets it take the box that finds it.
_IGNORED_AREA = -1.0
_FROM_ONE = np.array([1.0, 1.0, 0.0, 0.0])
_VOC_THRESHOLDS = tuple(np.linspace(0.5, 0.95, 10))


class Detections(NamedTuple):
    """What a detector found on one image, in its pixels."""

    boxes: np.ndarray
    """fp32 [N, 4] as two corners."""
    scores: np.ndarray
    """fp32 [N]."""
    labels: np.ndarray
    """int64 [N] from 1."""
    masks: tuple[dict, ...] | None = None
    """COCO's compressed run lengths."""


def check_evaluator(name: str) -> None:
    """Raises `MissingLibraryError` where the library, or pycocotools, which packs masks, is not installed."""
    for needed in ("pycocotools", name):
        try:
            _library(needed)
        except ImportError as error:
            text = f"--evaluator: {needed} is not installed; pip install {needed}"
            raise MissingLibraryError(text, "no-coco-evaluator", name=needed.replace("-", "_")) from error


def coco_ap(
    images: Sequence[AnnotatedImage],
    found: Sequence[Detections],
    classes: int,
    kind: str = "bbox",
    evaluator: str = "pycocotools",
) -> dict[str, float | None]:
    """`ap` (mean over IoU 0.50:0.05:0.95), `ap50`, `ap75`, and `ap_small`, `ap_medium`, `ap_large` in percent.

    `found`: of the same images. `kind`: bbox or segm. None where no object has such an area; without any detection
    the precision is 0 (COCOeval raises an IndexError). Classes without objects are left out of the mean. Crowds and
    difficult objects are neither hits nor misses. At most 100 detections of an image count.
    """
    dataset, evaluation = _library(evaluator)
    # COCOeval prints its progress and its table.
    with contextlib.redirect_stdout(io.StringIO()):
        truth = dataset()
        truth.dataset = _as_coco(images, classes, kind)
        truth.createIndex()
        rows = _rows(found, kind)
        if not rows:
            return _without_detections(truth.dataset["annotations"])
        run = evaluation(truth, truth.loadRes(rows), kind)
        run.evaluate()
        run.accumulate()
        run.summarize()
    values = {name: float(run.stats[place]) for name, place in _COCO.items()}
    return {name: None if value < 0 else 100 * value for name, value in values.items()}


def _library(name):
    if name == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        return COCO, COCOeval
    from faster_coco_eval import COCO, COCOeval_faster

    return COCO, COCOeval_faster


def _as_coco(images, classes, kind):
    annotations = []
    for number, image in enumerate(images, 1):
        segments = outlines(image) if kind == "segm" else [None] * len(image.boxes)
        for place in range(len(image.boxes)):
            left, top, right, bottom = map(float, image.boxes[place])
            annotations.append(
                {
                    # From 1: an object with id 0 counts as never found.
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": int(image.labels[place]),
                    "bbox": [left, top, right - left, bottom - top],
                    "area": _IGNORED_AREA if image.difficult[place] else float(image.area[place]),
                    "iscrowd": int(image.crowd[place]),
                    **({"segmentation": segments[place]} if kind == "segm" else {}),
                }
            )
    return {
        "info": {},
        "images": [{"id": n, "width": one.width, "height": one.height} for n, one in enumerate(images, 1)],
        "categories": [{"id": label, "name": str(label)} for label in range(1, classes + 1)],
        "annotations": annotations,
    }


def _rows(found, kind):
    rows = []
    for number, one in enumerate(found, 1):
        for place, (left, top, right, bottom) in enumerate(one.boxes.tolist()):
            shape = (
                {"bbox": [left, top, right - left, bottom - top]}
                if kind == "bbox"
                else {"segmentation": one.masks[place]}
            )
            what = {"image_id": number, "category_id": int(one.labels[place]), "score": float(one.scores[place])}
            rows.append(what | shape)
    return rows


def _without_detections(annotations):
    areas = np.array([one["area"] for one in annotations if not one["iscrowd"]])
    ranges = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}
    known = {f"ap_{name}": ((areas >= low) & (areas <= high)).any() for name, (low, high) in ranges.items()}
    everything = dict.fromkeys(("ap", "ap50", "ap75"), (areas >= 0).any())
    return {name: 0.0 if any_object else None for name, any_object in (everything | known).items()}


def voc07_ap(images: Sequence[AnnotatedImage], found: Sequence[Detections], classes: int) -> dict[str, float | None]:
    """`ap_voc07` (mean over IoU 0.50:0.05:0.95), `ap50_voc07`, `ap75_voc07` in percent, as VOC 2007's kit counts.

    Precision is read at 11 values of recall. A box includes its last pixel, so that widths are one more; a hit has an
    IoU strictly above the threshold; difficult objects are neither hits nor misses; a second box on an object is an
    error. Scores have 3 digits and coordinates 1, as the kit's text files do (detectron2 writes those too). Classes
    without objects are left out; None where there are no others. Images are those of VOC: a box's first pixel counts
    from 1 in the kit, from 0 in `AnnotatedImage` and `Detections`.
    """
    table = [_class_ap(images, found, label) for label in range(1, classes + 1)]
    known = np.array([row for row in table if row is not None])
    if not len(known):
        return dict.fromkeys(("ap_voc07", "ap50_voc07", "ap75_voc07"))
    mean = 100 * known.mean(0)
    return {"ap_voc07": float(mean.mean()), "ap50_voc07": float(mean[0]), "ap75_voc07": float(mean[5])}


def _class_ap(images, found, label):
    """AP of one class at each threshold; None where it has no object."""
    truth = [image.kept((image.labels == label) & ~image.crowd) for image in images]
    objects = sum(int((~image.difficult).sum()) for image in truth)
    if not objects:
        return None
    mine = [one.labels == label for one in found]
    scores = np.concatenate([one.scores[keep] for one, keep in zip(found, mine, strict=True)]).astype(float).round(3)
    owner = np.repeat(np.arange(len(found)), [int(keep.sum()) for keep in mine])
    boxes = np.concatenate([one.boxes[keep] for one, keep in zip(found, mine, strict=True)]).astype(float)
    order = np.argsort(-scores, kind="stable")
    matched = [_best(truth[owner[place]], boxes[place]) for place in order]
    rows = []
    for threshold in _VOC_THRESHOLDS:
        taken, hits, errors = set(), np.zeros(len(order)), np.zeros(len(order))
        for rank, (place, (overlap, which)) in enumerate(zip(order, matched, strict=True)):
            is_hit = overlap > threshold
            if is_hit and truth[owner[place]].difficult[which]:
                continue
            target = (owner[place], which)
            hits[rank], errors[rank] = is_hit and target not in taken, not is_hit or target in taken
            taken.update([target] if is_hit else [])
        rows.append(_eleven_points(hits, errors, objects))
    return rows


def _best(image, box):
    """The largest overlap of a box with the objects of an image, and the place of that object."""
    if not len(image.boxes):
        return -np.inf, 0
    # The kit's pixels: the first one counts from 1, and the last one is a part of the box.
    box, truth = (box + _FROM_ONE).round(1), image.boxes + _FROM_ONE
    shared = np.minimum(truth[:, 2:], box[2:]) - np.maximum(truth[:, :2], box[:2]) + 1
    common = shared.clip(0).prod(1)
    union = (truth[:, 2:] - truth[:, :2] + 1).prod(1) + (box[2:] - box[:2] + 1).prod() - common
    overlaps = common / union
    return overlaps.max(), int(overlaps.argmax())


def _eleven_points(hits, errors, objects):
    hits, errors = hits.cumsum(), errors.cumsum()
    recall, precision = hits / objects, hits / np.maximum(hits + errors, np.finfo(float).eps)
    return sum(precision[recall >= level].max(initial=0) for level in np.arange(0, 1.1, 0.1)) / 11

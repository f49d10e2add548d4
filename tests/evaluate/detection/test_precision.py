"""Average precision: COCO's traps, the two evaluators, and VOC 2007's by hand."""

from pathlib import Path

import numpy as np
import pytest

from fastsiam.evaluate.detection.annotations import AnnotatedImage
from fastsiam.evaluate.detection.precision import Detections, check_evaluator, coco_ap, voc07_ap
from tests.support.refusals import refuses


def image(*rows, side=200):
    """An image with objects (label, x1, y1, x2, y2[, "difficult" or "crowd"])."""
    boxes = np.array([row[1:5] for row in rows], float).reshape(-1, 4)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    marks = {mark: np.array([mark in row for row in rows], bool) for mark in ("crowd", "difficult")}
    return AnnotatedImage(Path("x"), side, side, boxes, np.array([row[0] for row in rows], int), area, **marks)


def found(*rows):
    """Detections (score, label, x1, y1, x2, y2)."""
    table = np.array(rows, np.float32).reshape(-1, 6)
    return Detections(table[:, 2:], table[:, 0], table[:, 1].astype(int))


@pytest.mark.needs("pycocotools")
def test_perfect_boxes_have_precision_one():
    """With pycocotools's id 0 for the first object the precision were below."""
    truth = [image((1, 10, 10, 40, 40), (2, 50, 50, 80, 90)), image(), image((1, 5, 5, 20, 30))]
    perfect = [found((0.9, 1, 10, 10, 40, 40), (0.8, 2, 50, 50, 80, 90)), found(), found((0.7, 1, 5, 5, 20, 30))]
    values = coco_ap(truth, perfect, 3)
    assert values.pop("ap_large") is None
    assert values == pytest.approx(dict.fromkeys(("ap", "ap50", "ap75", "ap_small", "ap_medium"), 100))


@pytest.mark.needs("pycocotools")
def test_without_detections_the_precision_is_zero():
    truth = [image((1, 10, 10, 40, 40)), image()]
    nothing = coco_ap(truth, [found(), found()], 1)
    assert nothing == {"ap": 0, "ap50": 0, "ap75": 0, "ap_small": 0, "ap_medium": None, "ap_large": None}
    assert voc07_ap(truth, [found(), found()], 1) == {"ap_voc07": 0, "ap50_voc07": 0, "ap75_voc07": 0}
    assert set(coco_ap([image()], [found()], 1).values()) == {None}
    assert set(coco_ap([image()], [found((0.5, 1, 1, 1, 9, 9))], 1).values()) == {None}
    assert set(voc07_ap([image()], [found()], 1).values()) == {None}


@pytest.mark.needs("pycocotools")
def test_difficult_objects_and_crowds_are_neither_hits_nor_misses():
    """A second box on an object, or one beside it, is an error; boxes in a crowd are none."""
    box, beside = (10, 10, 40, 40), (100, 100, 140, 140)
    right = (0.5, 1, *box)
    for mark in ("difficult", "crowd"):
        truth = [image((1, *box), (1, *beside, mark))]
        for boxes in (found((0.9, 1, *beside), right), found(right)):
            assert coco_ap(truth, [boxes], 1)["ap"] == pytest.approx(100)
        assert voc07_ap(truth, [found((0.9, 1, *beside), right)], 1)["ap50_voc07"] == 100 - 50 * (mark == "crowd")
    assert coco_ap([image((1, *box))], [found((0.9, 1, *beside), right)], 1)["ap"] == pytest.approx(50)
    assert voc07_ap([image((1, *box))], [found((0.9, 1, *box), right)], 1)["ap_voc07"] == 100


def random_case(generator):
    truth, boxes = [], []
    for _ in range(25):
        count = int(generator.integers(0, 5))
        corners = generator.uniform(0, 150, (count, 2))
        edges = np.concatenate([corners, corners + generator.uniform(5, 120, (count, 2))], 1)
        labels = generator.integers(1, 4, count)
        marks = [("difficult",) if draw < 0.2 else ("crowd",) if draw < 0.3 else () for draw in generator.random(count)]
        truth.append(image(*((label, *edge, *mark) for label, edge, mark in zip(labels, edges, marks, strict=True))))
        pick = generator.integers(0, count, 3 * count) if count else []
        moved = [(generator.random(), labels[p], *(edges[p] + generator.normal(0, 6, 4))) for p in pick]
        boxes.append(found(*moved))
    return truth, boxes


@pytest.mark.needs("pycocotools", "faster-coco-eval")
def test_both_evaluators_agree():
    truth, boxes = random_case(np.random.default_rng(0))
    slow, fast = (coco_ap(truth, boxes, 3, evaluator=name) for name in ("pycocotools", "faster-coco-eval"))
    assert slow == pytest.approx(fast, abs=1e-9)
    assert 10 < slow["ap"] < 60


def voc_by_loops(truth, boxes, label, threshold):
    """VOC 2007's AP of one class from its description, a box at a time."""
    rows = [
        (round(float(score), 3), number, [round(float(edge), 1) for edge in (box + np.float32([1, 1, 0, 0]))])
        for number, one in enumerate(boxes)
        for box, score, found_label in zip(one.boxes, one.scores, one.labels, strict=True)
        if found_label == label
    ]
    rows.sort(key=lambda row: -row[0])
    objects = {
        number: [
            ([box[0] + 1, box[1] + 1, box[2], box[3]], bool(difficult))
            for box, mine, crowd, difficult in zip(one.boxes, one.labels, one.crowd, one.difficult, strict=True)
            if mine == label and not crowd
        ]
        for number, one in enumerate(truth)
    }
    total = sum(not difficult for rows_of in objects.values() for _, difficult in rows_of)
    taken, points, hits, errors = set(), [], 0, 0
    for _, number, box in rows:
        best, place = 0.0, None
        for which, (other, _) in enumerate(objects[number]):
            width = min(box[2], other[2]) - max(box[0], other[0]) + 1
            height = min(box[3], other[3]) - max(box[1], other[1]) + 1
            if width > 0 and height > 0:
                areas = [(one[2] - one[0] + 1) * (one[3] - one[1] + 1) for one in (box, other)]
                overlap = width * height / (sum(areas) - width * height)
                best, place = (overlap, which) if overlap > best else (best, place)
        if best > threshold and objects[number][place][1]:
            continue
        is_hit = best > threshold and (number, place) not in taken
        taken |= {(number, place)} if is_hit else set()
        hits, errors = hits + is_hit, errors + (not is_hit)
        points.append((hits / total, hits / (hits + errors)))
    return sum(max((p for r, p in points if r >= level), default=0) for level in np.arange(0, 1.1, 0.1)) / 11


def test_voc_equals_a_loop_over_its_description():
    truth, boxes = random_case(np.random.default_rng(1))
    expected = np.array([[voc_by_loops(truth, boxes, c, t) for t in np.linspace(0.5, 0.95, 10)] for c in (1, 2, 3)])
    names = voc07_ap(truth, boxes, 3)
    assert names["ap_voc07"] == pytest.approx(100 * expected.mean(), abs=1e-9)
    assert names["ap50_voc07"] == pytest.approx(100 * expected[:, 0].mean(), abs=1e-9)
    assert names["ap75_voc07"] == pytest.approx(100 * expected[:, 5].mean(), abs=1e-9)


def test_voc_by_hand():
    """Pixels 0 to 9 and 0 to 19 of 10 rows: an overlap of one half is no hit; two of three objects give 7 of 11 points.

    COCO's boxes of the same corners share 10 of 20 pixels as well.
    """
    half = [image((1, 0, 0, 20, 10))]
    assert voc07_ap(half, [found((0.9, 1, 0, 0, 10, 10))], 1)["ap50_voc07"] == 0
    assert voc07_ap(half, [found((0.9, 1, 0, 0, 11, 10))], 1)["ap50_voc07"] == 100
    three = [image((1, 0, 0, 20, 10), (1, 50, 50, 70, 70), (1, 100, 100, 130, 130))]
    two = [found((0.9, 1, 0, 0, 20, 10), (0.8, 1, 50, 50, 70, 70))]
    assert voc07_ap(three, two, 1)["ap_voc07"] == pytest.approx(700 / 11)


def test_a_missing_evaluator_is_refused(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faster_coco_eval", None)
    with refuses("no-coco-evaluator", "--evaluator"):
        check_evaluator("faster-coco-eval")

#!/usr/bin/env bash
# pycocotools 2.0.11: the annotation with id 0 never counts as found. COCOeval writes the matched id into an array of
# zeros and reads 0 as "no match", so this object's detection is a false positive, without a warning. A converter that
# numbers with enumerate() lowers the average precision of that object's category: by nearly half where it has four
# objects, as in a small validation set.
#
# Needs Python 3.11 or later; installs pycocotools 2.0.11 and NumPy 2.4.6 into a temporary folder. Exits with 1 once ids
# from 0 no longer lower the result. Seen with Python 3.11, x86-64:
#   pycocotools 2.0.11, 4 images of one box each, detections equal to the boxes
#   annotation ids from 1: AP 1.000, recall 1.000
#   annotation ids from 0: AP 0.564, recall 0.750
# Way round it: number annotations from 1.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q pycocotools==2.0.11 numpy==2.4.6
"$work/venv/bin/python" - <<'P'
import contextlib
import io
import sys
from importlib.metadata import version

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

box = [10, 10, 50, 50]


def evaluated(first):
    """AP and recall of detections that are the boxes themselves, with annotation ids counted from `first`."""
    truth = COCO()
    truth.dataset = {
        "images": [{"id": image, "width": 100, "height": 100} for image in range(4)],
        "annotations": [
            {"id": first + image, "image_id": image, "category_id": 1, "bbox": box, "area": 2500, "iscrowd": 0}
            for image in range(4)
        ],
        "categories": [{"id": 1, "name": "thing"}],
    }
    detections = [{"image_id": image, "category_id": 1, "bbox": box, "score": 0.9 - image / 10} for image in range(4)]
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision, recall = evaluation.stats[0], evaluation.stats[8]
    print(f"annotation ids from {first}: AP {precision:.3f}, recall {recall:.3f}")
    return precision, recall


print(f"pycocotools {version('pycocotools')}, 4 images of one box each, detections equal to the boxes")
one, zero = evaluated(1), evaluated(0)
sys.exit(0 if min(one) > 0.999 and abs(zero[0] - 0.5644) < 1e-3 and abs(zero[1] - 0.75) < 1e-6 else 1)
P

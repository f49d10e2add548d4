"""Annotations in COCO's format (cocodataset.org/#format-data), one JSON file."""

import json
from collections import Counter
from pathlib import Path

import numpy as np

from fastsiam.errors import UserError
from fastsiam.evaluate.detection.annotations import (
    AnnotatedImage,
    Annotations,
    check_boxes,
    with_sizes,
    with_sound_boxes,
)

_PARTS = ("images", "annotations", "categories")


def read_coco(path: Path, images: Path, key: str) -> Annotations:
    """The images of a file `instances_*.json`, whose pixels are in the folder `images`. `key` begins error messages.

    The classes are those of the file that have boxes, in the order of their ids. Raises `UserError`.
    """
    content = _read(path, key)
    notes: list[str] = []
    objects = _objects(content, path, key, notes)
    names, labels = _classes(content, objects, path, key, notes)
    rows: dict[object, list[dict]] = {image["id"]: [] for image in content["images"]}
    for one in objects:
        rows[one["image_id"]].append(one)
    files = [images / image["file_name"] for image in content["images"]]
    declared = [_declared(image) for image in content["images"]]
    sizes, of_files = with_sizes(files, declared, key)
    per_box = [(width, height) for (height, width, _), row in zip(sizes, rows.values(), strict=True) for _ in row]
    boxes = [one["bbox"] for row in rows.values() for one in row]
    check_boxes(np.array(boxes, float).reshape(-1, 4), np.array(per_box).reshape(-1, 2), key, path)
    found = [_image(file, *size, row, labels) for file, size, row in zip(files, sizes, rows.values(), strict=True)]
    notes += of_files
    found = with_sound_boxes(found, notes)
    crowds = sum(int(image.crowd.sum()) for image in found)
    notes += [f"{crowds:,} crowds are not trained on and not counted as misses"] if crowds else []
    return Annotations("coco", found, names, tuple(notes))


def _read(path, key):
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{key}: cannot read {path} ({error.strerror or error})", "unreadable") from error
    except ValueError as error:
        raise UserError(f"{key}: {path} is not JSON ({error})", "not-json") from error
    missing = [part for part in _PARTS if not isinstance(content, dict) or not isinstance(content.get(part), list)]
    if missing:
        text = f"{key}: {path} has no list {', '.join(missing)}; COCO's format has {', '.join(_PARTS)}"
        raise UserError(text, "not-coco")
    for part, needed in (("images", ("id", "file_name")), ("categories", ("id", "name"))):
        bad = [row for row in content[part] if not isinstance(row, dict) or not row.keys() >= set(needed)]
        if bad:
            raise UserError(f"{key}: {path}: {len(bad)} of its {part} lack {' or '.join(needed)}", "not-coco")
        ids = Counter(row["id"] for row in content[part])
        if len(ids) < len(content[part]):
            raise UserError(f"{key}: {path}: two of its {part} have the id {ids.most_common(1)[0][0]}", "same-ids")
    if not content["images"]:
        raise UserError(f"{key}: {path} lists no images", "no-images")
    return content


def _objects(content, path, key, notes):
    """The annotations with a box of an image that the file lists; says what is left out or filled in."""
    everything, known = content["annotations"], {image["id"] for image in content["images"]}
    objects = [one for one in everything if _is_box(one.get("bbox")) and one.get("image_id") in known]
    if len(objects) < len(everything):
        notes.append(f"{len(everything) - len(objects):,} annotations without a box or an image were dropped")
    if not objects:
        raise UserError(f"{key}: {path} has no boxes", "no-boxes")
    ids = Counter(one.get("id") for one in objects)
    # pycocotools takes 0 for "nothing is matched": a perfect box on the object with this id counts as an error.
    wrong = sum(count for name, count in ids.items() if count > 1 or not isinstance(name, int) or name < 1)
    notes += [f"annotation ids are renumbered from 1 ({wrong:,} were 0, missing or used twice)"] if wrong else []
    for field, meaning in (("area", "that of the box"), ("iscrowd", "0")):
        lacking = sum(one.get(field) is None for one in objects)
        notes += [f"{lacking:,} annotations had no {field}: it is {meaning}"] if lacking else []
    return objects


def _is_box(value):
    return isinstance(value, list) and len(value) == 4 and all(isinstance(number, int | float) for number in value)


def _classes(content, objects, path, key, notes):
    """Names of the classes that have boxes, and the label from 1 of each category id."""
    names = {category["id"]: str(category["name"]) for category in content["categories"]}
    used = Counter(one.get("category_id") for one in objects)
    unknown = [str(name) for name in used if name not in names]
    if unknown:
        text = f"{key}: {path}: boxes have the category {', '.join(unknown[:3])}, which its categories do not list"
        raise UserError(text, "unknown-category")
    order = sorted(used)
    chosen = [names[identity] for identity in order]
    twice = [name for name, count in Counter(chosen).items() if count > 1]
    if twice:
        raise UserError(f"{key}: {path}: two of its categories are named {twice[0]!r}", "same-names")
    unused = len(names) - len(order)
    notes += [f"{unused} categories have no boxes and are left out"] if unused else []
    labels = {identity: label for label, identity in enumerate(order, 1)}
    if order != list(labels.values()):
        notes.append(f"category ids {order[0]}..{order[-1]} are labels 1..{len(order)}")
    return tuple(chosen), labels


def _declared(image):
    width, height = image.get("width"), image.get("height")
    return (int(width), int(height)) if width and height else None


def _image(path, height, width, as_stored, row, labels):
    boxes = np.array([one["bbox"] for one in row], float).reshape(-1, 4)
    area = [boxes[i, 2] * boxes[i, 3] if one.get("area") is None else one["area"] for i, one in enumerate(row)]
    boxes[:, 2:] += boxes[:, :2]
    return AnnotatedImage(
        path,
        height,
        width,
        boxes,
        np.array([labels[one["category_id"]] for one in row], np.int64),
        np.array(area, float),
        np.array([bool(one.get("iscrowd")) for one in row], bool),
        np.zeros(len(row), bool),
        tuple(_outline(one.get("segmentation")) for one in row),
        as_stored,
    )


def _outline(segment):
    # As a list of Python's numbers, the outlines of COCO's training images take 1.6 GB in each process of the loader.
    return tuple(np.array(polygon, float) for polygon in segment) if isinstance(segment, list) else segment

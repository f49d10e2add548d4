"""Annotations in the format of PASCAL VOC: JPEGImages, Annotations/*.xml, ImageSets/Main/SPLIT.txt."""

from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from fastsiam.errors import UserError
from fastsiam.evaluate.detection.annotations import AnnotatedImage, Annotations, with_sizes, with_sound_boxes


def splits_of(folder: Path) -> list[str]:
    """The splits of a folder in VOC's layout, without those of single classes (`cat_train`)."""
    names = sorted(path.stem for path in (folder / "ImageSets" / "Main").glob("*.txt"))
    return [name for name in names if "_" not in name] or names


def read_voc(folders: list[Path], split: str, key: str) -> Annotations:
    """The images of a split of one folder or several (VOC2007 and VOC2012). `key` begins error messages.

    The classes are those that have boxes, in the order of the alphabet, which is that of VOC's twenty.
    Pixels in the files count from 1, and the last one lies inside of the box: x1 and y1 become one less (as in
    detectron2, data/datasets/pascal_voc.py). Raises `UserError`.
    """
    parsed = [_parsed(folder, name, key) for folder in folders for name in _names(folder, split, key)]
    notes: list[str] = []
    paths = [path for path, _, _ in parsed]
    sizes, of_files = with_sizes(paths, [size for _, size, _ in parsed], key)
    names = tuple(sorted({name for _, _, objects in parsed for name, _, _ in objects}))
    if not names:
        raise UserError(f"{key}: the images of {split} in {', '.join(map(str, folders))} have no boxes", "no-boxes")
    labels = {name: label for label, name in enumerate(names, 1)}
    found = [_image(path, *size, objects, labels) for (path, _, objects), size in zip(parsed, sizes, strict=True)]
    found = with_sound_boxes(found, notes)
    difficult = sum(int(image.difficult.sum()) for image in found)
    notes += [f"{difficult:,} difficult objects are trained on and ignored in evaluation"] if difficult else []
    return Annotations("voc", found, names, (*notes, *of_files))


def _names(folder, split, key):
    path = folder / "ImageSets" / "Main" / f"{split}.txt"
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise UserError(
            f"{key}: there is no {path}; its splits are {', '.join(splits_of(folder)) or 'none'}: give {key}-split",
            "no-such-split",
        ) from error
    names = [line.split()[0] for line in lines if line.strip()]
    if not names:
        raise UserError(f"{key}: {path} lists no images", "no-images")
    return names


def _parsed(folder, name, key):
    """Path, declared (width, height), and [(class, box, difficult)] of an image."""
    path = folder / "Annotations" / f"{name}.xml"
    try:
        tree = ElementTree.parse(path).getroot()
        objects = [_object(one) for one in tree.iter("object")]
        size = tuple(int(float(tree.findtext(f"size/{side}", "0"))) for side in ("width", "height"))
    except OSError as error:
        raise UserError(f"{key}: cannot read {path} ({error.strerror or error})", "unreadable") from error
    except (ElementTree.ParseError, TypeError, ValueError) as error:
        raise UserError(f"{key}: {path} is not in VOC's format ({error})", "not-voc") from error
    file = folder / "JPEGImages" / f"{name}.jpg"
    if not file.exists():
        given = folder / "JPEGImages" / tree.findtext("filename", file.name)
        file = given if given.exists() else file
    return file, size if all(size) else None, objects


def _object(one):
    box = [float(one.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")]
    return one.findtext("name").strip(), box, one.findtext("difficult", "0").strip() == "1"


def _image(path, height, width, as_stored, objects, labels):
    boxes = np.array([box for _, box, _ in objects], float).reshape(-1, 4)
    boxes[:, :2] -= 1
    count = len(objects)
    return AnnotatedImage(
        path,
        height,
        width,
        boxes,
        np.array([labels[name] for name, _, _ in objects], np.int64),
        (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]),
        np.zeros(count, bool),
        np.array([difficult for _, _, difficult in objects], bool),
        as_stored=as_stored,
    )

"""Finds the annotations and images of --train and --val."""

from fastsiam.errors import UserError
from fastsiam.evaluate.detection.annotations import Annotations, check_apart, relabelled
from fastsiam.evaluate.detection.coco_file import read_coco
from fastsiam.evaluate.detection.voc_files import read_voc, splits_of

READS = (
    "detect reads a JSON file in COCO's format, a folder with annotations/instances_train*.json, a folder with one "
    "JSON file and its images, or folders with JPEGImages, Annotations and ImageSets/Main"
)


def read_both(arguments) -> tuple[Annotations, Annotations]:
    """The images of --train and --val, with the labels of --train. Raises `UserError`."""
    val_split = arguments.val_split or ("test" if all("test" in splits_of(one) for one in arguments.val) else "val")
    # VOC's val is a part of its trainval.
    train_split = arguments.train_split or ("train" if val_split == "val" else "trainval")
    train = _read(arguments.train, arguments.train_images, "train", train_split)
    val = _read(arguments.val, arguments.val_images, "val", val_split)
    check_apart(train, val)
    return train, relabelled(val, train.classes)


def _read(locations, images, part, split):
    key = f"--{part}"
    for location in locations:
        if not location.exists():
            raise UserError(f"{key}: there is no {location}; {READS}", "no-such-path")
    if all((location / "JPEGImages").is_dir() for location in locations):
        return read_voc(locations, split, key)
    if len(locations) > 1:
        raise UserError(f"{key}: several folders are read in VOC's format alone; {READS}", "several-folders")
    path = locations[0] if locations[0].is_file() else _file_in(locations[0], part, key)
    folder = images or _images_of(path)
    if not folder.is_dir():
        raise UserError(
            f"{key}-images: there is no folder {folder}; give the one with the images of {path.name}", "no-such-folder"
        )
    return read_coco(path, folder, key)


def _file_in(folder, part, key):
    inside = sorted((folder / "VOC2007").parent.glob("VOC20??"))
    if inside:
        raise UserError(f"{key}: give the folders in {folder}: {' '.join(map(str, inside))}", "folder-of-folders")
    found = sorted((folder / "annotations").glob(f"instances_{part}*.json")) or sorted(folder.glob("*.json"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found[:3])
        what = f"{len(found)} JSON files ({names}); give one of them" if found else f"no annotations; {READS}"
        raise UserError(f"{key}: {folder} holds {what}", "no-annotations")
    return found[0]


def _images_of(path):
    """The folder of the images of a JSON file: by COCO's layout, `images` beside it, or the file's own."""
    split = path.stem.removeprefix("instances_")
    root = path.parent.parent if path.parent.name == "annotations" else path.parent
    candidates = (root / split, root / "images" / split, root / "images", path.parent / "images")
    return next((folder for folder in candidates if folder.is_dir()), path.parent)

"""Annotations in COCO's and VOC's format: what is changed, said and refused before training."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from fastsiam.evaluate.detection.annotations import check_apart, check_masks, relabelled
from fastsiam.evaluate.detection.coco_file import read_coco
from fastsiam.evaluate.detection.loader import draw_masks, read_pixels
from fastsiam.evaluate.detection.locate import read_both
from fastsiam.evaluate.detection.voc_files import read_voc
from tests.support.refusals import refuses
from tests.support.shapes import write_coco, write_voc


class Asked:
    """The arguments of a command that say where the annotations are."""

    train_images = val_images = train_split = val_split = None

    def __init__(self, train, val):
        self.train, self.val = train, val


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("coco"), 6, seed=1)


@pytest.fixture
def changed(clean, tmp_path):
    """A function that reads the clean file after a change of its content."""

    def read(change):
        content = json.loads(clean.read_text())
        change(content)
        path = tmp_path / "changed.json"
        path.write_text(json.dumps(content))
        return read_coco(path, clean.parent, "--train")

    return read


def test_boxes_become_corners_and_labels_count_from_one(clean):
    content, read = json.loads(clean.read_text()), read_coco(clean, clean.parent, "--train")
    assert read.classes == ("disc", "square", "triangle")
    assert read.notes == ("category ids 10..30 are labels 1..3",)
    for image, known in zip(read.images, content["images"], strict=True):
        mine = [one for one in content["annotations"] if one["image_id"] == known["id"]]
        assert image.labels.tolist() == [one["category_id"] // 10 for one in mine]
        for box, one in zip(image.boxes, mine, strict=True):
            left, top, width, height = one["bbox"]
            assert box.tolist() == [left, top, left + width, top + height]


def test_what_lacks_is_filled_in_and_said(changed):
    def change(content):
        for place, one in enumerate(content["annotations"]):
            one["id"] = place
            del one["area"], one["iscrowd"]

    read = changed(change)
    notes = "\n".join(read.notes)
    assert "annotation ids are renumbered from 1 (1 were 0, missing or used twice)" in notes
    assert f"{read.boxes} annotations had no area: it is that of the box" in notes
    assert "had no iscrowd: it is 0" in notes
    for image in read.images:
        assert np.array_equal(image.area, (image.boxes[:, 2:] - image.boxes[:, :2]).prod(1))
        assert not image.crowd.any()


def test_empty_images_stay_and_boxes_without_area_go(changed):
    def change(content):
        first = content["annotations"][0]
        content["annotations"] = [first | {"bbox": [5, 5, 0, 9]}, first | {"id": 2, "bbox": [50, 50, 30, 10]}]

    read = changed(change)
    assert len(read.images) == 6
    assert [image.boxes.tolist() for image in read.images] == [[[50, 50, 64, 60]], *[[]] * 5]
    assert read.images[1].boxes.shape == (0, 4)
    assert set(read.notes) >= {
        "1 boxes without width or height were dropped",
        "1 boxes that left their image were cut to it",
        "5 images have no box; they are kept",
    }


def corners(content):
    for one in content["annotations"]:
        left, top, width, height = one["bbox"]
        one["bbox"] = [left, top, left + width, top + height]


def shares(content):
    for one in content["annotations"]:
        one["bbox"] = [edge / 64 for edge in one["bbox"]]


def unknown_category(content):
    content["annotations"][0]["category_id"] = 99


def lost_images(content):
    for image in content["images"][:4]:
        image["file_name"] = f"lost/{image['file_name']}"


def other_size(content):
    content["images"][0]["width"] = 640


REFUSED = {
    "boxes-are-corners": corners,
    "boxes-in-shares": shares,
    "unknown-category": unknown_category,
    "images-missing": lost_images,
    "image-size-differs": other_size,
    "no-boxes": lambda content: content["annotations"].clear(),
    "not-coco": lambda content: content.pop("images"),
    "same-ids": lambda content: content["images"].append(content["images"][0]),
}


@pytest.mark.parametrize("code", REFUSED)
def test_a_file_that_cannot_be_right_is_refused(code, changed):
    with refuses(code, "--train") as caught:
        changed(REFUSED[code])
    if code == "images-missing":
        assert "4 of 6 images are not on the disk (0001.png, 0002.png, 0003.png, ...)" in str(caught.value)


def test_labels_of_validation_follow_training_by_name(clean, tmp_path):
    """The ids of the two files differ, and one class of training has no box."""
    train = read_coco(clean, clean.parent, "--train")
    path = write_coco(tmp_path / "val", 5, seed=2)
    content = json.loads(path.read_text())
    content["categories"] = [row | {"id": 50 - row["id"]} for row in content["categories"]]
    for one in content["annotations"]:
        one["category_id"] = 50 - one["category_id"]
    content["annotations"] = [one for one in content["annotations"] if one["category_id"] != 20]
    assert {one["category_id"] for one in content["annotations"]} == {30, 40}
    path.write_text(json.dumps(content))
    read = read_coco(path, path.parent, "--val")
    assert read.classes == ("square", "disc")
    val = relabelled(read, train.classes)
    labels = [
        (50 - one["category_id"]) // 10
        for image in content["images"]
        for one in content["annotations"]
        if one["image_id"] == image["id"]
    ]
    assert np.concatenate([image.labels for image in val.images]).tolist() == labels
    assert val.notes[-1] == "1 of 3 classes have no box here and are left out of the mean"
    with refuses("unknown-classes", "--val") as caught:
        relabelled(read, ("disc", "triangle"))
    assert "1 of its categories have no boxes in --train (square)" in str(caught.value)


def test_usual_layouts_are_found_and_an_overlap_is_refused(tmp_path):
    for part, seed in (("train", 1), ("val", 2)):
        path = write_coco(tmp_path / f"{part}2017", 6, seed)
        (tmp_path / "annotations").mkdir(exist_ok=True)
        path.replace(tmp_path / f"annotations/instances_{part}2017.json")
    train, val = read_both(Asked([tmp_path], [tmp_path]))
    assert [image.path.parent.name for image in (train.images[0], val.images[0])] == ["train2017", "val2017"]
    with refuses("splits-overlap", "--val"):
        check_apart(train, train)


def test_boxes_agree_with_pixels_that_exif_turns(tmp_path):
    """Orientation 6: one file says the size of the stored pixels, another that of the picture as displayed."""
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[10:20, 30:50] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    for (width, height), box in (((60, 40), [30, 10, 20, 10]), ((40, 60), [20, 30, 10, 20])):
        content = {
            "images": [{"id": 1, "file_name": "turned.png", "width": width, "height": height}],
            "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": box}],
            "categories": [{"id": 1, "name": "box"}],
        }
        path = tmp_path / "annotations.json"
        path.write_text(json.dumps(content))
        read = read_coco(path, tmp_path, "--train")
        (image,) = read.images
        assert any("turned" in note for note in read.notes)
        bright = (read_pixels(image)[0] > 128).nonzero()
        found = [*bright.amin(0).flip(0).tolist(), *(bright.amax(0) + 1).flip(0).tolist()]
        assert image.boxes[0].tolist() == found


@pytest.mark.needs("pycocotools")
def test_outlines_are_polygons_or_run_lengths(changed):
    """Run lengths count zeros first, down the columns."""

    def change(content):
        left, top, width, height = content["annotations"][0]["bbox"]
        runs = [64 * left + top, *[height, 64 - height] * width]
        runs[-1] = 64 * 64 - sum(runs[:-1])
        content["annotations"][1:] = [content["annotations"][0] | {"id": 2}]
        content["annotations"][1]["segmentation"] = {"counts": runs, "size": [64, 64]}

    image = changed(change).images[0]
    left, top, right, bottom = map(int, image.boxes[0])
    expected = torch.zeros(64, 64, dtype=torch.uint8)
    expected[top:bottom, left:right] = 1
    assert torch.equal(draw_masks(image), torch.stack([expected, expected]))


def test_an_object_without_outline_is_refused_for_masks(changed):
    with refuses("no-outlines", "--train"):
        check_masks(changed(lambda content: content["annotations"][0].pop("segmentation")), "--train")


def test_voc_is_read(tmp_path):
    """Coordinates count from 1 and include the last pixel; a difficult object stays."""
    folder = tmp_path / "VOC2007"
    known = write_voc(folder, {"trainval": 3, "test": 2}, seed=4)
    train, val = read_both(Asked([folder], [folder]))
    assert (len(train.images), len(val.images), train.form) == (3, 2, "voc")
    for image in (*train.images, *val.images):
        rows = known[image.path.stem]
        assert [train.classes[label - 1] for label in image.labels] == [name for name, _, _ in rows]
        assert image.difficult.tolist() == [difficult for _, _, difficult in rows]
        # A row of the image cuts its squares at their edges.
        for (left, top, right, bottom), half in zip(
            image.boxes.astype(int), (slice(0, 40), slice(40, 80)), strict=False
        ):
            white = (read_pixels(image)[0, :, half] == 255).nonzero() + torch.tensor([0, half.start])
            assert [top, left] == white.amin(0).tolist()
            assert [bottom, right] == (white.amax(0) + 1).tolist()
    with refuses("no-such-split", "--train") as caught:
        read_voc([folder], "val", "--train")
    assert "its splits are test, trainval" in str(caught.value)
    with refuses("no-outlines", "--train"):
        check_masks(train, "--train")

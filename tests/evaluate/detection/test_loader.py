"""Training images: boxes and masks follow flips and sizes; draws depend on the seed and the place alone."""

import itertools
from dataclasses import replace

import pytest
import torch

from fastsiam.errors import UserError
from fastsiam.evaluate.detection.coco_file import read_coco
from fastsiam.evaluate.detection.loader import (
    Draw,
    Draws,
    TrainingImages,
    draw_masks,
    read_pixels,
    sound,
    training_loader,
)
from tests.support.refusals import refuses
from tests.support.shapes import write_coco


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = write_coco(tmp_path_factory.mktemp("coco"), 4, seed=1)
    return read_coco(path, path.parent, "--train").images


@pytest.mark.needs("pycocotools")
def test_boxes_and_masks_follow_flip_and_size(images):
    """Each box against its formula in float64, and against the pixels of its mask."""
    data, seen = TrainingImages(images, (48, 96), 1000, seed=3, masks=True), set()
    for position in range(16):
        image = images[position % 4]
        pixels, target = data[Draw(position % 4, position)]
        side = pixels.shape[1]
        scale = side / 64
        plain = [[scale * edge for edge in box] for box in image.boxes]
        flipped = [[side - right, top, side - left, bottom] for left, top, right, bottom in plain]
        expected = [torch.tensor(boxes, dtype=torch.float64) for boxes in (plain, flipped)]
        found = target["boxes"].double()
        (kind,) = (number for number, boxes in enumerate(expected) if torch.allclose(found, boxes, atol=1e-4))
        seen.add((side, kind))
        assert target["labels"].tolist() == image.labels.tolist()
        for mask, box in zip(target["masks"], target["boxes"], strict=True):
            rows, columns = mask.nonzero(as_tuple=True)
            edges = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert (edges - box).abs().max() <= 1
        whole = torch.nn.functional.interpolate(pixels[None].float(), (64, 64), mode="bilinear", antialias=True)[0]
        original = read_pixels(image).float()
        assert (whole - (original.flip(2) if kind else original)).abs().mean() < 8
    assert seen == {(48, 0), (48, 1), (96, 0), (96, 1)}


@pytest.mark.needs("pycocotools")
def test_crowds_are_not_trained_on_and_empty_images_are(images):
    crowd = replace(images[0], crowd=images[0].crowd | True)
    _, target = TrainingImages((crowd,), (64,), 1000, 0, masks=False)[Draw(0, 0)]
    assert (target["boxes"].shape, target["labels"].shape) == ((0, 4), (0,))
    assert draw_masks(crowd.kept(~crowd.crowd)).shape == (0, 64, 64)


def test_ranks_share_every_epoch_and_a_resumed_run_goes_on():
    whole = list(itertools.islice(Draws(10, 7, 0, 1, 0), 30))
    assert [sorted(draw.index for draw in whole[start : start + 10]) for start in (0, 10, 20)] == [list(range(10))] * 3
    assert whole[:10] != whole[10:20]
    ranks = [list(itertools.islice(Draws(10, 7, rank, 3, 0), 10)) for rank in range(3)]
    assert [draw for step in zip(*ranks, strict=True) for draw in step] == whole
    assert list(itertools.islice(Draws(10, 7, 1, 3, 12), 3)) == ranks[1][4:7]


def test_a_draw_has_the_same_pixels_whatever_came_before(images):
    data = TrainingImages(images, (48, 64, 96), 1000, seed=3, masks=False)
    first = data[Draw(1, 5)]
    data[Draw(0, 0)]
    torch.rand(3)
    again, other = data[Draw(1, 5)], data[Draw(1, 9)]
    assert torch.equal(first[0], again[0])
    assert not (first[0].shape == other[0].shape and torch.equal(first[0], other[0]))


def test_a_file_that_is_cut_off_is_an_error_with_its_name(images, tmp_path):
    path = tmp_path / "cut.png"
    path.write_bytes(images[0].path.read_bytes()[:2000])
    data = TrainingImages((replace(images[0], path=path),), (64,), 1000, 0, masks=False)
    loader = training_loader(data, 2, 0, Draws(1, 0, 0, 1, 0))
    batch = next(iter(loader))
    assert isinstance(batch, UserError)
    with refuses("bad-image", "--train"):
        sound(batch)

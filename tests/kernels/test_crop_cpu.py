"""Crop and resize against Pillow, and against the filter's definition in float64."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastsiam.kernels.crop_numba import crop_on_cpu
from tests.support.numerics import by_definition

SIZES = [(37, 50), (1, 9), (64, 5), (200, 300)]


def picture(height, width, seed=0):
    return np.random.default_rng((seed, height, width)).integers(0, 256, (height, width, 3), np.uint8)


def crop(images, boxes, size):
    """`boxes` [V, N, 4]."""
    addresses = np.array([image.ctypes.data for image in images], np.int64)
    return crop_on_cpu(addresses, np.array([image.shape[:2] for image in images]), np.asarray(boxes), size).numpy()


def boxes_of(images, seed=0):
    """Whole pixels: a random one, everything, one pixel in a corner."""
    generator = np.random.default_rng(seed)
    rows = []
    for image in images:
        length = generator.integers(1, np.array(image.shape[:2]) + 1)
        begin = generator.integers(0, np.array(image.shape[:2]) - length + 1)
        rows.append([[*begin, *length], [0, 0, *image.shape[:2]], [image.shape[0] - 1, image.shape[1] - 1, 1, 1]])
    return np.array(rows).transpose(1, 0, 2)


@pytest.mark.parametrize("size", [1, 7, 32, 150])
def test_crops_are_pillows_to_one_level(size):
    images = [picture(*shape) for shape in SIZES]
    boxes = boxes_of(images)
    found = crop(images, boxes, size).reshape(len(boxes), len(images), size, size, 3)
    for view, row in enumerate(boxes):
        for number, (image, box) in enumerate(zip(images, row, strict=True)):
            top, left, height, width = box.tolist()
            cut = Image.fromarray(image[top : top + height, left : left + width])
            expected = np.asarray(cut.resize((size, size), Image.Resampling.BILINEAR)).astype(int)
            assert np.abs(found[view, number] - expected).max() <= 1


@pytest.mark.parametrize("size", [5, 40])
def test_crops_are_the_filters_definition_rounded(size):
    """Fractions of pixels too."""
    images = [picture(*shape) for shape in SIZES]
    begin = np.array([[0.4, 3.7], [0.0, 2.25], [10.5, 0.5], [20.125, 31.9]])
    end = np.array([[30.2, 45.9], [1.0, 8.5], [63.9, 4.5], [199.99, 200.0]])
    boxes = np.concatenate([begin, end - begin], 1)[None]
    for found, image, box in zip(crop(images, boxes, size), images, boxes[0], strict=True):
        assert np.abs(found - by_definition(image, box, size)).max() <= 0.5 + 1e-3


def test_a_box_outside_its_image_is_refused():
    image = picture(10, 20)
    for box in ([0, 0, 11, 5], [-1, 0, 5, 5], [0, 16, 5, 5], [0, 0, 0, 5]):
        with pytest.raises(ValueError, match="empty or reaches outside"):
            crop([image], [[box]], 4)


def test_torch_keeps_its_threads():
    before = torch.get_num_threads()
    crop([picture(10, 10)], [[[0, 0, 10, 10]]], 4)
    assert torch.get_num_threads() == before

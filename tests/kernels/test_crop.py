"""Crops by numba, by Triton (under its interpreter, or on a GPU) and by the reference, against Pillow and float64."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastsiam.kernels import crop_resize, crop_triton, reference
from fastsiam.kernels.crop import crop_resize_op
from fastsiam.kernels.crop_numba import crop_on_cpu
from fastsiam.kernels.crop_triton import crop_on_cuda
from tests.support.images import pictures
from tests.support.numerics import by_definition

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
pytestmark = [pytest.mark.gpu] if CUDA else []


def triton(images, boxes, size, indices=None):
    taken = None if indices is None else indices.to(DEVICE)
    return crop_on_cuda(images.to(DEVICE), boxes.float().to(DEVICE), size, taken).cpu()


def scattered(images, boxes, size, indices=None):
    """The images one by one, as a decoder leaves them: each crop's is named by its address."""
    images = images.to(DEVICE)
    taken = range(len(boxes)) if indices is None else indices.tolist()
    addresses = np.array([images[index].data_ptr() for index in taken], np.int64)
    sizes = np.array([images.shape[1:3]] * len(taken)).reshape(-1, 2)
    return crop_triton.crop_scattered(addresses, sizes, boxes.double().numpy()[None], size, DEVICE).cpu()


KERNELS = {"numba": crop_resize, "triton": triton, "scattered": scattered, "reference": reference.crop_resize_ref}


def rounded_right(found, images, boxes, size, indices):
    """Off the definition in float64 by rounding and 0.02 of a level, what fp32 makes of the weights."""
    for crop, box, index in zip(found.numpy(), boxes.double().numpy(), indices, strict=True):
        assert np.abs(crop - by_definition(images[index].numpy(), box, size)).max() <= 0.5 + 0.02


# One pixel, read and made; odd sizes; more rows and elements than a tile of 4 x 32; a shrink by 8.
@pytest.mark.parametrize(("height", "width", "size"), [(1, 1, 3), (9, 6, 1), (13, 9, 7), (9, 14, 11), (24, 12, 3)])
@pytest.mark.parametrize("kernel", list(KERNELS))
def test_crops_are_the_filters_definition_rounded(kernel, height, width, size, monkeypatch):
    """Fractions of pixels, enlarged and shrunk, two crops of one image and none of another."""
    monkeypatch.setattr(crop_triton, "TILE", 128)
    monkeypatch.setattr(crop_triton, "BLOCK", 32)
    images = pictures(3, height, width)
    shares = torch.tensor(
        [[0, 0, 1, 1], [0.11, 0.37, 0.43, 0.29], [0.9, 0.91, 0.1, 0.09], [0.3, 0.2, 0.03, 0.031]], dtype=torch.float64
    )
    boxes = (shares * torch.tensor([height, width, height, width])).float()
    indices = torch.tensor([2, 0, 2, 0])
    rounded_right(KERNELS[kernel](images, boxes, size, indices), images, boxes, size, indices)


@pytest.mark.parametrize("size", [5, 8, 31])
@pytest.mark.parametrize("kernel", list(KERNELS))
def test_whole_boxes_are_pillows_to_one_level(kernel, size):
    images = pictures(2, 40, 28)
    boxes = torch.tensor([[0, 0, 40, 28], [3, 5, 17, 20], [39, 27, 1, 1], [8, 0, 31, 31 - 3]], dtype=torch.float32)
    indices = torch.tensor([0, 1, 1, 0])
    found = KERNELS[kernel](images, boxes, size, indices)
    for crop, box, index in zip(found, boxes.int().tolist(), indices, strict=True):
        top, left, height, width = box
        cut = Image.fromarray(images[index, top : top + height, left : left + width].numpy())
        expected = np.asarray(cut.resize((size, size), Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(crop.numpy() - expected).max() <= 1


@pytest.mark.parametrize("kernel", ["numba", "triton"])
def test_crops_of_images_of_different_sizes_lie_view_by_view(kernel):
    """Two views of each of three images, by fractions of pixels."""
    device = torch.device("cpu") if kernel == "numba" else DEVICE
    images = [pictures(1, *shape)[0].to(device) for shape in ((37, 50), (1, 9), (64, 5))]
    addresses, sizes = np.array([image.data_ptr() for image in images]), np.array([image.shape[:2] for image in images])
    boxes = np.array(
        [
            [[0.4, 3.7, 29.8, 42.2], [0.0, 2.25, 1.0, 6.25], [10.5, 0.5, 53.4, 4.0]],
            [[0.0, 0.0, 37.0, 50.0], [0.0, 8.0, 1.0, 1.0], [60.125, 0.0, 3.5, 1.9]],
        ]
    )
    if kernel == "numba":
        found = crop_on_cpu(addresses, sizes, boxes, 7)
    else:
        found = crop_triton.crop_scattered(addresses, sizes, boxes, 7, device).cpu()
    for crop, box, image in zip(found.numpy(), boxes.reshape(-1, 4), images * 2, strict=True):
        assert np.abs(crop - by_definition(image.cpu().numpy(), box, 7)).max() <= 0.5 + 0.02


@pytest.mark.parametrize("kernel", list(KERNELS))
def test_a_box_of_the_size_of_the_crop_copies_its_pixels(kernel):
    images = pictures(2, 12, 15)
    boxes = torch.tensor([[0.0, 0, 9, 9], [3, 6, 9, 9]])
    found = KERNELS[kernel](images, boxes, 9)
    assert torch.equal(found[0], images[0, :9, :9])
    assert torch.equal(found[1], images[1, 3:, 6:])


@pytest.mark.parametrize("kernel", list(KERNELS))
def test_a_rounding_error_past_an_edge_takes_no_pixel_in(kernel):
    """A box of a third of the image, in fp32: black inside, white from its very edge on."""
    images = torch.full((1, 30, 30, 3), 255, dtype=torch.uint8)
    images[:, 10:20, 10:20] = 0
    for error in (1e-5, -1e-5, 0.0):
        box = torch.tensor([[10 - error, 10 - error, 10 + 2 * error, 10 + 2 * error]])
        assert KERNELS[kernel](images, box, 4).max() == 0


@pytest.mark.parametrize("kernel", list(KERNELS))
def test_no_crops(kernel):
    none = torch.zeros(0, 4)
    assert KERNELS[kernel](pictures(2, 4, 4), none, 5, torch.zeros(0, dtype=torch.int64)).shape == (0, 5, 5, 3)


def test_opcheck():
    images, boxes = pictures(2, 6, 7), torch.tensor([[0.5, 1, 4, 5], [0, 0, 6, 7]])
    for indices in (None, torch.tensor([1, 1])):
        checks = torch.library.opcheck(crop_resize_op, (images, boxes, 4, indices))
        assert set(checks.values()) == {"SUCCESS"}


def test_compiled_it_is_one_graph_with_the_same_numbers():
    torch._dynamo.reset()
    images, boxes, indices = pictures(3, 6, 7), torch.tensor([[0.5, 1, 4, 5], [0, 0, 6, 7]]), torch.tensor([2, 0])

    def step(images, boxes, indices):
        return crop_resize(images, boxes, 4, indices).float() / 255

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(images, boxes, indices), step(images, boxes, indices))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(2, 8, 8, 3)}, "images must be contiguous uint8"),
        ({"images": torch.zeros(2, 8, 9, 3, dtype=torch.uint8)[:, :, :8]}, "images must be contiguous uint8"),
        ({"boxes": torch.zeros(2, 4, dtype=torch.int64)}, "boxes must be fp32 or fp64"),
        ({"boxes": torch.ones(3, 4)}, "3 boxes for 2 images need indices"),
        ({"indices": torch.zeros(3, dtype=torch.int64)}, r"indices must be int64 \[2\], one a box"),
        ({"indices": torch.tensor([0, 2])}, "indices must be from 0 to 1"),
        ({"indices": torch.tensor([-1, 0])}, "indices must be from 0 to 1"),
        ({"boxes": torch.tensor([[0.0, 0, 8.1, 8], [0, 0, 8, 8]])}, "empty or reaches outside"),
        ({"boxes": torch.tensor([[0.0, -1, 8, 8], [0, 0, 8, 8]])}, "empty or reaches outside"),
        ({"boxes": torch.tensor([[0.0, 0, 0, 8], [0, 0, 8, 8]])}, "empty or reaches outside"),
        ({"boxes": torch.tensor([[0.0, 0, 8, float("nan")], [0, 0, 8, 8]])}, "empty or reaches outside"),
        ({"size": 0}, "size must be 1 or more, got 0"),
    ],
)
def test_what_it_cannot_do_it_says(change, message):
    arguments = {"images": pictures(2, 8, 8), "boxes": torch.tensor([[0.0, 0, 8, 8]] * 2), "size": 4, "indices": None}
    with pytest.raises(ValueError, match=message):
        crop_resize(**{**arguments, **change})

"""Committed hashes of what an address decides: order, boxes, draws, and the crops of the PIL backend.

They come from integer arithmetic, from IEEE's basic operations, or are rounded to integers, so that every CPU has the
same. The crops of `crop_resize` are not among them: LLVM sums their fp32 products in the order and with the fused
operations of the CPU at hand, and a sum near a half may round either way. Its boxes are.
"""

import hashlib

import numpy as np
import torch
from PIL import Image

from fastsiam.config.views import ViewSpec
from fastsiam.data import rng
from fastsiam.data.backends.base import CropRequest
from fastsiam.data.backends.choose import open_backend
from fastsiam.data.backends.resident import boxes_in_store
from fastsiam.data.sources.open import open_source

SEED, EPOCH = 7, 3
SPEC = ViewSpec(size=24, color="exact", solarize=0.2)
INDICES = np.arange(1000)
# Heights and widths from 20 to 519 px.
SIZES = np.stack((20 + INDICES * 37 % 500, 20 + INDICES * 91 % 500), 1)
IMAGENET = 1_281_167

HASHES = {
    "order of 1000": "746a936ca900c131",
    "order of ImageNet": "cdb5ce3bad8038f9",
    "replacements": "378bbd859192a068",
    "probe": "bdabd65687f7f694",
    "boxes of view 0": "2953251de40c63de",
    "boxes of view 1": "903ce520c8fd5326",
    "centred boxes": "27c8f041c4ef8f4f",
    "boxes in a store": "dfc1ae39c4465f7c",
    "flip": "4f999e8ac6ac62a7",
    "factors": "9fe60da51893dc79",
    "order": "99abccb741c4dc13",
    "grayscale": "b77b811a8cd40dcc",
    "sigma": "418bab9561f76c34",
    "solarize": "0a99dbcdb1ceae95",
}


def digest(array):
    """The first 16 hex digits of the SHA-256 of an array's bytes, little-endian."""
    return hashlib.sha256(array.astype(array.dtype.newbyteorder("<")).tobytes()).hexdigest()[:16]


def boxes(view, indices=INDICES, sizes=SIZES):
    return rng.crop_boxes(SPEC, SEED, EPOCH, indices, view, sizes)


def test_every_array_has_the_committed_hash():
    drawn = rng.augment_draws(SPEC, SEED, EPOCH, INDICES, 1)
    arrays = {
        "order of 1000": rng.epoch_order(SEED, EPOCH, 1000),
        "order of ImageNet": rng.epoch_order(SEED, EPOCH, IMAGENET),
        "replacements": rng.replace_skipped(SEED, EPOCH, INDICES, INDICES % 3 == 0),
        "probe": rng.probe_indices(SEED, 1000, 100),
        "boxes of view 0": boxes(0),
        "boxes of view 1": boxes(1),
        "centred boxes": rng.center_boxes(SIZES, 0.875),
        "boxes in a store": boxes_in_store(boxes(0)[None], SIZES, 160),
        **vars(drawn),
    }
    assert {name: digest(array) for name, array in arrays.items()} == HASHES


def test_crops_of_the_pil_backend(tmp_path):
    """PNGs of integer patterns: a JPEG's pixels depend on the library that decodes it.

    Pillow resizes with integers, whose weights it rounds from doubles.
    """
    sizes = np.array([[48, 48], [33, 70], [90, 41], [24, 24]])
    for number, (height, width) in enumerate(sizes):
        rows, columns, channels = np.ogrid[:height, :width, :3]
        pixels = (rows * (5 + number) + columns * columns * (3 + channels) + rows * columns * 11) % 256
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"{number}.png")
    source = open_source(str(tmp_path))
    indices = np.arange(4)
    assert source.sizes(indices).tolist() == sizes.tolist()
    request = CropRequest(indices, (np.stack([boxes(view, indices, sizes) for view in (0, 1)]),), sizes)
    backend = open_backend("pil", source, (SPEC.size,), 4, 0, torch.device("cpu"))
    ((found, (crops,)),) = backend.crops([request])
    assert found.tolist() == [0, 1, 2, 3]
    assert crops.shape == (8, 24, 24, 3)
    assert digest(crops.numpy()) == "df8411aa2782e4f6"

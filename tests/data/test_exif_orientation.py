"""EXIF turns: every format and every backend shows what PIL's exif_transpose does, and so do the headers' sizes."""

import dataclasses

import numpy as np
import pytest
from PIL import Image, ImageOps

from fastsiam.data.decode import decode
from fastsiam.data.sources.image_header import ODD, read_header
from fastsiam.data.sources.open import open_source
from tests.support.ffcv_files import beton_of
from tests.support.images import exif_block, smooth
from tests.support.loaders import squashed

SIZE = 24
FORMATS = {
    "JPEG": ("jpg", {"quality": 95}),
    "MPO": ("jpg", {"quality": 95, "save_all": True}),
    "WEBP": ("webp", {"quality": 95}),
    "PNG": ("png", {}),
    "TIFF": ("tif", {}),
    "AVIF": ("jpg", {"quality": 95}),
}
# 0 and 9 are written by some cameras; they turn nothing.
ORIENTATIONS = range(10)


@pytest.fixture(scope="module")
def turned(tmp_path_factory):
    """A source of a file for each format and orientation, and by name the picture as PIL turns it."""
    root = tmp_path_factory.mktemp("turned")
    generator = np.random.default_rng(0)
    shown = {}
    for form, (extension, options) in FORMATS.items():
        for number in ORIENTATIONS:
            exif = Image.Exif()
            exif[0x0112] = number
            path = root / f"{form} {number}.{extension}"
            more = {"append_images": [smooth(generator)]} if form == "MPO" else {}
            smooth(generator).save(path, form, exif=exif, **options, **more)
            with Image.open(path) as image:
                shown[path.name] = ImageOps.exif_transpose(image).convert("RGB")
    source = open_source(str(root))
    assert len(source) == len(FORMATS) * len(ORIENTATIONS)
    source.look(np.arange(len(source)))
    return source, [shown[bytes(name).decode()] for name in source.names]


def test_the_headers_say_the_size_that_is_shown(turned):
    source, shown = turned
    assert source.image_sizes.tolist() == [list(image.size[::-1]) for image in shown]
    assert {image.size for image in shown} == {(90, 60), (60, 90)}


@pytest.mark.parametrize("backend", ["dali", "pil", "ffcv", "resident"])
def test_every_backend_turns_as_pil_does(turned, backend):
    """Levels of 255: one for the filter's rounding, one for another decoder."""
    source, shown = turned
    source = beton_of(source.root, "raw") if backend == "ffcv" else source
    crops = squashed(dataclasses.replace(source, kinds=source.kinds.copy()), backend, SIZE)
    expected = np.stack([image.resize((SIZE, SIZE), Image.Resampling.BILINEAR) for image in shown]).astype(int)
    assert np.abs(crops - expected).max() <= 2


DAMAGED = {
    "no block at all": b"Exif\0\0garbage!",
    "ends in its first line": b"Exif\0\0II*\0\x08\0\0\0\xff\xff",
    "points behind its end": b"Exif\0\0II*\0\xff\xff\xff\x7f",
    "an orientation in letters": b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\2\0\1\0\0\0a\0\0\0\0\0\0\0",
    "an orientation of no type": b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\7\0\1\0\0\0\6\0\0\0\0\0\0\0",
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("exif", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_block_turns_nothing_and_throws_nothing_out(tmp_path, form, exif):
    picture = smooth(np.random.default_rng(1))
    picture.save(tmp_path / "it", form, exif=exif)
    header = read_header(tmp_path / "it")
    assert (header.height, header.width) == (60, 90)
    assert decode(tmp_path / "it").size == (90, 60)


def test_a_number_of_another_type_turns_as_pil_says(tmp_path):
    """A fraction and two numbers: only PIL reads them."""
    exif = exif_block("<", 3, 6)
    for name, block in (("pair", exif.replace(b"\3\0\1\0\0\0", b"\3\0\2\0\0\0")), ("long", exif_block("<", 4, 6))):
        smooth(np.random.default_rng(1)).save(tmp_path / name, "JPEG", exif=block)
        assert read_header(tmp_path / name) == (90, 60, ODD)
        assert decode(tmp_path / name).size == (60, 90)

"""Tags of a TIFF, and the decoder that reads its pixels right: Pillow, tifffile where it is installed, or none.

Pillow 13 decodes wrongly, without a warning: separate planes of 16 bits (noise), five compressed planes (only the
first), big-endian compressed numbers of 16 and 32 bits (bytes swapped), unsigned 32 bits (signed), signed 8 bits
(unsigned), and 16 bits where white is 0 (a negative). Its reader of tags takes a big-endian BigTIFF for a classic one.
"""

import struct
from importlib import util
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_WIDTH, _HEIGHT, _BITS, _PHOTOMETRIC, _ORIENTATION, _BANDS, _PLANES = 256, 257, 258, 262, 274, 277, 284
_EXTRA, _FORMAT, _NODATA = 338, 339, 42113
_TRANSPOSED = (5, 6, 7, 8)
_KINDS = {1: "u", 2: "i", 3: "f", 4: "u"}
_ALPHA = (1, 2)
_WANTED = {_WIDTH, _HEIGHT, _BITS, _PHOTOMETRIC, _ORIENTATION, _BANDS, _PLANES, _EXTRA, _FORMAT, _NODATA}
# Letters of the struct module by type; text as bytes.
_TYPES = {1: "B", 2: "s", 3: "H", 4: "I", 16: "Q"}
_MOST_TAGS, _MOST_VALUES = 4096, 65536
# Errors of reading a damaged directory.
DAMAGED = (ValueError, KeyError, IndexError, OverflowError, OSError, struct.error)


class Tiff(NamedTuple):
    """Tags of the first picture of a file."""

    height: int
    """Pixels as displayed, like the width."""
    width: int
    orientation: int
    bands: int
    bits: int
    """Bits of a sample; 0 where bands have several sizes."""
    kind: str
    """u, i or f: unsigned, signed, floating; "" for complex numbers."""
    photometric: int
    separate: bool
    """True where each band is a plane of its own."""
    alpha: bool
    nodata: float | None
    """Value that GDAL writes where nothing was measured."""

    @property
    def deep(self) -> bool:
        return self.bits > 8 or self.kind in ("i", "f")

    @property
    def inverted(self) -> bool:
        return self.photometric == 0


def read_tags(file: BinaryIO) -> Tiff | None:
    """Returns None for a file of another format; leaves the file at its beginning.

    Raises `ValueError`, `KeyError` or `struct.error` where the directory is damaged.
    """
    head = file.read(4)
    file.seek(0)
    if head not in _MAGIC:
        return None
    try:
        return _of_tags(_directory(file, "<" if head[:2] == b"II" else ">", b"+" in head))
    finally:
        file.seek(0)


def _directory(file, order, big):
    """Returns the values of the tags that are used here, as tuples."""
    file.seek(8 if big else 4)
    (place,) = _unpack(file, order, "Q" if big else "I")
    file.seek(place)
    (count,) = _unpack(file, order, "Q" if big else "H")
    if count > _MOST_TAGS:
        raise ValueError(f"{count} tags")
    entries = [_unpack(file, order, "HHQ8s" if big else "HHI4s") for _ in range(count)]
    found = {}
    for tag, form, number, value in entries:
        if tag not in _WANTED or form not in _TYPES or number > _MOST_VALUES:
            continue
        letters = f"{number}{_TYPES[form]}"
        size = struct.calcsize(order + letters)
        if size > len(value):
            file.seek(struct.unpack(order + ("Q" if big else "I"), value)[0])
            value = file.read(size)
        found[tag] = struct.unpack(order + letters, value[:size])
    return found


def _unpack(file, order, letters):
    return struct.unpack(order + letters, file.read(struct.calcsize(order + letters)))


def _of_tags(tags):
    (height,), (width,) = tags[_HEIGHT], tags[_WIDTH]
    orientation, photometric = tags.get(_ORIENTATION, (1,))[0], tags.get(_PHOTOMETRIC, (0,))[0]
    if orientation in _TRANSPOSED:
        height, width = width, height
    bits, formats = set(tags.get(_BITS, (1,))), set(tags.get(_FORMAT, (1,)))
    return Tiff(
        height,
        width,
        orientation if orientation in range(1, 9) else 1,
        tags[_BANDS][0] if _BANDS in tags else 3 if photometric in (2, 6) else 1,
        bits.pop() if len(bits) == 1 else 0,
        _KINDS.get(formats.pop(), "") if len(formats) == 1 else "",
        photometric,
        tags.get(_PLANES, (1,))[0] == 2,
        any(each in _ALPHA for each in tags.get(_EXTRA, ())),
        _number(tags.get(_NODATA, (b"",))[0]),
    )


def refusal(tags: Tiff) -> str | None:
    """Returns the reason why no decoder reads it as a picture; None where one does."""
    if tags.bands not in (1, 3, 4) and not (tags.bands == 2 and tags.alpha):
        return (
            f"it has {tags.bands} bands, and pictures have 1, 3 or 4 (grey, RGB, RGB and one more); write three of them"
        )
    if not tags.kind:
        return "its samples are complex numbers, or of another type in each band; write their magnitudes"
    if not tags.bits:
        return "its bands have samples of several sizes; write them alike"
    return None


def is_right_in_pillow(tags: Tiff, image: Image.Image | None) -> bool:
    """True where Pillow decodes the pixels as written; see the first lines of this module."""
    if image is None:
        return False
    return not tags.separate or tags.bands == 1 or (tags.bands in (3, 4) and tags.bits <= 8)


def needs_tifffile(tags: Tiff) -> str | None:
    """Returns advice on what to install, where tifffile is missing."""
    if util.find_spec("tifffile") is not None:
        return None
    names = {"u": "unsigned", "i": "signed", "f": "floating"}
    planes = " in planes" if tags.separate else ""
    return (
        f"Pillow does not decode a TIFF of {tags.bands} x {tags.bits} bits, {names[tags.kind]}{planes}; "
        "pip install tifffile imagecodecs"
    )


def read_values(file: BinaryIO) -> np.ndarray:
    """Returns the first picture [H, W] or [H, W, bands] as tifffile decodes it, not turned; raises `ValueError`."""
    import tifffile

    file.seek(0)
    try:
        with tifffile.TiffFile(file) as tiff:
            page = tiff.pages[0]
            values, axes = page.asarray(), page.axes
    # Each of its codecs has an error class of its own.
    except Exception as error:
        raise ValueError(f"tifffile: {error}") from error
    if set(axes) - set("YXS"):
        raise ValueError(f"it holds a stack with the axes {axes}; write its pictures as files")
    return values.transpose([axes.index(axis) for axis in "YXS" if axis in axes])


def in_native_order(image: Image.Image) -> None:
    """Makes Pillow read the bytes of libtiff, which come in this machine's order, without swapping them."""
    image.tile = [
        tile._replace(args=(tile.args[0].replace("BS", "S").replace("BF", "F"), *tile.args[1:]))
        if tile.codec_name == "libtiff"
        else tile
        for tile in image.tile
    ]


def _number(text):
    try:
        return float(text.strip(b"\0 "))
    except ValueError:
        return None

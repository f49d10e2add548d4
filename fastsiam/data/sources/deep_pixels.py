"""Pixels of more than eight bits as stored; Pillow's RGB images hold only the upper eight of sixteen."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastsiam.data.sources import tiff
from fastsiam.data.sources.tiff import Tiff

# White is 0, black is 0, RGB.
_COLOURS = (0, 1, 2)
_OTHER_BYTE = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}


class UnsupportedError(ValueError):
    """A whole file that no installed decoder reads as a picture; the message is the reason."""


class Picture(NamedTuple):
    """An opened file, not decoded yet."""

    file: io.IOBase
    image: Image.Image | None
    """None for a TIFF that Pillow does not know."""
    tags: Tiff | None
    """None where it is not a TIFF."""


class Deep(NamedTuple):
    """Pixels of one picture."""

    values: np.ndarray
    """[H, W] or [H, W, 3] of a numeric type; float with NaN where nothing was measured."""
    kind: str
    """Type in words, as 16-bit PNG or 32-bit float TIFF."""
    span: tuple[float, float]
    """Range of the type, which `data.deep_pixels=type` maps to black and white; 0 to 1 for floats."""
    inverted: bool
    """True where the lowest value is white."""
    orientation: int = 1
    """EXIF orientation, 1 to 8, by which the values must still be turned."""


@contextmanager
def open_picture(file: Path | str | bytes) -> Iterator[Picture]:
    """Opens a picture; raises Pillow's `UnidentifiedImageError`, and `UnsupportedError` for a TIFF that is not one."""
    with io.BytesIO(file) if isinstance(file, bytes) else open(os.fspath(file), "rb") as stream:
        tags = _tags(stream)
        if tags is not None and (reason := tiff.refusal(tags)):
            raise UnsupportedError(reason)
        try:
            image = Image.open(stream)
        except UnidentifiedImageError:
            if tags is None:
                raise
            image = None
        if tags is not None and not tiff.is_right_in_pillow(tags, image):
            image = None
            if reason := tiff.needs_tifffile(tags):
                raise UnsupportedError(reason)
        if image is None:
            if tags.photometric not in _COLOURS:
                raise UnsupportedError("Pillow does not decode it, and it is neither grey nor RGB; write it as that")
            if tags.height * tags.width > 2 * Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError(f"it has {tags.height} x {tags.width} pixels")
            yield Picture(stream, None, tags)
            return
        with image:
            yield Picture(stream, image, tags)


def _tags(stream):
    try:
        return tiff.read_tags(stream)
    except tiff.DAMAGED:
        # Pillow raises the error, or opens it all the same.
        stream.seek(0)
        return None


def kind_of(picture: Picture) -> str | None:
    """Returns the later `Deep.kind`; None for pictures of eight bits and less, which Pillow decodes."""
    image, tags = picture.image, picture.tags
    if tags is not None:
        deep = tags.deep and tags.photometric in _COLOURS
        return _named(tags.kind, tags.bits, "TIFF") if deep else None
    if image.mode == "F":
        return _named("f", 32, image.format)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return _named("u", 16, image.format)
    if image.mode == "I":
        return _named("i", 32, image.format)
    return _named("u", 16, "PNG") if image.format == "PNG" and ";16" in _raw_mode(image) else None


def read(picture: Picture) -> Deep | None:
    """Returns the values of a picture that has just been opened; None where Pillow's are right."""
    kind, (stream, image, tags) = kind_of(picture), picture
    if kind is None and image is not None:
        return None
    if tags is None:
        values = _of_png(stream, image) if image.format == "PNG" else np.asarray(image)
        number = "f" if image.mode == "F" else "i" if kind.startswith("signed") else "u"
        return Deep(values, kind, _span(number, 32 if number == "i" else 16), False)
    if image is None:
        values, orientation = tiff.read_values(stream), tags.orientation
    else:
        # Pillow turns a TIFF as it decodes it.
        values, orientation = _of_tiff(stream, image, tags), 1
    if values.ndim == 3:
        values = values[..., :3] if values.shape[2] > 2 else values[..., 0]
    if tags.nodata is not None and (values == tags.nodata).any():
        values = np.where(values == tags.nodata, np.nan, values)
    return Deep(values, kind or "8-bit TIFF", _span(tags.kind, tags.bits), tags.inverted, orientation)


def _of_png(stream, image):
    if image.mode != "RGB" and image.mode != "RGBA":
        return np.asarray(image).astype(np.uint16)
    if _raw_mode(image).startswith("LA"):
        # Two bytes of grey and two of alpha, as the four of a pixel.
        image.tile = [tile._replace(args="RGBA") for tile in image.tile]
        upper, lower = np.asarray(image)[..., :2].astype(np.uint16).transpose(2, 0, 1)
        return upper << 8 | lower
    return _of_both_bytes(stream, image)


def _of_tiff(stream, image, tags):
    tiff.in_native_order(image)
    if tags.bands > 1:
        return _of_both_bytes(stream, image)
    values = np.asarray(image)
    if tags.kind == "u" and tags.bits == 32:
        return values.view(np.uint32)
    return values.view(np.int8) if tags.kind == "i" and tags.bits == 8 else values


def _of_both_bytes(stream, image):
    """Decodes twice: Pillow unpacks one byte of two, and its raw mode selects which."""
    upper = np.asarray(image)[..., :3].astype(np.uint16)
    stream.seek(0)
    with Image.open(stream) as again:
        again.tile = [tile._replace(args=_with_other_byte(tile.args)) for tile in again.tile]
        return upper << 8 | np.asarray(again)[..., :3]


def _with_other_byte(args):
    if isinstance(args, str):
        return args[:-1] + _OTHER_BYTE[args[-1]]
    return (_with_other_byte(args[0]), *args[1:])


def _raw_mode(image):
    args = image.tile[0].args if image.tile else ""
    return str(args[0] if isinstance(args, tuple) and args else args)


def _named(kind, bits, form):
    return f"{'signed ' * (kind == 'i')}{bits}-bit {'float ' * (kind == 'f')}{form}"


def _span(kind, bits):
    if kind == "f":
        return 0.0, 1.0
    return (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1) if kind == "i" else (0.0, 2.0**bits - 1)

"""What an image file's header says: its displayed size, and whether every decoder makes the same picture of it."""

import io
import os
from pathlib import Path
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

from fastsiam.config import UserError

# Kinds of a file, as an index keeps them: from UNREADABLE on it is not used. UNWANTED is a scan's verdict on files that
# can be decoded.
UNKNOWN, PLAIN, ODD, UNREADABLE, UNWANTED = range(5)

_ORIENTATION, _TRANSPOSED = 0x0112, (5, 6, 7, 8)
# Formats and PIL modes that DALI, OpenCV and PIL decode to the same RGB. CMYK, palettes, transparency, 16 bits and
# animations are each decoder's own.
_PLAIN = {("JPEG", "RGB"), ("JPEG", "L"), ("MPO", "RGB"), ("PNG", "RGB"), ("PNG", "L"), ("BMP", "RGB"), ("WEBP", "RGB")}
# Only here every decoder turns the picture as EXIF says.
_TURNED_BY_ALL = ("JPEG", "MPO")


class BadImageError(UserError):
    """A file that cannot be decoded, by name."""


class Header(NamedTuple):
    height: int
    """As displayed: EXIF orientation applied."""
    width: int
    kind: int
    """PLAIN, or ODD for a file that only PIL decodes as everybody sees it."""


def read_header(file: Path | str | bytes, name: object = None) -> Header:
    """The header of an image file, given as a path or as its bytes; raises `BadImageError` naming it."""
    name = file if name is None else name
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else os.fspath(file)) as image:
            width, height = image.size
            # Only an EXIF block can turn the image, and parsing one costs more than the rest of the header.
            orientation = image.getexif().get(_ORIENTATION, 1) if "exif" in image.info else 1
            plain = (image.format, image.mode) in _PLAIN and not (
                getattr(image, "is_animated", False) and image.format != "MPO"
            )
            plain = plain and (orientation == 1 or image.format in _TURNED_BY_ALL)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadImageError(f"{name} cannot be decoded: {error}") from error
    if orientation in _TRANSPOSED:
        width, height = height, width
    return Header(height, width, PLAIN if plain else ODD)

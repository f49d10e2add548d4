"""Header of an image file: its displayed size, and if every decoder makes the same picture of it."""

import os
import struct
from pathlib import Path
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

from fastsiam.data.sources import formats
from fastsiam.data.sources.deep_pixels import kind_of, open_picture
from fastsiam.errors import UserError

# Kinds of a file, as an index keeps them. Files from UNREADABLE on are not used; UNWANTED ones can be decoded, but a
# scan excludes them.
UNKNOWN, PLAIN, ODD, UNREADABLE, UNWANTED = range(5)

_ORIENTATION, _SHORT, _TRANSPOSED = 0x0112, 3, (5, 6, 7, 8)
# Formats and PIL modes that DALI, OpenCV and PIL decode to the same RGB, one level off at most. CMYK, palettes,
# transparency, 16-bit grey and animations are each decoder's own.
_PLAIN = {("JPEG", "RGB"), ("JPEG", "L"), ("MPO", "RGB"), ("PNG", "RGB"), ("PNG", "L"), ("BMP", "RGB"), ("WEBP", "RGB")}
# DALI refuses some 16-bit bitmaps and widens others differently.
_PLAIN_BITMAPS = ("BGR", "BGRX")
# Places of an orientation in Pillow: an EXIF block, the same as text in a PNG, or XMP.
_TURNING = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")
_PNG_SIGNATURE_BYTES = 8
# Errors of Pillow's reader of EXIF where a count, an offset or a type is wrong.
_DAMAGED_EXIF = (SyntaxError, ValueError, TypeError, KeyError, IndexError, OverflowError, OSError, struct.error)

# Every process that decodes imports this module.
formats.register_plugins()


class BadImageError(UserError):
    """A file that cannot be decoded; the message names it."""

    def __init__(self, message: str, code: str = "bad-image"):
        super().__init__(message, code)


class Header(NamedTuple):
    height: int
    """Pixels as displayed: EXIF orientation applied."""
    width: int
    kind: int
    """PLAIN, or ODD for a file that decoders other than PIL show differently."""


def read_header(file: Path | str | bytes, name: object = None) -> Header:
    """Returns the header of an image file, given as a path or as its bytes; raises `BadImageError` naming it."""
    name = file if name is None else name
    try:
        with open_picture(file) as picture:
            image, tags = picture.image, picture.tags
            if tags is not None:
                return Header(tags.height, tags.width, ODD)
            width, height = image.size
            # The mode is RGB for 16 bits a colour as well.
            deep = kind_of(picture)
            turned = orientation(image)
            plain = not deep and _is_plain(image, turned)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadImageError(f"{name} cannot be decoded: {reason_of(error, file)}") from error
    if turned in _TRANSPOSED:
        width, height = height, width
    return Header(height, width, PLAIN if plain else ODD)


def reason_of(error: Exception, file: Path | str | bytes) -> str:
    """Returns the reason why an image cannot be decoded: the system's words, or what the file is instead."""
    if not isinstance(error, UnidentifiedImageError):
        return getattr(error, "strerror", None) or str(error)
    if not isinstance(file, bytes):
        try:
            with open(file, "rb") as opened:
                file = opened.read(formats.BEGINNING)
        except OSError as gone:
            return gone.strerror
    if not file:
        return "it is empty"
    cure = formats.cure_of(file)
    return f"it is {cure}" if cure else "it is not an image, or of a format that is not known here"


def orientation(image: Image.Image) -> int:
    """Returns EXIF's orientation of an image, or XMP's where EXIF has none; 1 to 8, 1 for none.

    May decode the pixels. XMP behind those of a PNG is ignored, as by other readers. A damaged block gives 1.
    """
    # Parsing these blocks costs more than the rest of the header.
    if any(key in image.info for key in _TURNING) or (
        image.format == "PNG" and image.fp and _has_chunk(image.fp, b"eXIf")
    ):
        try:
            found = image.getexif().get(_ORIENTATION, 1)
        except _DAMAGED_EXIF:
            return 1
        # Of another type it may be text, or a fraction.
        return next((number for number in range(1, 9) if number == found), 1)
    return 1


def _is_plain(image, turned):
    if (image.format, image.mode) not in _PLAIN:
        return False
    if image.format in ("JPEG", "MPO"):
        return not _is_stored_as_rgb(image) and (turned == 1 or _turned_by_all(image.info.get("exif", b""), turned))
    if image.format == "BMP" and image.tile[0].args[0] not in _PLAIN_BITMAPS:
        return False
    return turned == 1 and not getattr(image, "is_animated", False)


def _turned_by_all(exif, turned):
    """True where a JPEG's EXIF has the orientation as a 16-bit number; DALI reads no other, and no XMP."""
    return any(
        struct.pack(order + "HHIH", _ORIENTATION, _SHORT, 1, turned) in exif
        for order, mark in (("<", b"II"), (">", b"MM"))
        if exif[6:8] == mark
    )


def _is_stored_as_rgb(image):
    """True for a JPEG without YCbCr, by Adobe's mark or the names of components; only some decoders read them."""
    return image.mode == "RGB" and (image.info.get("adobe_transform") == 0 or [c[0] for c in image.layer] == [*b"RGB"])


def _has_chunk(file, kind):
    """True where a PNG has a chunk of this kind; keeps the file's position and reads 8 bytes a chunk."""
    place = file.tell()
    file.seek(_PNG_SIGNATURE_BYTES)
    found = False
    while not found and len(head := file.read(8)) == 8:
        found = head[4:] == kind
        file.seek(int.from_bytes(head[:4]) + 4, os.SEEK_CUR)
    file.seek(place)
    return found


def other_size(name: str, found, expected) -> str:
    """Returns the message for a file that decodes to another size than its header, or an index of it, says."""
    return (
        f"{name} decodes to {list(map(int, found))} pixels (height, width), but its header says "
        f"{list(map(int, expected))}"
    )

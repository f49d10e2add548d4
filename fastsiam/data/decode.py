"""Decodes one image with PIL: the truth that the other decoders are compared with."""

from pathlib import Path

from PIL import Image

from fastsiam.data.sources import deep_pixels
from fastsiam.data.sources.deep_pixels import open_picture
from fastsiam.data.sources.image_header import BadImageError, orientation, reason_of
from fastsiam.data.sources.levels import Levels
from fastsiam.data.sources.source import ImageSource

# What shows a picture of each EXIF orientation as it was taken.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(file: Path | bytes, name: object = None, levels: Levels = Levels()) -> Image.Image:  # noqa: B008
    """The RGB image as displayed (EXIF orientation applied); raises `BadImageError` naming the file.

    `file` is a path, or a file's bytes. `levels`: of pixels with more than eight bits.
    """
    try:
        with open_picture(file) as picture:
            image = picture.image
            pixels = deep_pixels.read(picture)
            turned = orientation(image) if picture.tags is None else pixels.orientation if pixels else 1
            if pixels is not None:
                image = Image.fromarray(levels.shown(pixels))
            if turned in _TURNS:
                image = image.transpose(_TURNS[turned])
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        name = name or ("the image" if isinstance(file, bytes) else file)
        raise BadImageError(f"{name} cannot be decoded: {reason_of(error, file)}") from error


def decode_image(source: ImageSource, index: int) -> Image.Image:
    """Image `index` of a source; raises `BadImageError`."""
    return decode(source.read(index) if source.packed else source.path(index), source.name(index), source.levels)

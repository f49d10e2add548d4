"""Measurement of the values of deep pixels that become black and white: `data.deep_pixels=scale`.

They are the 0.1 and 99.9 % percentiles in the training images, one range for each kind of file (PNGs of 16 bits, TIFFs
of floats), measured in a sample that is the same at every start, or by a scan. A kind that is not in the sample gets
the percentiles of each picture. Imports no torch.
"""

import json
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from fastsiam.data.sources import deep_pixels
from fastsiam.data.sources.image_header import BadImageError
from fastsiam.data.sources.levels import Levels, numbers, value_range
from fastsiam.data.sources.source import ImageSource

# Numbers of names looked at, of files opened, of files of each kind decoded, and of values of each.
_NAMES, _OPENED, _DECODED, _VALUES = 8192, 256, 32, 1 << 16
# Formats of eight bits, or that Pillow decodes to eight.
_SHALLOW = (b".jpg", b".jpeg", b".jpe", b".jfif", b".webp", b".gif", b".bmp", b".avif", b".heic")
_READERS = 8
_UNREADABLE = (BadImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def levels_of(source: ImageSource, asked: str, scanned: Path | None = None) -> Levels:
    """Returns the levels of a source; `scanned`: manifest of a scan, which keeps the ranges beside it."""
    if scanned is not None and asked == "scale" and (found := _of_scan(scanned)):
        return Levels(asked, found, "by a scan, images with ")
    chosen = _candidates(source)
    if not len(chosen):
        return Levels(asked)
    with ThreadPoolExecutor(_READERS) as pool:
        kinds = dict(zip(chosen.tolist(), pool.map(lambda index: _kind(source, index), chosen.tolist()), strict=True))
    found = [index for index, kind in kinds.items() if kind]
    if not found:
        return Levels(asked)
    of = f"{len(found)} of {len(chosen):,} images" + (" looked at" if len(chosen) < len(source) else "")
    return Levels(asked, measured(source, found, asked), f"{of} with ")


def measured(source: ImageSource, indices: list[int], asked: str = "scale", most: int = _DECODED) -> dict:
    """Returns the range of each kind among these images, from at most `most` of each that can be decoded."""
    by_kind = defaultdict(list)
    for index in indices:
        by_kind[_kind(source, index)].append(index)
    by_kind.pop(None, None)
    found = {}
    for kind, members in sorted(by_kind.items()):
        with ThreadPoolExecutor(_READERS) as pool:
            pictures = list(pool.map(lambda index: _sample(source, index), _spread(np.array(members), most).tolist()))
        pictures = [picture for picture in pictures if picture is not None]
        if pictures:
            values = np.concatenate([values for _, values in pictures])
            found[kind] = value_range(asked, pictures[0][0], values, len(values))
    return found


def range_file(manifest: Path) -> Path:
    """Path of the ranges that a scan has found."""
    return manifest.with_name(manifest.name + ".deep.json")


def _of_scan(manifest):
    try:
        found = json.loads(range_file(manifest).read_text(encoding="utf-8"))
        return {str(kind): (float(low), float(high)) for kind, (low, high) in found.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return None


def _candidates(source):
    """Returns indices of up to 256 images that may have more than eight bits, by their names; none for JPEGs."""
    some = _spread(np.arange(len(source)), _NAMES)
    deep_names = [not name.lower().endswith(_SHALLOW) for name in source.names[some].tolist()]
    return _spread(some[np.array(deep_names, bool)], _OPENED)


def _spread(indices, most):
    if len(indices) <= most:
        return indices
    return indices[np.linspace(0, len(indices) - 1, most).astype(np.int64)]


def _file(source, index):
    return source.read(index) if source.packed else source.path(index)


def _kind(source, index):
    try:
        with deep_pixels.open_picture(_file(source, index)) as picture:
            return deep_pixels.kind_of(picture)
    except _UNREADABLE:
        return None


def _sample(source, index):
    """Returns the type's span and some values of an image; None where it cannot be decoded."""
    try:
        with deep_pixels.open_picture(_file(source, index)) as picture:
            pixels = deep_pixels.read(picture)
    except _UNREADABLE:
        return None
    return pixels.span, numbers(pixels.values, _VALUES)

"""Which values of pixels with more than eight bits become black and white: `data.deep_pixels`.

By default what they are in the training images: their 0.1 and 99.9 % percentiles, one range for each kind of file (PNGs
of 16 bits, TIFFs of floats), measured in a sample that is the same at every start, or by a scan. A kind that the sample
did not show gets the percentiles of each picture. Imports no torch.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from fastsiam.config.data_sections import parse_span
from fastsiam.data.sources import deep_pixels
from fastsiam.data.sources.deep_pixels import Deep
from fastsiam.data.sources.image_header import BadImageError

if TYPE_CHECKING:
    from fastsiam.data.sources.open import ImageSource

PERCENTILES = (0.1, 99.9)
# Names among which pictures of more than eight bits are looked for, how many of those are opened, and how many of each
# kind decoded; values taken of each.
_NAMES, _OPENED, _DECODED, _VALUES = 8192, 256, 32, 1 << 16
# Formats that have eight bits, or that Pillow decodes to eight in full.
_SHALLOW = (b".jpg", b".jpeg", b".jpe", b".jfif", b".webp", b".gif", b".bmp", b".avif", b".heic")
_READERS = 8
# Floats from here on mean that nothing was measured: the largest ones of the type are written for that (GIS programs
# without a tag for it, -3.4e38), and infinity.
_NO_VALUE = np.float32(1e37)
_UNREADABLE = (BadImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Levels:
    """How deep pixels become 8 bits."""

    asked: str = "scale"
    """Of `data.deep_pixels`: scale, type, or LOW..HIGH."""
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Low and high by kind, of the kinds that were seen."""
    seen: str = ""
    """How many images of how many have more than eight bits, in words."""

    def range(self, pixels: Deep) -> tuple[float, float]:
        """The values of these pixels that become 0 and 255."""
        if pixels.kind in self.ranges:
            return self.ranges[pixels.kind]
        return _range(self.asked, pixels.span, pixels.values, 1 << 20)

    def shown(self, pixels: Deep) -> np.ndarray:
        """uint8 of the same shape; what is no number becomes black."""
        values = pixels.values
        low, high = pixels.span if values.dtype == np.uint8 else self.range(pixels)
        if (low, high) == pixels.span and values.dtype.kind == "u" and high >= 255:
            levels = (values >> (int(high).bit_length() - 8)).astype(np.uint8)
        else:
            with np.errstate(invalid="ignore", over="ignore"):
                scaled = (values.astype(np.float64) - low) * (255 / (high - low))
            levels = np.nan_to_num(np.clip(np.rint(scaled), 0, 255), nan=0).astype(np.uint8)
        return 255 - levels if pixels.inverted else levels

    def text(self) -> str:
        """For a run's first lines; "" where all images have eight bits."""
        if not self.ranges:
            return ""
        ranges = ", ".join(f"{kind} {low:,.6g}..{high:,.6g}" for kind, (low, high) in self.ranges.items())
        return f"{self.seen}more than 8 bits: {ranges} become 0..255 (data.deep_pixels={self.asked})"

    def tag(self) -> str:
        """Tells stores of decoded images apart; "" where all images have eight bits."""
        return hashlib.sha256(repr(sorted(self.ranges.items())).encode()).hexdigest()[:8] if self.ranges else ""


def levels_of(source: "ImageSource", asked: str, scanned: Path | None = None) -> Levels:
    """`scanned`: the manifest of a scan, beside which the ranges are that it has found."""
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


def measured(source: "ImageSource", indices: list[int], asked: str = "scale", most: int = _DECODED) -> dict:
    """The range of each kind among these images, at most so many of each kind; what cannot be decoded is left out."""
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
            found[kind] = _range(asked, pictures[0][0], values, len(values))
    return found


def range_file(manifest: Path) -> Path:
    """Where a scan writes the ranges that it has found."""
    return manifest.with_name(manifest.name + ".deep.json")


def _of_scan(manifest):
    try:
        found = json.loads(range_file(manifest).read_text(encoding="utf-8"))
        return {str(kind): (float(low), float(high)) for kind, (low, high) in found.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return None


def _candidates(source):
    """Indices of up to 256 images that may have more than eight bits, by their names; none for JPEGs."""
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
    """The type's span and some of the values of an image that are numbers; None where it cannot be decoded."""
    try:
        with deep_pixels.open_picture(_file(source, index)) as picture:
            pixels = deep_pixels.read(picture)
    except _UNREADABLE:
        return None
    return pixels.span, _numbers(pixels.values, _VALUES)


def _numbers(values, most):
    flat = values.reshape(-1)
    flat = flat[:: max(1, len(flat) // max(1, most))]
    return flat[np.abs(flat) < _NO_VALUE] if flat.dtype.kind == "f" else flat


def _range(asked, span, values, most):
    if asked == "type":
        return span
    if asked != "scale":
        return parse_span(asked)
    values = _numbers(values, most)
    if not len(values):
        return span
    low, high = np.percentile(values, PERCENTILES)
    if low == high:
        low, high = values.min(), values.max()
    # What fills its type is as it should be; floats fill none.
    if values.dtype.kind != "f" and high - low > (span[1] - span[0]) / 2:
        return span
    low, high = float(f"{low:.6g}"), float(f"{high:.6g}")
    return (low, high) if low < high else (low, low + 1.0)

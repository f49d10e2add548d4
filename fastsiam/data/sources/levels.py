"""Map from pixels of more than eight bits to eight: `data.deep_pixels`. Imports no torch."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from fastsiam.config.data_sections import parse_span
from fastsiam.data.sources.deep_pixels import Deep

PERCENTILES = (0.1, 99.9)
# Larger floats mean that nothing was measured. GIS programs without a tag for it write the largest float (-3.4e38).
_NO_VALUE = np.float32(1e37)


@dataclass(frozen=True)
class Levels:
    """Map from pixels of more than eight bits to eight."""

    asked: str = "scale"
    """Value of `data.deep_pixels`: scale, type, or LOW..HIGH."""
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Low and high value, by kind of file."""
    seen: str = ""
    """Number of images with more than eight bits, in words."""

    def range(self, pixels: Deep) -> tuple[float, float]:
        """Values of these pixels that become 0 and 255."""
        if pixels.kind in self.ranges:
            return self.ranges[pixels.kind]
        return value_range(self.asked, pixels.span, pixels.values, 1 << 20)

    def shown(self, pixels: Deep) -> np.ndarray:
        """Returns uint8 of the same shape; NaN becomes black."""
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
        """Text for a run's first lines; "" where all images have eight bits."""
        if not self.ranges:
            return ""
        ranges = ", ".join(f"{kind} {low:,.6g}..{high:,.6g}" for kind, (low, high) in self.ranges.items())
        return f"{self.seen}more than 8 bits: {ranges} become 0..255 (data.deep_pixels={self.asked})"

    def tag(self) -> str:
        """Hash of the ranges, for stores of decoded images; "" where all images have eight bits."""
        return hashlib.sha256(repr(sorted(self.ranges.items())).encode()).hexdigest()[:8] if self.ranges else ""


def numbers(values: np.ndarray, most: int) -> np.ndarray:
    """Returns about `most` of the values at equal distances, without the floats that stand for no measurement."""
    flat = values.reshape(-1)
    flat = flat[:: max(1, len(flat) // max(1, most))]
    return flat[np.abs(flat) < _NO_VALUE] if flat.dtype.kind == "f" else flat


def value_range(asked: str, span: tuple[float, float], values: np.ndarray, most: int) -> tuple[float, float]:
    """Returns the low and high value for `data.deep_pixels=asked`; `span`: of the type, `most`: values to look at."""
    if asked == "type":
        return span
    if asked != "scale":
        return parse_span(asked)
    values = numbers(values, most)
    if not len(values):
        return span
    low, high = np.percentile(values, PERCENTILES)
    if low == high:
        low, high = values.min(), values.max()
    # Values that use more than half of an integer type keep its range; floats have none.
    if values.dtype.kind != "f" and high - low > (span[1] - span[0]) / 2:
        return span
    low, high = float(f"{low:.6g}"), float(f"{high:.6g}")
    return (low, high) if low < high else (low, low + 1.0)

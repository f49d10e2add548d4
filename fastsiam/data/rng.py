"""Every random number of a run as a pure function of (seed, epoch, image index, view).

Counter-based: a draw is a hash of its address, so it does not depend on the order of work, the number of workers
or of processes, and resuming needs no random state. Vectorised numpy; imports no torch.
"""

import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from fastsiam.config.views import ViewSpec

_GOLDEN, _MASK = 0x9E3779B97F4A7C15, 2**64 - 1
_CROP_ATTEMPTS = 10

# Brightness, contrast, saturation and hue that change nothing.
NO_JITTER = (1.0, 1.0, 1.0, 0.0)

# The address of each draw within a view; a new one goes to the end, so that old runs keep theirs.
_NAMES = """
order flip jitter brightness contrast saturation hue color_order grayscale blur blur_sigma solarize probe replacement
subset
"""
_SLOTS = {name: slot for slot, name in enumerate(_NAMES.split())}
_CROP_SLOT = 1000
# Those of `augment_draws`.
_AUGMENT = [
    "flip",
    "jitter",
    "brightness",
    "contrast",
    "saturation",
    "hue",
    "color_order",
    "grayscale",
    "blur",
    "blur_sigma",
    "solarize",
]
# The orders of four colour operations, [24, 4].
_PERMUTATIONS = np.array(list(itertools.permutations(range(4))))


@dataclass(frozen=True)
class AugmentDraws:
    """What happens to N crops of one view after the crop; every array has N rows."""

    flip: np.ndarray
    """[N] bool."""
    factors: np.ndarray
    """[N, 4] float32: brightness, contrast, saturation factors and the turn of the hue; `NO_JITTER` for no change."""
    order: np.ndarray
    """[N, 4] int64: which of the four comes first, second, ..."""
    grayscale: np.ndarray
    """[N] bool."""
    sigma: np.ndarray
    """[N] float32 in pixels of the view; 0 where the view is not blurred."""
    solarize: np.ndarray
    """[N] bool."""

    @staticmethod
    def concatenate(parts: "Sequence[AugmentDraws]") -> "AugmentDraws":
        names = AugmentDraws.__dataclass_fields__
        return AugmentDraws(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


def uniform(seed: int, epoch: int, indices: np.ndarray, view: int, slot: int) -> np.ndarray:
    """Float64 in [0, 1) for each image index, from splitmix64's finaliser chained over the address."""
    return uniforms(seed, epoch, indices, view, (slot,))[0]


def uniforms(seed: int, epoch: int, indices: np.ndarray, view: int, slots: Iterable[int]) -> np.ndarray:
    """`uniform` of several slots at once: float64 [S, N]."""
    return (_bits(seed, epoch, indices, view, slots) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def epoch_order(seed: int, epoch: int, num_images: int) -> np.ndarray:
    """The order of an epoch: a permutation of range(num_images), int64."""
    (keys,) = _bits(seed, epoch, np.arange(num_images), 0, (_SLOTS["order"],))
    return np.argsort(keys, kind="stable")


def replace_skipped(seed: int, epoch: int, indices: np.ndarray, skipped: np.ndarray) -> np.ndarray:
    """`indices` [n] with another image, drawn at random, in the place of each that `skipped` [N] (bool) leaves out.

    The replacement depends on the epoch and the image alone, unless a draw falls on an image that is left out too:
    then it is drawn again.
    """
    replaced = np.array(indices)
    attempt = 0
    while (rows := np.flatnonzero(skipped[replaced])).size:
        drawn = uniform(seed, epoch, indices[rows], attempt, _SLOTS["replacement"])
        replaced[rows] = (drawn * len(skipped)).astype(np.int64)
        attempt += 1
    return replaced


def probe_indices(seed: int, num_images: int, count: int) -> np.ndarray:
    """`count` images (or all, if fewer) of a fixed random subset, sorted, int64."""
    (keys,) = _bits(seed, 0, np.arange(num_images), 0, (_SLOTS["probe"],))
    return np.sort(np.argsort(keys, kind="stable")[:count])


def subset_keys(seed: int, count: int) -> np.ndarray:
    """Float64 [count] in [0, 1): the lower, the earlier an image or class is chosen for a part of the labels."""
    return uniform(seed, 0, np.arange(count), 0, _SLOTS["subset"])


def crop_boxes(spec: ViewSpec, seed: int, epoch: int, indices, view: int, sizes: np.ndarray) -> np.ndarray:
    """Random resized crops, drawn as torchvision's RandomResizedCrop does.

    `sizes`: [N, 2] heights and widths in pixels. Returns int32 [N, 4]: top, left, height, width. The area is uniform
    in `spec.crop_scale`, the logarithm of the aspect ratio in that of (3/4, 4/3); ten attempts, then the largest
    centred crop of an allowed ratio.
    """
    indices = np.asarray(indices)
    height, width = sizes[:, 0].astype(np.float64), sizes[:, 1].astype(np.float64)
    boxes, rows = _fallback_boxes(height, width), np.arange(len(indices))
    # Most images take the first attempt; for the others alone the rest are drawn, all at once.
    for attempts in (range(1), range(1, _CROP_ATTEMPTS)):
        slots = range(_CROP_SLOT + 4 * attempts.start, _CROP_SLOT + 4 * attempts.stop)
        drawn = uniforms(seed, epoch, indices[rows], view, slots).reshape(len(attempts), 4, -1)
        tried, fits = _tried_boxes(spec.crop_scale, height[rows], width[rows], *drawn.swapaxes(0, 1))
        first, found = tried[fits.argmax(0), np.arange(len(rows))], fits.any(0)
        boxes[rows[found]] = first[found]
        rows = rows[~found]
    return boxes.astype(np.int32)


def center_boxes(sizes: np.ndarray, ratio: float) -> np.ndarray:
    """The centred square whose side is `ratio` of the short side: int32 [N, 4] (top, left, height, width)."""
    side = np.maximum(np.rint(sizes.min(1) * ratio), 1)
    top, left = (sizes[:, 0] - side) // 2, (sizes[:, 1] - side) // 2
    return np.stack((top, left, side, side), 1).astype(np.int32)


def augment_draws(spec: ViewSpec, seed: int, epoch: int, indices, view: int) -> AugmentDraws:
    """All draws of one view but its box, for the images `indices` [N]."""
    drawn = dict(zip(_AUGMENT, uniforms(seed, epoch, indices, view, map(_SLOTS.get, _AUGMENT)), strict=True))

    def between(name, low, high):
        return low + (high - low) * drawn[name]

    jitter = drawn["jitter"] < spec.jitter
    factors = np.stack(
        [
            *(between(n, 1 - getattr(spec, n), 1 + getattr(spec, n)) for n in ("brightness", "contrast", "saturation")),
            between("hue", -spec.hue, spec.hue),
        ],
        1,
    )
    factors = np.where(jitter[:, None], factors, NO_JITTER).astype(np.float32)
    blurred = drawn["blur"] < spec.blur
    return AugmentDraws(
        flip=drawn["flip"] < spec.flip,
        factors=factors,
        order=_PERMUTATIONS[(drawn["color_order"] * len(_PERMUTATIONS)).astype(np.int64)],
        grayscale=drawn["grayscale"] < spec.grayscale,
        sigma=np.where(blurred, between("blur_sigma", *spec.blur_sigma), 0).astype(np.float32),
        solarize=drawn["solarize"] < spec.solarize,
    )


def _tried_boxes(scale, height, width, for_area, for_ratio, for_top, for_left):
    """Boxes [A, N, 4] of attempts by uniform draws [A, N], and whether each lies in its image."""
    area = height * width * (scale[0] + (scale[1] - scale[0]) * for_area)
    ratio = np.exp(np.log(3 / 4) + (np.log(4 / 3) - np.log(3 / 4)) * for_ratio)
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    top, left = np.floor(for_top * (height - h + 1)), np.floor(for_left * (width - w + 1))
    return np.stack((top, left, h, w), 2), (w > 0) & (w <= width) & (h > 0) & (h <= height)


def _fallback_boxes(height, width):
    ratio = width / height
    w = np.where(ratio > 4 / 3, np.rint(height * 4 / 3), width)
    h = np.where(ratio < 3 / 4, np.rint(width * 4 / 3), height)
    w, h = np.minimum(w, width), np.minimum(h, height)
    return np.stack(((height - h) // 2, (width - w) // 2, h, w), 1)


def _bits(seed, epoch, indices, view, slots):
    """[S, N] for slots [S] and indices [N]."""
    # The key of a slot in Python's integers: as NumPy's scalars it takes 30 us, which was most of a batch's draws.
    keys = [functools.reduce(_chain, (epoch, view, slot), _mix((seed + _GOLDEN) & _MASK)) for slot in slots]
    keys = np.array(keys, np.uint64)[:, None]
    with np.errstate(over="ignore"):
        return _mix(_mix((np.asarray(indices).astype(np.uint64) ^ keys) + np.uint64(_GOLDEN)) ^ keys)


def _chain(key, word):
    return _mix(((key ^ int(word)) + _GOLDEN) & _MASK)


def _mix(x):
    """splitmix64's finaliser (Steele, Lea, Flood 2014), of an array of uint64 or a Python integer below 2^64."""
    if isinstance(x, int):
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
        return x ^ (x >> 31)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

"""Demo images of the quickstart: ten families of patterns, drawn by a seed.

A class is a family (stripes, checks, ...). Angle, place, period, phase, warp, sign of the contrast and colour
are drawn anew for every image and say nothing about the class:

- before colour and noise every image has the same histogram of luminance (ranks are mapped to one fixed
  curve), so neither brightness nor contrast nor their distribution tells a family from another;
- the colour is a smooth random field whose mean is zero in every channel of every image. With a mean
  colour drawn for every image (std 45 grey levels) SimSiam matches two views by it and learns nothing: kNN
  10 % after 10 epochs instead of 95, with std_ratio at 0.99;
- the pattern fills the image, so that a crop of a fifth of its area still shows it.

Imports no torch.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from fastsiam.errors import UserError

SIDE = 48
TRAIN_PER_CLASS, VAL_PER_CLASS = 400, 100
NOTE = "demo.json"
VERSION = 1  # in NOTE: another number for other pixels

_QUALITY = 90
_VAL_START = 1 << 31  # the index of the first val image; train images count from 0
_GREY = 127.5

# Standard deviations in grey levels. kNN on the pixels of seed 1 at 32 px, and on a random ResNet-8 with
# filled batch-norm statistics (mean of 4): 24 and 35 %; with contrast 46 and colour 22, 28 and 39 %; with 32
# and 32, 15 and 26 %; with a warp of 1.5, 32 and 40 %; with a warp of 3.2, 18 and 28 % (all with colour 26).
# Two views of an image share the colour field where they overlap: with colour 26 one of six runs learned that
# field and not the pattern (kNN 10 to 20 % after 2 to 5 epochs), with 18 and a warp of 2.4 the same run reached
# 55 % after 2.
_CONTRAST = 41.0
_COLOUR = 18.0
_NOISE = 8.0

# In pixels: the standard deviation of each component of the displacement, and the range of the period.
_WARP = 2.8
_PERIODS = (7.5, 13.0)


# float64 [SIDE, 4], the first cosines of the DCT-II over SIDE pixels, the constant first.
_BASIS = np.cos(np.pi * np.outer((np.arange(SIDE) + 0.5) / SIDE, np.arange(4)))
_AXIS = np.arange(SIDE) - (SIDE - 1) / 2
_CURVE = np.tanh(3 * np.linspace(-1, 1, SIDE * SIDE))
_CURVE /= _CURVE.std()


def _smooth_fields(rng, count):
    """float64 [count, SIDE, SIDE], random fields of low frequency with mean 0 and std 1."""
    weights = rng.standard_normal((count, 4, 4)) / (1 + np.add.outer(np.arange(4), np.arange(4)))
    weights[:, 0, 0] = 0
    fields = _BASIS @ weights @ _BASIS.T
    return fields / fields.std(axis=(1, 2), keepdims=True)


def _triangle(x):
    """Triangle wave of period 1 with values in [-1, 1]: 1 at integers, -1 half-way between."""
    return 4 * np.abs(x - np.floor(x) - 0.5) - 1


def _cell(x, y, shift=0.0):
    """Place inside the unit cell, each in [-0.5, 0.5), rows of cells moved by `shift` against each other."""
    row = np.floor(y)
    x = x + shift * row
    return x - np.floor(x) - 0.5, y - row - 0.5


def _stripes(x, y, rng):
    return _triangle(x)


def _checks(x, y, rng):
    return np.sin(np.pi * x) * np.sin(np.pi * y)


def _rings(x, y, rng):
    dx, dy = _cell(x / 2.2, y / 2.2, 0.5)
    return _triangle(2.2 * np.hypot(dx, dy))


def _dots(x, y, rng):
    dx, dy = _cell(x, y, 0.5)
    return -np.hypot(dx, dy) * (1 + 0.4 * (np.floor(y) % 2))


def _zigzags(x, y, rng):
    return _triangle(x + 0.5 * _triangle(y / 2))


def _grids(x, y, rng):
    return np.maximum(_triangle(x), _triangle(y))


def _spokes(x, y, rng):
    dx, dy = _cell(x / 2, y / 2)
    return np.cos(6 * np.arctan2(dy, dx))


def _blobs(x, y, rng):
    angle, phase = rng.uniform(0, 2 * np.pi, (2, 16, 1, 1))
    frequency = 2 * np.pi * rng.uniform(0.55, 0.95, (16, 1, 1))
    return np.cos(frequency * (np.cos(angle) * x + np.sin(angle) * y) + phase).sum(axis=0)


def _triangles(x, y, rng):
    a, b = 0.9 * np.pi * x, 0.45 * np.pi * (x + np.sqrt(3) * y)
    return np.sin(a) * np.sin(b) * np.sin(a - b)


def _crosses(x, y, rng):
    dx, dy = _cell(x / 1.5, y / 1.5, 0.5)
    a, b = np.abs(dx), np.abs(dy)
    return -np.minimum(np.maximum(a / 3, b), np.maximum(a, b / 3))


_FAMILIES = (_stripes, _checks, _rings, _dots, _zigzags, _grids, _spokes, _blobs, _triangles, _crosses)
CLASSES = tuple(family.__name__.removeprefix("_") for family in _FAMILIES)


def draw_image(seed: int, label: int, index: int) -> np.ndarray:
    """Draws image `index` < 2**32 of the class `CLASSES[label]`: uint8 [48, 48, 3], RGB.

    A pure function of the arguments; `seed` < 2**64 is that of the whole set. Raises `UserError` for an argument out of
    range.
    """
    if not (0 <= seed < 1 << 64 and 0 <= label < len(CLASSES) and 0 <= index < 1 << 32):
        raise UserError(
            f"seed, label, index = {seed}, {label}, {index}: allowed are 0 to 2**64 - 1, "
            f"0 to {len(CLASSES) - 1}, 0 to 2**32 - 1",
            "out-of-range",
        )
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, label << 32 | index], dtype=np.uint64)))
    angle = rng.uniform(0, 2 * np.pi)
    period = rng.uniform(*_PERIODS)
    offset = rng.uniform(0, 64, 2)
    warp = _WARP * _smooth_fields(rng, 2)
    u, v = _AXIS[None, :] + warp[0], _AXIS[:, None] + warp[1]
    x = (np.cos(angle) * u - np.sin(angle) * v) / period + offset[0]
    y = (np.sin(angle) * u + np.cos(angle) * v) / period + offset[1]
    pattern = _FAMILIES[label](x, y, rng)
    luminance = np.empty(SIDE * SIDE)
    luminance[np.argsort(pattern, axis=None, kind="stable")] = _CURVE
    luminance *= _CONTRAST * rng.choice((-1.0, 1.0))
    image = _GREY + luminance.reshape(SIDE, SIDE, 1) + _COLOUR * _smooth_fields(rng, 3).transpose(1, 2, 0)
    image += _NOISE * rng.standard_normal((SIDE, SIDE, 3))
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def draw_demo(
    root: Path, seed: int, train_per_class: int = TRAIN_PER_CLASS, val_per_class: int = VAL_PER_CLASS
) -> None:
    """Writes the demo set: root/{train,val}/CLASS/00000.jpg, ... and root/demo.json.

    The set is written to a hidden sibling folder and renamed, so `root` is either absent or whole. The same arguments
    give the same bytes with the same numpy and Pillow. Leaves a root that holds the set asked for as it is; raises
    `UserError` where it is another set, and for an argument out of range.
    """
    counts = {"train_per_class": train_per_class, "val_per_class": val_per_class}
    asked = {"version": VERSION, "seed": seed, **counts}
    if not all(0 <= count < _VAL_START for count in counts.values()):
        raise UserError(f"{counts}: each must be 0 to {_VAL_START - 1}", "out-of-range")
    if root.exists():
        _require_equal(root, asked)
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}.", suffix=".partial", dir=root.parent) as partial:
        whole = Path(partial) / root.name
        _write_set(whole, asked)
        try:
            whole.rename(root)
        except OSError:
            if not root.exists():
                raise
            _require_equal(root, asked)  # another process was faster


def _write_set(folder, asked):
    """Writes train, val and demo.json into `folder`, which does not exist yet."""
    for part, start, count in (("train", 0, asked["train_per_class"]), ("val", _VAL_START, asked["val_per_class"])):
        for label, name in enumerate(CLASSES):
            (folder / part / name).mkdir(parents=True)
            for index in range(count):
                image = Image.fromarray(draw_image(asked["seed"], label, start + index))
                image.save(folder / part / name / f"{index:05d}.jpg", quality=_QUALITY)
    (folder / NOTE).write_text(json.dumps(asked, indent=1) + "\n", encoding="ascii")


def _require_equal(root, asked):
    """Raises UserError unless root/demo.json holds what is asked."""
    advice = "name another folder, or delete this one"
    note = root / NOTE
    if not note.is_file():
        raise UserError(f"{root} exists without a demo.json, but {asked} is needed; {advice}", "other-demo")
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
    except ValueError:
        found = "an unreadable demo.json"
    if found != asked:
        raise UserError(f"{root} holds {found}, but {asked} is needed; {advice}", "other-demo")

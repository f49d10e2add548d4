"""JPEGs that loaders are measured on: a folder of photographs, or drawn ones of the same size and weight.

Drawn images stand in where no photographs are given. They cost a decoder about as many bits as ImageNet's median file
(500x375, 114 kB), but no drawn image is a photograph: results name which were read.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from fastsiam.errors import UserError

WIDTH, HEIGHT, QUALITY = 500, 375, 95
CLASSES = 10
SEED = 0
SUFFIXES = (".jpg", ".jpeg")
DRAWN = "drawn"

# Cells (columns, rows) of each octave and its weight: the amplitude falls with frequency, as in photographs.
_OCTAVES = ((4, 3, 0.34), (16, 12, 0.24), (64, 48, 0.18), (250, 188, 0.16))
_GRAIN = 6.0


def photographs(folder: Path | str | None, cache: Path | str, count: int) -> tuple[Path, str]:
    """A folder of JPEGs in class folders, and the word that results carry for it.

    `folder` given: itself and its name, however many files it holds (callers repeat them up to `count`). None: at
    least `count` JPEGs of 500x375, drawn into `cache`/drawn where they are not there yet, and "drawn". Raises
    `UserError` where `folder` holds no JPEG.
    """
    if folder is not None:
        root = Path(folder)
        if not any(path.suffix.lower() in SUFFIXES for path in root.rglob("*")):
            endings = " or ".join(SUFFIXES)
            raise UserError(f"--images: {root} holds no file that ends in {endings}; give another", code="no-jpegs")
        return root, root.resolve().name
    root = Path(cache) / DRAWN
    for index in range(count):
        path = root / f"class{index % CLASSES}" / f"{index:06d}.jpg"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(".tmp")
            Image.fromarray(draw(index)).save(unfinished, format="JPEG", quality=QUALITY)
            unfinished.replace(path)
    return root, DRAWN


def draw(index: int) -> np.ndarray:
    """uint8 [375, 500, 3]: four octaves of smooth colour noise and a grain; a function of the index."""
    generator = np.random.default_rng((SEED, index))
    image = np.zeros((HEIGHT, WIDTH, 3), np.float32)
    for columns, rows, weight in _OCTAVES:
        cells = generator.integers(0, 256, (rows, columns, 3), np.uint8)
        smooth = Image.fromarray(cells).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        image += weight * np.asarray(smooth, np.float32)
    image += _GRAIN * generator.standard_normal((HEIGHT, WIDTH, 1), np.float32)
    mean = 127.5 * sum(weight for _, _, weight in _OCTAVES)
    return np.clip(127.5 + image - mean, 0, 255).astype(np.uint8)

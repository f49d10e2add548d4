"""Chooses the side of the squares that `data.backend=resident` stores images as, where data.store_size is null."""

import math
from collections.abc import Sequence

import numpy as np

from fastsiam.config import Config
from fastsiam.config.data_sections import ViewsConfig
from fastsiam.data.sources.image_header import UNKNOWN
from fastsiam.data.sources.source import ImageSource

# A store that would be larger is made of smaller squares, down to the size of a view.
MOST_BYTES = 4e9
_SAMPLE = 1000


def with_its_store(config: Config, source: ImageSource | None, say=lambda line: None) -> Config:
    """Makes `data.store_size: null` of the backend resident a number, and prints it by `say`.

    The same images and views get the same number on every machine: free memory has no part in it.
    """
    data = config.data
    if source is None or data.backend != "resident" or data.store_size is not None:
        return config
    size = choose_store_size(source, config.views)
    say(f"store     squares of {size} px, by the sizes of images and views; data.store_size=N sets another")
    return config.with_values({"data.store_size": size})


def choose_store_size(source: ImageSource, groups: Sequence[ViewsConfig]) -> int:
    """Returns the median side of the images in pixels, at least that of a view, and at most what views can use.

    They can use a store in which a crop of the smallest area, `views.crop_scale`, has as many pixels as a view.
    """
    view, fitting = max(group.full_size for group in groups), math.isqrt(int(MOST_BYTES / (3 * len(source))))
    if fitting <= view:
        return view
    sample = np.unique(np.linspace(0, len(source) - 1, min(len(source), _SAMPLE)).astype(np.int64))
    # Whose header cannot be read is told by the loader, which looks again.
    source.mark(list(source.look(sample)), UNKNOWN)
    sizes = source.image_sizes[sample].astype(np.float64)
    sides = np.sqrt(sizes.prod(1))[(sizes > 0).all(1)]
    median = round(float(np.median(sides))) if len(sides) else view
    useful = max(math.ceil(group.full_size / group.crop_scale[0] ** 0.5) for group in groups)
    return max(view, min(median, useful, fitting))

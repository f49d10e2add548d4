"""The side of the squares that `data.backend=resident` stores images as, where data.store_size leaves it open."""

import math

import numpy as np

from fastsiam.config import Config
from fastsiam.config.data_sections import ViewsConfig
from fastsiam.data.sources.image_header import UNKNOWN
from fastsiam.data.sources.source import ImageSource

# A store that would be larger is made of smaller squares, down to the size of a view.
MOST_BYTES = 4e9
_SAMPLE = 1000


def with_its_store(config: Config, source: ImageSource | None, say=lambda line: None) -> Config:
    """`data.store_size: null` of the backend resident made a number, which `say` is told.

    The same images and views have the same one on every machine: it does not depend on the memory that is free.
    """
    data = config.data
    if source is None or data.backend != "resident" or data.store_size is not None:
        return config
    size = choose_store_size(source, config.views)
    say(f"store     squares of {size} px, by the sizes of images and views; data.store_size=N sets another")
    return config.with_values({"data.store_size": size})


def choose_store_size(source: ImageSource, views: ViewsConfig) -> int:
    """The median side of the images, in pixels: no less than that of a view, and no more than has any use for one.

    A crop of the smallest area, `views.crop_scale`, has as many pixels as a view then.
    """
    view, fitting = views.full_size, math.isqrt(int(MOST_BYTES / (3 * len(source))))
    if fitting <= view:
        return view
    sample = np.unique(np.linspace(0, len(source) - 1, min(len(source), _SAMPLE)).astype(np.int64))
    # Whose header cannot be read is told by the loader, which looks again.
    source.kinds[list(source.look(sample))] = UNKNOWN
    sizes = source.image_sizes[sample].astype(np.float64)
    sides = np.sqrt(sizes.prod(1))[(sizes > 0).all(1)]
    median = round(float(np.median(sides))) if len(sides) else view
    return max(view, min(median, math.ceil(view / views.crop_scale[0] ** 0.5), fitting))

"""Published accuracies of SimSiam with their sources, looked up for a config. Nothing is interpolated."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fastsiam.config import Config, differences, load_config

# SimSiam (arXiv 2011.10566), Table 2: ImageNet linear top-1 after 100 epochs by batch size.
TABLE_2 = {64: 66.1, 128: 67.3, 256: 68.1, 512: 68.1, 1024: 68.0, 2048: 67.9, 4096: 64.0}
IMAGENET_IMAGES, CIFAR10_IMAGES = 1_281_167, 50_000

# Keys in which a run may differ from a table's config and still have its recipe.
_FREE = ("data.", "evaluate.", "checkpoint.", "collapse.", "train.", "budget", "run.")
_FREE_KEYS = ("views.color", "optimizer.implementation", "optimizer.warmup")
_COSINES = ("cosine", "cosine_per_epoch")


@dataclass(frozen=True)
class Table:
    """Top-1 in percent by the number of epochs; each row is a run of its own with its own schedule."""

    source: str
    metric: str
    batch_size: int
    rows: Mapping[int, float]


TABLE_4 = Table("the paper's Table 4", "ImageNet linear top-1", 256, {100: 68.1, 200: 70.0, 400: 70.8, 800: 71.3})
# SimSiam, appendix D.
APPENDIX_D = Table("the paper's appendix D", "CIFAR-10 linear top-1", 512, {800: 91.8})
# lightly's documentation, benchmarks: CIFAR-10, ResNet-18, kNN.
LIGHTLY_512 = Table("lightly's benchmark", "CIFAR-10 kNN top-1", 512, {200: 76.4, 800: 90.4})
LIGHTLY_128 = Table("lightly's benchmark", "CIFAR-10 kNN top-1", 128, {200: 81.9})

# Config with the encoder and recipe of the tables: name and number of images of the data set, and the tables.
_BY_CONFIG = {
    "r50_100ep": ("ImageNet", IMAGENET_IMAGES, (TABLE_4,)),
    "r18_cifar10_800ep": ("CIFAR-10", CIFAR10_IMAGES, (APPENDIX_D, LIGHTLY_512, LIGHTLY_128)),
}


@dataclass(frozen=True)
class Row:
    """One published run."""

    epochs: int
    percent: float


@dataclass(frozen=True)
class Published:
    """The rows of a table around a number of epochs: `below` and `above` are the same row where it is published."""

    source: str
    metric: str
    batch_size: int
    below: Row | None
    above: Row | None

    def __str__(self):
        rows = {row.epochs: row.percent for row in (self.below, self.above) if row}
        beyond = " (nothing below)" if self.below is None else " (nothing above)" if self.above is None else ""
        return f"{self.source}: {_rows_text(rows, 'epochs')}{beyond}; {self.metric}, batch {self.batch_size}"


def look_up(table: Table, epochs: float) -> Published:
    """Returns the rows around `epochs`."""
    below, above = (at and Row(at, table.rows[at]) for at in _around(table.rows, epochs))
    return Published(table.source, table.metric, table.batch_size, below, above)


def published_for(config: Config, num_images: int, epochs: float) -> tuple[tuple[Published, ...], str | None]:
    """Returns what the tables have for `epochs` of this config, or the reason why no table applies."""
    for name, (data, images, tables) in _BY_CONFIG.items():
        if config.model != load_config(name).model:
            continue
        if other := _other_recipe(config, name):
            return (), f"no table: {', '.join(other[:3])} differ from the recipe of the paper's numbers"
        if num_images != images:
            return (), f"no table: published for the {images:,} images of {data}; this data has {num_images:,}"
        nearest = {}
        # Of a source's tables for one metric the one with the nearest batch size.
        for table in sorted(tables, key=lambda table: -abs(math.log(table.batch_size / config.train.batch_size))):
            nearest[table.source, table.metric] = table
        return tuple(look_up(table, epochs) for table in tables if table in nearest.values()), None
    return (), "no table: no published numbers are known for this model"


def batch_size_text(batch_size: int) -> str:
    """Returns one clause with the rows of the paper's Table 2 around a batch size."""
    rows = {at: TABLE_2[at] for at in _around(TABLE_2, batch_size) if at}
    return f"the paper's Table 2: {_rows_text(rows, 'images a batch')} (ImageNet linear top-1, 100 epochs)"


def _around(rows: Mapping[int, float], at: float) -> tuple[int | None, int | None]:
    below, above = [key for key in rows if key <= at], [key for key in rows if key >= at]
    return max(below, default=None), min(above, default=None)


def _rows_text(rows: Mapping[int, float], unit: str) -> str:
    return " and ".join(f"{percent} % at {at}" for at, percent in rows.items()) + f" {unit}"


def _other_recipe(config: Config, name: str) -> list[str]:
    """Returns the keys in which a config is another recipe than the one called `name`."""
    other = [key for key in differences(load_config(name), config) if not key.startswith(_FREE)]
    free = (*_FREE_KEYS, "optimizer.schedule") if config.optimizer.schedule in _COSINES else _FREE_KEYS
    return [key for key in other if key not in free]

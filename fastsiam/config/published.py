"""Published accuracies of the methods with their sources, looked up for a config. Nothing is interpolated."""

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from fastsiam.config import Config, differences, load_config

# SimSiam (arXiv 2011.10566), Table 2: ImageNet linear top-1 after 100 epochs by batch size.
TABLE_2 = {64: 66.1, 128: 67.3, 256: 68.1, 512: 68.1, 1024: 68.0, 2048: 67.9, 4096: 64.0}
IMAGENET_IMAGES, CIFAR10_IMAGES = 1_281_167, 50_000

# Keys in which a run may differ from a table's config and still have its recipe. Epochs of warm-up and of frozen
# prototypes are another share of a longer run; the name of a recipe of views says nothing beside its numbers.
_FREE = ("data.", "evaluate.", "checkpoint.", "collapse.", "train.", "budget", "run.")
_FREE_KEYS = ("views.color", "views.recipe", "method.freeze_prototypes", "optimizer.implementation", "optimizer.warmup")
_COSINES = ("cosine", "cosine_per_epoch")
_TWO_VIEWS = "2 views"


@dataclass(frozen=True)
class Table:
    """Top-1 in percent by the number of epochs; each row is a run of its own with its own schedule."""

    source: str
    metric: str
    batch_size: int
    rows: Mapping[int, float]
    views: str = _TWO_VIEWS
    """Views of each image."""


_LINEAR, _KNN = "ImageNet linear top-1", "CIFAR-10 kNN top-1"
TABLE_4 = Table("SimSiam's Table 4", _LINEAR, 256, {100: 68.1, 200: 70.0, 400: 70.8, 800: 71.3})
# SimSiam, appendix D.
APPENDIX_D = Table("SimSiam's appendix D", "CIFAR-10 linear top-1", 512, {800: 91.8})
# lightly's documentation, benchmarks: CIFAR-10, ResNet-18, kNN with k 200 and T 0.1. One optimizer for all methods.
LIGHTLY_512 = Table("lightly's benchmark", _KNN, 512, {200: 76.4, 800: 90.4})
LIGHTLY_128 = Table("lightly's benchmark", _KNN, 128, {200: 81.9})


def _of_lightly(at_512, at_128):
    """lightly's rows of another method than SimSiam, by epochs."""
    source = "lightly's benchmark, its own recipe"
    return Table(source, _KNN, 512, at_512), Table(source, _KNN, 128, at_128)


def _of_table_4(batch_size, rows):
    """Rows of the other methods in SimSiam's Table 4: its authors' reproductions, without multi-crop."""
    return Table("SimSiam's Table 4, a reproduction", _LINEAR, batch_size, rows)


# BYOL (arXiv 2006.07733), Table 1.
BYOL = Table("BYOL's paper", _LINEAR, 4096, {1000: 74.3})
BYOL_4 = _of_table_4(4096, {100: 66.5, 200: 70.6, 400: 73.2, 800: 74.3})
# README of google-research/simclr.
SIMCLR = Table("SimCLR's README", _LINEAR, 4096, {100: 64.5})
SIMCLR_4 = _of_table_4(4096, {100: 66.5, 200: 68.3, 400: 69.8, 800: 70.4})
# README of facebookresearch/moco: the mean of five runs after 200 epochs, 67.3 to 67.7, and one after 800.
MOCO = Table("MoCo's README", _LINEAR, 256, {200: 67.5, 800: 71.1})
# Its loss is symmetric in that table: two forward passes more a step.
MOCO_4 = Table(
    "SimSiam's Table 4, a reproduction with a symmetric loss",
    _LINEAR,
    256,
    {100: 67.4, 200: 69.9, 400: 71.0, 800: 72.2},
)
# README of facebookresearch/swav.
SWAV = Table(
    "SwAV's README", _LINEAR, 4096, {100: 72.1, 200: 73.9, 400: 74.6, 800: 75.3}, "multi-crop 2 x 224 + 6 x 96"
)
# colab/moco_cifar10_demo.ipynb of facebookresearch/moco: kNN with k 200 and T 0.1 on the projection.
_DEMO = "MoCo's demo, on the projection"
MOCO_DEMO = Table(_DEMO, _KNN, 512, {200: 82.6, 400: 86.3, 800: 88.7})
MOCO_DEMO_SYMMETRIC = Table(_DEMO, _KNN, 512, {200: 85.3, 400: 88.5, 800: 89.7})
# SimCLR's README, "around 91 %".
SIMCLR_CIFAR10 = Table("SimCLR's README, about", "CIFAR-10 linear top-1", 512, {1000: 91.0})


@dataclass(frozen=True)
class _Recipe:
    """A config whose encoder, method and numbers are those of tables."""

    name: str
    tables: tuple[Table, ...]
    overrides: tuple[str, ...] = ()

    @property
    def data(self) -> tuple[str, int]:
        """Name of the data set, and its number of training images."""
        return ("CIFAR-10", CIFAR10_IMAGES) if "cifar10" in self.name else ("ImageNet", IMAGENET_IMAGES)

    def __str__(self):
        return " ".join((f"{self.name}.yaml", *self.overrides))


# The code of BYOL has other numbers for 1000 epochs than for 100.
_BYOL_1000 = ("optimizer.base_lr=0.2", "optimizer.weight_decay=1.5e-6", "method.momentum=0.996")
_RECIPES = (
    _Recipe("r50_100ep", (TABLE_4,)),
    _Recipe("r50_100ep_byol_b4096", (BYOL_4,)),
    _Recipe("r50_100ep_byol_b4096", (BYOL,), _BYOL_1000),
    _Recipe("r50_100ep_simclr_b4096", (SIMCLR, SIMCLR_4)),
    _Recipe("r50_100ep_swav_b4096", (SWAV,)),
    _Recipe("r50_200ep_moco", (MOCO, MOCO_4)),
    _Recipe("r18_cifar10_800ep", (APPENDIX_D, LIGHTLY_512, LIGHTLY_128)),
    _Recipe("r18_cifar10_800ep_moco_demo", (MOCO_DEMO_SYMMETRIC,)),
    _Recipe("r18_cifar10_800ep_moco_demo", (MOCO_DEMO,), ("method.symmetric=false",)),
    _Recipe("r18_cifar10_1000ep_simclr", (SIMCLR_CIFAR10,)),
    _Recipe("r18_cifar10_800ep_byol", _of_lightly({200: 86.8, 800: 91.0}, {200: 86.9})),
    _Recipe("r18_cifar10_800ep_simclr", _of_lightly({200: 84.8, 800: 87.9}, {200: 84.7})),
    _Recipe("r18_cifar10_800ep_moco", _of_lightly({200: 84.7, 800: 89.9}, {200: 83.8})),
    _Recipe("r18_cifar10_800ep_swav", _of_lightly({200: 84.2, 800: 88.4}, {200: 81.2})),
    _Recipe("r18_cifar10_800ep_fastsiam", _of_lightly({200: 78.8, 800: 90.2}, {200: 90.6})),
)


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
    views: str
    below: Row | None
    above: Row | None

    def __str__(self):
        rows = {row.epochs: row.percent for row in (self.below, self.above) if row}
        beyond = " (nothing below)" if self.below is None else " (nothing above)" if self.above is None else ""
        text = f"{self.source}: {_rows_text(rows, 'epochs')}{beyond}; {self.metric}, batch {self.batch_size}"
        return text if self.views == _TWO_VIEWS else f"{text}, {self.views}"


def look_up(table: Table, epochs: float) -> Published:
    """Returns the rows around `epochs`."""
    below, above = (at and Row(at, table.rows[at]) for at in _around(table.rows, epochs))
    return Published(table.source, table.metric, table.batch_size, table.views, below, above)


def published_for(config: Config, num_images: int, epochs: float) -> tuple[tuple[Published, ...], str | None]:
    """Returns what the tables have for `epochs` of this config, or the reason why no table applies."""
    recipe, other = _nearest_recipe(config)
    if recipe is None:
        return (), f"no table: no published numbers are known for {config.method.name} with this model"
    if other:
        return (), f"no table: {', '.join(other[:3])} differ from {recipe}, the recipe of the published numbers"
    data, images = recipe.data
    if num_images != images:
        return (), f"no table: published for the {images:,} images of {data}; this data has {num_images:,}"
    nearest = {}
    # Of a source's tables for one metric the one with the nearest batch size.
    for table in sorted(recipe.tables, key=lambda table: -abs(math.log(table.batch_size / config.train.batch_size))):
        nearest[table.source, table.metric] = table
    return tuple(look_up(table, epochs) for table in recipe.tables if table in nearest.values()), None


def batch_size_text(batch_size: int) -> str:
    """Returns one clause with the rows of SimSiam's Table 2 around a batch size."""
    rows = {at: TABLE_2[at] for at in _around(TABLE_2, batch_size) if at}
    return f"SimSiam's Table 2: {_rows_text(rows, 'images a batch')} (ImageNet linear top-1, 100 epochs)"


def _around(rows: Mapping[int, float], at: float) -> tuple[int | None, int | None]:
    below, above = [key for key in rows if key <= at], [key for key in rows if key >= at]
    return max(below, default=None), min(above, default=None)


def _rows_text(rows: Mapping[int, float], unit: str) -> str:
    return " and ".join(f"{percent} % at {at}" for at, percent in rows.items()) + f" {unit}"


def _nearest_recipe(config: Config) -> tuple[_Recipe | None, list[str]]:
    """Returns the recipe with this encoder and method that is nearest, and the keys in which the config differs."""
    nearest: tuple[_Recipe | None, list[str]] = None, []
    for recipe in _RECIPES:
        other = _loaded(recipe.name, recipe.overrides)
        if (other.model.encoder, other.model.stem, other.method.name) == (
            config.model.encoder, config.model.stem, config.method.name,
        ):  # fmt: skip
            keys = _other_keys(config, other)
            if nearest[0] is None or len(keys) < len(nearest[1]):
                nearest = recipe, keys
    return nearest


_loaded = functools.cache(load_config)


def _other_keys(config: Config, other: Config) -> list[str]:
    """Returns the keys in which two configs are different recipes."""
    keys = [key for key in differences(other, config) if not key.startswith(_FREE)]
    free = set(_FREE_KEYS)
    if config.optimizer.schedule in _COSINES:
        free.add("optimizer.schedule")
    if not config.method.name.startswith("simsiam"):
        # Other methods have no rate that stays.
        free.add("optimizer.predictor_lr")
    return [key for key in keys if re.sub(r"^views\.\d+\.", "views.", key) not in free]

"""Published accuracies of SimSiam, each with its source: what epochs and batch sizes were worth to others."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fastsiam.config import Config, differing_keys, load_config

# SimSiam (arXiv 2011.10566), Table 2: ImageNet linear top-1 after 100 epochs by batch size.
TABLE_2 = {64: 66.1, 128: 67.3, 256: 68.1, 512: 68.1, 1024: 68.0, 2048: 67.9, 4096: 64.0}
IMAGENET_IMAGES, CIFAR10_IMAGES = 1_281_167, 50_000

# Where a run may differ from a table's config and still have its recipe.
_FREE = ("data.", "evaluate.", "checkpoint.", "collapse.", "train.", "budget", "run.")
_FREE_KEYS = ("views.color", "optimizer.implementation", "optimizer.warmup")
_COSINES = ("cosine", "cosine_per_epoch")


@dataclass(frozen=True)
class Table:
    """Top-1 in percent by the number of epochs, each from a run of its own with its own schedule."""

    who: str
    metric: str
    rows: Mapping[int, float]
    batch_size: int


TABLE_4 = Table("the paper's Table 4", "ImageNet linear top-1", {100: 68.1, 200: 70.0, 400: 70.8, 800: 71.3}, 256)
# SimSiam, appendix D.
APPENDIX_D = Table("the paper's appendix D", "CIFAR-10 linear top-1", {800: 91.8}, 512)
# lightly's documentation, benchmarks: CIFAR-10, ResNet-18, kNN.
LIGHTLY_512 = Table("lightly's benchmark", "CIFAR-10 kNN top-1", {200: 76.4, 800: 90.4}, 512)
LIGHTLY_128 = Table("lightly's benchmark", "CIFAR-10 kNN top-1", {200: 81.9}, 128)

# By the config whose encoder and recipe are those of the tables: images of the data set, and the tables.
_BY_CONFIG = {
    "r50_100ep": (IMAGENET_IMAGES, "ImageNet", (TABLE_4,)),
    "r18_cifar10_800ep": (CIFAR10_IMAGES, "CIFAR-10", (APPENDIX_D, LIGHTLY_512, LIGHTLY_128)),
}


@dataclass(frozen=True)
class Worth:
    """What a table says of a number of epochs: the rows around it, the same where it has just this row."""

    table: Table
    epochs: float
    below: int | None
    """Epochs of the last row that is not above; None before the first row."""
    above: int | None
    """Epochs of the first row that is not below; None after the last row."""

    def __str__(self):
        table, rows = self.table, self.table.rows
        what = f"{table.metric}, batch {table.batch_size}"
        if self.below is None:
            return f"{table.who} has no number below {self.above} epochs ({rows[self.above]} % there; {what})"
        if self.above is None:
            return f"{table.who} has no number above {self.below} epochs ({rows[self.below]} % there; {what})"
        if self.below == self.above:
            return f"{table.who} has {rows[self.below]} % for {self.below} epochs ({what})"
        return (
            f"{table.who} has between {rows[self.below]} % and {rows[self.above]} %, its rows of {self.below} and "
            f"{self.above} epochs ({what})"
        )


def look_up(table: Table, epochs: float) -> Worth:
    """The rows around `epochs`; nothing is extrapolated."""
    below = max((row for row in table.rows if row <= epochs), default=None)
    above = min((row for row in table.rows if row >= epochs), default=None)
    return Worth(table, epochs, below, above)


def worth(config: Config, num_images: int, epochs: float) -> tuple[list[Worth], str | None]:
    """What the tables say of `epochs` of this config, or why none applies."""
    for name, (images, data, tables) in _BY_CONFIG.items():
        if config.model != load_config(name).model:
            continue
        if other := _other_recipe(config, name):
            return [], f"no table: {', '.join(other[:3])} differ from the recipe of the paper's numbers"
        if num_images != images:
            return (
                [],
                f"no table: the published numbers are of {data}'s {images:,} images, and these are {num_images:,}",
            )
        batch_size = config.train.batch_size
        nearest = {}
        # Of a source's tables for one metric the one with the nearest batch size.
        for table in sorted(tables, key=lambda table: -abs(math.log(table.batch_size / batch_size))):
            nearest[table.who, table.metric] = table
        return [look_up(table, epochs) for table in tables if table in nearest.values()], None
    return [], "no table: no published numbers are known for this model"


def batch_size_text(batch_size: int) -> str:
    """What the paper's Table 2 says of a batch size."""
    below = max((size for size in TABLE_2 if size <= batch_size), default=None)
    above = min((size for size in TABLE_2 if size >= batch_size), default=None)
    what = "ImageNet linear top-1, 100 epochs"
    if below is None or above is None:
        end = above if below is None else below
        return f"the paper's Table 2 ends at batch {end} with {TABLE_2[end]} % ({what})"
    if below == above:
        return f"the paper's Table 2 has {TABLE_2[below]} % at batch {below} ({what})"
    return f"the paper's Table 2 has {TABLE_2[below]} % at batch {below} and {TABLE_2[above]} % at {above} ({what})"


def _other_recipe(config, name):
    """Keys in which a config is another recipe than that of `name`."""
    keys = [difference.partition(" ")[0] for difference in differing_keys(load_config(name), config)]
    other = [key for key in keys if not key.startswith(_FREE) and key not in _FREE_KEYS]
    return [key for key in other if key != "optimizer.schedule" or config.optimizer.schedule not in _COSINES]

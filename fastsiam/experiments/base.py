"""Base of an experiment: a config of plain SimSiam, which the variants change, and the number of its images."""

from dataclasses import dataclass

from fastsiam.config import Config
from fastsiam.data.demo_images import CLASSES, TRAIN_PER_CLASS
from fastsiam.data.sources.open import demo_folder, open_sources
from fastsiam.errors import UserError

# What variants change, and a base therefore has as SimSiam has it.
_PLAIN = {
    "method.name": "simsiam",
    "method.stop_gradient": True,
    "method.similarity": "cosine",
    "method.symmetric": True,
    "method.target_views": None,
}
# Points of the kNN curves of a base that measures kNN at its end alone.
_CURVE = 10


@dataclass(frozen=True)
class Base:
    """A checked base config."""

    config: Config
    images: int
    """Of data.train."""

    @property
    def steps_per_epoch(self) -> int:
        return max(1, self.images // self.config.train.batch_size)


def base_of(config: Config) -> Base:
    """Returns the base that a config gives: collapse only warns, for kNN of a collapsed run is a result.

    Reads the list of images, draws nothing. Raises `UserError` where the config is no plain SimSiam with two views, or
    has no images for kNN.
    """
    _check(config)
    values: dict = {"collapse.action": "warn"}
    if config.evaluate.knn_every_epochs is None:
        values["evaluate.knn_every_epochs"] = max(1, (config.train.epochs or 1) // _CURVE)
    return Base(config.with_values(values), _count(config))


def _check(config):
    for key, wanted in _PLAIN.items():
        found = getattr(config.method, key.removeprefix("method."))
        if found != wanted:
            raise UserError(
                f"{key}: {_text(found)} is what an experiment varies; give a base with {key}={_text(wanted)}",
                "not-plain-simsiam",
            )
    if config.method.predictor is None or config.method.predictor.frozen:
        raise UserError(
            "method.predictor: an experiment takes it away by itself; give a base with a predictor that learns",
            "not-plain-simsiam",
        )
    if len(config.views) != 1 or config.views[0].count != 2:
        raise UserError("views.count: the paper's experiments have two views; set views.count=2", "two-views")
    if config.data.backend == "synthetic" or config.data.val is None:
        key = "data.backend" if config.data.val is not None else "data.val"
        raise UserError(f"{key}: experiments compare kNN accuracy; set data.val to labelled images", "no-measure")


def _count(config):
    """Number of training images, of demo images also before they are drawn."""
    folder = demo_folder(config)
    if folder is not None and not folder.exists():
        return TRAIN_PER_CLASS * len(CLASSES)
    source, val = open_sources(config, lambda notice: None, lambda text: None)
    if val is None:
        raise UserError(
            f"data.val: experiments compare kNN accuracy, and {config.data.val} has no images for it; set data.val to "
            "labelled images of the classes of data.train",
            "no-measure",
        )
    return len(source)


def _text(value):
    return {None: "null", True: "true", False: "false"}.get(value, value)

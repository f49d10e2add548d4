"""Schema of metrics.jsonl: the fields of each kind of line. One JSON object a line; numbers not finite are null."""

from typing import NotRequired, TypedDict

SCHEMA = 1


class Header(TypedDict):
    """First line of a run."""

    kind: str
    schema: int
    name: str
    """run.name"""


class _Position(TypedDict):
    kind: str
    step: int
    """Finished training steps."""
    epoch: int
    """Finished epochs."""
    images_seen: int
    """Images of finished steps, over all ranks and epochs."""
    train_seconds: float
    """Spent waiting for data and stepping, over all starts."""
    wall_seconds: float
    """Since the start of the run, evaluation and saving included, the time between two starts not."""


class _Cost(TypedDict):
    spent_seconds: float
    """Of the run's processes, since their start."""
    joules_per_image: float | None
    """Of the GPUs of all ranks; null where not measured."""
    kwh: float | None


class _Measures(TypedDict):
    std_ratio: float
    """See `fastsiam.evaluate.collapse.Measures`."""
    effective_rank: float
    mean_abs_cos: float


class Train(_Position, _Cost):
    """Every train.log_every_steps steps."""

    lr: float
    """Scheduled learning rate of the step."""
    loss: float | None
    """Of the step, the mean over all ranks."""
    images_per_second: float
    """Since the line before."""
    data_wait_fraction: float
    """Share of the time since the line before in which the device stood still for want of a batch."""
    progress: float
    """Share of the budget that is used, 0 to 1."""
    target_std_ratio: NotRequired[float | None]
    """Of BYOL: spread of the target's projections of view 1, 1 for isotropic ones, 0 for a constant."""
    used_prototypes: NotRequired[float | None]
    """Of SwAV: share of the prototypes that are the first choice of some image of a rank, the mean over ranks."""
    view_size: NotRequired[int]
    """Side in pixels, with progressive resizing."""
    skipped_steps: NotRequired[int]
    """Steps whose gradients overflowed, with fp16."""


class Knn(TypedDict):
    """After each measure of kNN; of the controls before training, a line with the step alone."""

    kind: str
    step: int
    epoch: NotRequired[int]
    images_seen: NotRequired[int]
    train_seconds: NotRequired[float]
    wall_seconds: NotRequired[float]
    knn_top1: float
    """Percent."""
    control: NotRequired[str]
    """`untrained`: random weights; `start`: those of model.weights"""
    raw_pixels_knn_top1: NotRequired[float]


class OnlineLinear(_Position):
    """With evaluate.online_linear: beside each train line its training, and after each kNN its validation."""

    loss: NotRequired[float | None]
    """Mean cross entropy since the line before; null without a labelled image."""
    train_top1: NotRequired[float]
    """Percent of the labelled training views since the line before."""
    val_top1: NotRequired[float]
    """Percent of data.val."""


class Spectrum(_Position):
    """After each measure of kNN, and in its place without labelled images: see `fastsiam.evaluate.spectrum`."""

    rankme: float
    effective_rank: float
    alpha: float | None
    uniformity: float
    images: int
    """Training images whose features these are."""


class Collapse(_Position, _Measures):
    """After each measure of collapse."""


class Compile(_Position):
    """After each compilation."""

    graphs: int
    recompiles: int
    seconds: float


class Resume(_Position):
    """At a resumption from a checkpoint."""

    world_size: int
    """Number of ranks."""


class Views(_Position):
    """Where views grow by time or energy: before the first step of a start, and before each other size."""

    sizes: list[int]
    """Sides in pixels, of each group of views."""


class Caution(_Position):
    """A warning, as it is printed."""

    message: str
    code: NotRequired[str]


class BadFile(TypedDict):
    """An image that failed to decode."""

    kind: str
    step: int
    message: str
    bad_files: int
    """So far, of its source."""


class End(_Position, _Cost):
    """Last line of a run, with the last measures."""

    status: str
    """done, collapsed, preempted or failed"""
    reason: NotRequired[str]
    """Of a collapse or failure."""
    knn_top1: NotRequired[float]
    std_ratio: NotRequired[float]
    effective_rank: NotRequired[float]
    mean_abs_cos: NotRequired[float]


KINDS = {
    "header": Header,
    "train": Train,
    "knn": Knn,
    "online_linear": OnlineLinear,
    "spectrum": Spectrum,
    "collapse": Collapse,
    "compile": Compile,
    "resume": Resume,
    "views": Views,
    "warning": Caution,
    "bad_file": BadFile,
    "end": End,
}

"""Results of a plan: what was measured and what follows from it. These dataclasses are also the `--json`.

Rates are images per second over all ranks, in images that a training step would take. None: unknown or not measured.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median

from fastsiam.config.published import Published

STAGES = {
    "disk": "reading from the disk",
    "decoding": "decoding and cropping",
    "augmentation": "augmentation",
    "step": "the step",
    "communication": "communication between ranks",
}


@dataclass(frozen=True)
class Rate:
    """Images per second in several windows of time."""

    median: float
    lowest: float
    highest: float
    windows: int

    @classmethod
    def of(cls, rates: Sequence[float]) -> "Rate":
        return cls(median(rates), min(rates), max(rates), len(rates))


@dataclass(frozen=True)
class LoaderRate:
    """A loader alone, without a step beside it."""

    name: str
    images_per_second: Rate | None
    note: str | None = None
    """The reason why it was not measured, or the conditions."""
    settings: str = ""
    """Config keys that choose it."""


@dataclass(frozen=True)
class BatchRate:
    """The step alone at a batch size (of all ranks), on views that lie on the device."""

    batch_size: int
    learning_rate: float
    step_images_per_second: Rate | None
    note: str | None = None
    """The reason why it was not measured."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on the disk of run.dir, fsync included."""

    bytes: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Measured:
    """Measurements of a config on this machine."""

    device: str
    gpu: str | None
    dtype: str
    compile: bool
    ranks: int
    images: int
    val_images: int
    """0 without kNN."""
    measured_batch_size: int
    """train.batch_size, or less where a step of that takes too long or too much memory."""
    backend: str
    loader: str
    """Decoder, version and threads in words."""
    images_per_second: Rate
    """Training: loader and step together."""
    wait_fraction: float
    """Share of that time in which the step waited for images."""
    idle_cores: float
    disk_cores: float
    """Cores that waited for a disk."""
    joules_per_image: float | None
    """Energy of the GPUs of all ranks, in training."""
    energy: str
    """Source of the energy reading, or the reason why there is none."""
    step_images_per_second: Rate
    """The step alone."""
    loaders: tuple[LoaderRate, ...]
    """The config's own first; empty with synthetic images."""
    batch_sizes: tuple[BatchRate, ...]
    seconds_per_image: dict[str, float | None]
    """Seconds of each stage alone with the whole machine.

    disk: a file's bytes past the page cache, with data.workers readers; decoding: decoding once and cropping every
    view, from the page cache; step: forward, backward and optimizer of one rank alone; communication: what averaging
    gradients and synchronising batch norm add to it.
    """
    start_seconds: float
    """Time from the start of the process to the first batch, with the images of data.backend=resident decoded."""
    compile_seconds: float
    """The first step, beyond what the others take."""
    knn_seconds: float | None
    """One kNN evaluation of all images; None where the config has none."""
    collapse_seconds: float
    """One collapse measure."""
    checkpoint: Checkpoint
    notes: tuple[str, ...]
    measuring_seconds: float

    @property
    def shares_cores(self) -> bool:
        """True where loader and step run on the same cores, because there is no GPU."""
        return self.device == "cpu"

    @property
    def loader_rate(self) -> Rate | None:
        """Rate of the config's own loader."""
        return self.loaders[0].images_per_second if self.loaders else None

    @property
    def known_stages(self) -> dict[str, float]:
        return {name: seconds for name, seconds in self.seconds_per_image.items() if seconds is not None}


@dataclass(frozen=True)
class Limit:
    """The slowest stage, and the rate that loader and step allow."""

    stage: str
    expected: float
    """Images per second: the slower of loader and step beside a GPU; both after each other on a CPU."""
    share: float
    """The measured rate of training divided by `expected`."""


@dataclass(frozen=True)
class Tip:
    """A change that would speed the run up."""

    code: str
    action: str
    cause: str
    gain: float | None = None
    """Factor on the images per second of training; None where it was not measured."""


@dataclass(frozen=True)
class Run:
    """A run of a budget. Seconds by part, energy in joules of all GPUs, cost in the currency of the price."""

    asked: str
    kind: str
    amount: float
    steps: int | None = None
    """None for a budget of energy where energy is not measured; 0 where the budget is too small for a step."""
    epochs: float = 0.0
    start: float = 0.0
    compile: float = 0.0
    train: float = 0.0
    knn: float = 0.0
    collapse: float = 0.0
    saves: float = 0.0
    knn_times: int = 0
    collapse_times: int = 0
    save_times: int = 0
    total: float = 0.0
    watts: float | None = None
    """Mean power in training, assumed for the rest of the run."""
    kwh: float | None = None
    cost: float | None = None
    published: tuple[Published, ...] = ()
    not_published: str | None = None
    """The reason why no published number applies."""


@dataclass(frozen=True)
class Plan:
    """Measurements and predictions."""

    fastsiam: str
    torch: str
    config: str
    batch_size: int
    learning_rate: float
    steps_per_epoch: int
    epoch_seconds: float
    """Training alone."""
    measured: Measured
    limit: Limit
    advice: tuple[Tip, ...]
    """Largest measured gain first."""
    run: Run
    """The config's own epochs or budget."""
    budget: Run | None
    """`--budget`."""

    def to_json(self) -> str:
        found = asdict(self)
        return json.dumps({**found.pop("measured"), **found}, allow_nan=False)

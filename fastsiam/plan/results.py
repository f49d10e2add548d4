"""What a plan has measured. Rates are of all ranks together, in images that a training step would take."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Rate:
    """Images a second in several windows of time."""

    windows: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.windows))

    @property
    def lowest(self) -> float:
        return min(self.windows)

    @property
    def highest(self) -> float:
        return max(self.windows)


@dataclass(frozen=True)
class LoaderRate:
    """A loader alone, without a step beside it."""

    name: str
    """As data.backend has it."""
    rate: Rate | None
    """None where it was not measured."""
    note: str | None = None
    """Why not, or under which settings."""
    settings: str = ""
    """What to set for it."""


@dataclass(frozen=True)
class BatchRate:
    """The step alone at a batch size, on views that lie on the device."""

    batch_size: int
    """Of all ranks together."""
    learning_rate: float
    rate: Rate | None
    note: str | None = None
    """Why there is no rate."""


@dataclass(frozen=True)
class Stages:
    """Seconds for each image, every stage alone with the whole machine; None where it was not measured."""

    disk: float | None
    """Reading the file's bytes from the disk, not from the page cache, with as many readers as data.workers."""
    decoding: float | None
    """Decoding once and cropping twice, the bytes in the page cache."""
    augmentation: float | None
    step: float
    """Forward, backward and optimizer."""
    communication: float | None
    """What averaging gradients and synchronising batch norm add to the step, over several ranks."""
    notes: tuple[str, ...] = ()
    """Why some were not measured."""

    def known(self) -> dict[str, float]:
        names = ("disk", "decoding", "augmentation", "step", "communication")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class EndToEnd:
    """Training itself: the loader and the step beside each other."""

    rate: Rate
    wait_fraction: float
    """Share of the time in which the step waited for images."""
    idle_cores: float
    disk_cores: float
    """Cores that waited for a disk."""
    joules_per_image: float | None
    """Of the GPUs of all ranks; None where it is not measured."""


@dataclass(frozen=True)
class Saving:
    """A checkpoint on the disk of run.dir."""

    bytes: int | None
    seconds: float | None
    """To the disk (fsync); None where the folder cannot be written."""
    note: str | None = None


@dataclass(frozen=True)
class Measured:
    """Everything that a plan is made from."""

    images: int
    """N of data.train."""
    val_images: int
    """Of data.val; 0 without kNN."""
    ranks: int
    measured_batch_size: int
    """train.batch_size, or less where a step of that would take too long, or more memory than there is."""
    shares_cores: bool
    """Loader and step run on the same cores: there is no GPU."""
    device: str
    gpu: str | None
    dtype: str
    compiles: bool
    backend: str
    loader_text: str
    start_seconds: float
    """From the start of the process to the first batch; a store of data.backend=resident decoded."""
    compile_seconds: float
    """What the first step takes more than the others."""
    end_to_end: EndToEnd
    step: Rate
    loaders: tuple[LoaderRate, ...]
    """The config's own first."""
    batch_sizes: tuple[BatchRate, ...]
    stages: Stages
    knn_seconds: float | None
    """One kNN over all images; None where the config has none."""
    collapse_seconds: float
    """One measure of collapse."""
    saving: Saving
    energy: str
    """How it was measured, or why not."""
    notes: tuple[str, ...]
    seconds: float
    """What measuring took, compilation apart."""

    @property
    def loader(self) -> Rate | None:
        """Of the config's own backend."""
        return self.loaders[0].rate if self.loaders else None

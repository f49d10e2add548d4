"""Data of a run: images for training and for kNN, the excluded ones, and the loader."""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from fastsiam.config import Config
from fastsiam.config.method_sections import check_images
from fastsiam.config.views import specs_of_run
from fastsiam.data.backends.choose import choose_backend
from fastsiam.data.backends.store_size import with_its_store
from fastsiam.data.build import build_loader, with_its_cores
from fastsiam.data.loader import Batch, Loader
from fastsiam.data.skip_list import SkipList
from fastsiam.data.sources.levels import Levels
from fastsiam.data.sources.open import open_sources
from fastsiam.data.sources.source import ImageSource
from fastsiam.errors import Notice
from fastsiam.run.bad_files import BadFiles
from fastsiam.run.checkpoint import check_identity, identity
from fastsiam.run.metrics import Journal
from fastsiam.runtime.distributed import World
from fastsiam.runtime.rank_check import check_alike
from fastsiam.runtime.runtime import Runtime
from fastsiam.training.progress import Progress


@dataclass
class TrainingData:
    """Sources, excluded images and loader of a run. All ranks hold the same, but for their part of each batch."""

    config: Config
    """The run's, with the number of workers and the store's size filled in."""
    runtime: Runtime
    backend_reason: str
    source: ImageSource | None
    """None with the synthetic backend."""
    val: ImageSource | None
    """None without kNN."""
    skips: tuple[SkipList | None, SkipList | None]
    bad_files: BadFiles
    loader: Loader
    identity: dict
    """Data, views and backend as a checkpoint holds them."""
    sizes: tuple[int, ...]
    """Sides in pixels of the groups' views in the batches begun last."""

    @classmethod
    def open(cls, config: Config, runtime: Runtime, folder: Path, saved: dict, journal: Journal) -> "TrainingData":
        """Open the images of a config, drawing missing demo images; all ranks must call.

        `folder`: the run's, whose lists of bad files are read; `saved`: the checkpoint that the run resumes from,
        empty for a new run. Raises `UserError` where data or batch are not fit for training, or differ between ranks.
        """
        world = runtime.world
        images = open_images(config, runtime, journal.warn, journal.say, folder if saved else None)
        loading, backend, reason, source, val = images
        bad_files = BadFiles(config.data.max_bad_fraction, folder, journal, world)
        skips = (
            bad_files.skip_list(source, "skip", config.data.train),
            bad_files.skip_list(val, "skip_val", config.data.val),
        )
        with world.together():
            if source is not None:
                check_images(config.method, len(source), config.data.train)
            if val is not None:
                choose_backend(config.data.backend, val.root)
            loader = build_loader(
                loading,
                source,
                skip=skips[0],
                device=runtime.device,
                dtype=runtime.dtype,
                rank=world.rank,
                world_size=world.size,
                say=journal.say,
            )
            found = identity(source, specs_of_run(config.view_groups, config.view_stages), backend)
            if saved:
                check_identity(saved["identity"], found, folder)
        return cls(loading, runtime, reason, source, val, skips, bad_files, loader, found, loader.sizes)

    def __enter__(self) -> "TrainingData":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Free the decoders; the next epoch starts them again."""
        if self.source is not None:
            self.loader.close()

    @property
    def backend(self) -> str:
        return self.identity["backend"]

    @property
    def steps_per_epoch(self) -> int:
        return self.loader.steps_per_epoch

    @property
    def description(self) -> str:
        """Decoder of the loader, in words."""
        return "synthetic: one fixed batch" if self.source is None else self.loader.backend.description

    def epoch(self, progress: Progress) -> Iterator[Batch]:
        """Batches from the cursor of the run to the end of its epoch, with views of the sizes that are due.

        The caller advances `progress` between two batches. Where that makes another size due, the batches that were
        prepared at the one before are made anew.
        """
        while not progress.epoch_is_over:
            self.sizes = self._sizes_due(progress.state)
            batches = self.loader.epoch(progress.state.epoch, progress.state.cursor, self.sizes)
            with contextlib.closing(batches):
                for batch in batches:
                    yield batch
                    if self._sizes_due(progress.state) != self.sizes:
                        break
                else:
                    return

    def _sizes_due(self, state):
        if self.config.grows_in_mid_epoch:
            return self.config.sizes_by(state.progress)
        return self.config.sizes_at(state.epoch, state.epoch_progress)

    def names(self, indices) -> list[str]:
        """Names of images, relative to data.train."""
        return [] if self.source is None else [self.source.name(index) for index in indices]


class Images(NamedTuple):
    """Images of a config, and the backend that decodes them."""

    config: Config
    """With the number of workers and the store's size filled in."""
    backend: str
    backend_reason: str
    source: ImageSource | None
    """None with the synthetic backend."""
    val: ImageSource | None
    """None without kNN."""


def open_images(
    config: Config,
    runtime: Runtime,
    warn: Callable[[Notice], None],
    say: Callable[[str], None],
    run: Path | None = None,
) -> Images:
    """Opens the images of a config, drawing missing demo images; all ranks must call.

    `warn(notice)` and `say(line)` print; `run`: the folder of a run that is resumed. Raises `UserError` where the
    images are not fit for training, or differ between ranks.
    """
    world = runtime.world
    filled = with_its_cores(config, world)
    with world.together():
        backend, reason = choose_backend(config.data.backend, config.data.train)
    with world.together(), world.leader_first():
        source, val = open_sources(config, warn, say)
        filled = with_its_store(filled, source, say)
    source, val = with_levels(world, run, source, val)
    check_alike(world, {**runtime.names, "data.backend": backend, **facts_of_images(source, val)})
    return Images(filled, backend, reason, source, val)


def facts_of_images(train: ImageSource | None, val: ImageSource | None) -> dict:
    """Number of images, and their names and sizes as a hash."""
    sources = {"images of data.train": train, "images of data.val": val}
    return {name: source and f"{len(source):,} ({source.fingerprint()[:8]})" for name, source in sources.items()}


def with_levels(world: World, run: Path | None, *sources: ImageSource | None) -> list[ImageSource | None]:
    """The sources with the ranges of deep pixels that the first rank has measured, or that a run began with.

    `run`: the folder of a run that is resumed, whose environment.json holds them; None for a new one.
    """
    found = []
    for key, source in zip(("train_images", "val_images"), sources, strict=True):
        levels = world.share(_levels_of_run(source, run, key) if world.is_first and source is not None else None)
        found.append(source and replace(source, levels=levels))
    return found


def _levels_of_run(source, run, key):
    if run is None or source.levels.asked != "scale":
        return source.levels
    try:
        kept = json.loads((run / "environment.json").read_text(encoding="utf-8"))["deep_pixels"][key]
        return replace(source.levels, ranges={kind: (float(low), float(high)) for kind, (low, high) in kept.items()})
    except KeyError:
        # Version 0.1.0 knew no other.
        return Levels("type")
    except (OSError, ValueError, TypeError):
        return source.levels

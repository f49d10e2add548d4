"""Measures loaders alone, one for each backend that can read the images, and the stages that they are made of."""

import contextlib
import copy
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from fastsiam.config import Config
from fastsiam.data import read_speed, rng
from fastsiam.data.backends.choose import dali_installed, open_cache
from fastsiam.data.bottleneck import Loading
from fastsiam.data.build import build_evaluation_loader, build_loader
from fastsiam.data.loader import EvaluationLoader, Loader
from fastsiam.data.skip_list import SkipList
from fastsiam.data.sources.beton import is_beton
from fastsiam.data.sources.image_header import UNREADABLE
from fastsiam.data.sources.source import ImageSource, Packed
from fastsiam.plan.bench import Bench, epochs
from fastsiam.plan.results import LoaderRate, Rate
from fastsiam.plan.steps import with_batch_size
from fastsiam.runtime.cores import usable_cores

# Images that are read, decoded and kept in memory as a sample of all; two batches at least.
SAMPLE_IMAGES = 256
OWN_AUGMENTATION = "dali, its own augmentation"


class Candidate(NamedTuple):
    """A backend other than the config's."""

    name: str
    values: dict
    """Config values that choose it."""
    reason: str | None = None
    """The reason why it cannot be measured."""
    note: str | None = None


class Loaders:
    """Loaders of a config at a batch size. The end of a `with` removes what they have stored."""

    def __init__(self, bench: Bench, batch_size: int):
        self.bench, self.config = bench, with_batch_size(bench.config, batch_size)
        self.sample = sample_of(bench.source, batch_size, bench.config.train.seed)
        self.decoding_seconds = 0.0
        """Of all images for data.backend=resident; 0 where an earlier run has decoded them."""
        self._stack = contextlib.ExitStack()
        self._folder = self._stack.enter_context(tempfile.TemporaryDirectory())

    def __enter__(self) -> "Loaders":
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    @property
    def own_name(self) -> str:
        return OWN_AUGMENTATION if self.config.data.augment == "dali" else self.bench.backend

    def own(self) -> Loader:
        """Opens the config's loader on all images, with data.backend=resident on the sample."""
        if self.bench.backend != "resident":
            return self.open(self.bench.source)
        began = time.perf_counter()
        loader = self.open(self.sample)
        seconds, source = time.perf_counter() - began, self.bench.source
        data = self.config.data
        if not open_cache(source, data.store_size, data.workers, self.bench.device).folder.exists():
            self.decoding_seconds = seconds * len(source) / len(self.sample)
        return loader

    def open(self, source: ImageSource, values: dict | None = None) -> Loader:
        """Opens a loader of the config, with other `values`, on a source."""
        runtime, config = self.bench.runtime, self.config.with_values(values or {})
        world = runtime.world
        with self._own_cache(config):
            return build_loader(
                config,
                source,
                skip=self._skip_list(source),
                device=runtime.device,
                dtype=runtime.dtype,
                rank=world.rank,
                world_size=world.size,
            )

    def evaluation(self) -> EvaluationLoader:
        """Opens the loader of kNN on the images of data.train, with data.backend=resident on the sample."""
        runtime, source = self.bench.runtime, self.bench.source
        source = self.sample if self.bench.backend == "resident" else source
        skip = self._skip_list(source)
        with self._own_cache(self.config):
            return build_evaluation_loader(
                self.config,
                source,
                skip=skip,
                device=runtime.device,
                dtype=runtime.dtype,
                world_size=runtime.world.size,
            )

    def others(self, loading: Loading) -> list[Candidate]:
        """Returns the backends other than the config's."""
        if is_beton(self.bench.source.root):
            names = [name for name in ("dali", "pil") if name != self.own_name]
            return [Candidate(name, {}, "reads image files, not a .beton") for name in names]
        missing = None if dali_installed() else "not installed (pip install nvidia-dali-cuda120)"
        size, needed, free = loading.store_size, loading.resident_bytes, loading.free_bytes
        store = {"data.backend": "resident", "data.store_size": size}
        note = f"{needed / 1e9:.2g} GB of memory; measured on {len(self.sample):,} images"
        too_large = f"{needed / 1e9:,.0f} GB of decoded images, and {free / 1e9:,.0f} GB of memory are free"
        found = [
            Candidate("dali", {"data.backend": "dali"}, missing),
            Candidate("pil", {"data.backend": "pil"}),
            Candidate("resident", store, too_large if needed > free / 2 else None, note),
            Candidate("ffcv", {}, "reads .beton files; python -m fastsiam.prepare ffcv writes one of these images"),
        ]
        return [one for one in found if one.name != self.own_name]

    @contextlib.contextmanager
    def _own_cache(self, config: Config) -> Iterator[None]:
        """Lets data.backend=resident store a sample below a temporary folder, not in the user's cache."""
        before = os.environ.get("XDG_CACHE_HOME")
        if config.data.backend == "resident":
            os.environ["XDG_CACHE_HOME"] = self._folder
        try:
            yield
        finally:
            os.environ.pop("XDG_CACHE_HOME", None)
            if before is not None:
                os.environ["XDG_CACHE_HOME"] = before

    def _skip_list(self, source: ImageSource) -> SkipList:
        """Returns a list as a run has it, but for its file."""
        data = self.config.data
        return SkipList(len(source), data.max_bad_fraction, source.kinds >= UNREADABLE, location=data.train)


def sample_of(source: ImageSource, batch_size: int, seed: int) -> ImageSource:
    """Returns some of the images, drawn at random; all of a .beton, which is read by the numbers of its images."""
    if is_beton(source.root):
        return source
    usable = np.flatnonzero(source.kinds < UNREADABLE)
    count = min(max(SAMPLE_IMAGES, 2 * batch_size), len(usable))
    indices = usable[np.sort(rng.probe_indices(seed, len(usable), count))]
    packed = source.packed and Packed(source.packed.shards, source.packed.shard[indices], source.packed.offset[indices])
    columns = ("names", "file_sizes", "labels", "image_sizes", "kinds")
    chosen = {name: getattr(source, name)[indices] for name in columns}
    return replace(source, **chosen, packed=packed, cached_kinds=None, known_fingerprint=None)


def loader_rate(bench: Bench, loader: Loader, seconds: float) -> Rate:
    """Measures finished views on the device; the start of the loader is not counted."""
    batches = epochs(loader)
    try:
        # Batches that several processes make come together.
        return bench.rate(lambda: next(batches), loader.batch_size, seconds, least=2)
    finally:
        batches.close()
        loader.backend.close()


def other_loaders(bench: Bench, loaders: Loaders, loading: Loading) -> list[LoaderRate]:
    """Measures every backend but the config's, each in an equal part of the time."""
    candidates = loaders.others(loading)
    parts, found = sum(one.reason is None for one in candidates), []
    for name, values, reason, note in candidates:
        if loaders.own_name == OWN_AUGMENTATION and values:
            values = values | {"data.augment": "fastsiam"}
        settings, rate = " ".join(f"{key}={value}" for key, value in values.items()), None
        if reason is None:
            bench.say(f"measuring the loader of data.backend={name}")
            seconds = bench.seconds_for("other loaders", parts)
            source = loaders.sample if name == "resident" else bench.source
            rate = loader_rate(bench, loaders.open(source, values), seconds)
        found.append(LoaderRate(name, rate, reason or note, settings))
    return found


def decoding_and_augmentation(bench: Bench, loaders: Loaders, seconds: float) -> tuple[float, float | None]:
    """Returns seconds per image of decoding and cropping, and of augmenting, with the sample in the page cache.

    The second is None where DALI does both in one graph.
    """
    loader = loaders.open(loaders.sample)
    if loaders.own_name == OWN_AUGMENTATION:
        return 1 / loader_rate(bench, loader, seconds).median, None
    augmented = loader.augmented
    # Delivers crops as they are.
    loader.augmented = lambda crops, drawn: crops
    batches = epochs(loader)
    batch = copy.deepcopy(next(batches))
    batches.close()
    decoding = loader_rate(bench, loader, 0.7 * seconds)
    augmenting = bench.rate(
        lambda: augmented(batch.views, loader.drawn(0, batch.indices)), loader.batch_size, 0.3 * seconds
    )
    return 1 / decoding.median, 1 / augmenting.median


def disk_seconds(bench: Bench, sample: ImageSource, seconds: float) -> float | None:
    """Returns seconds per image of reading the sample's files past the page cache, with data.workers readers."""
    workers = bench.config.data.workers
    mine = range(len(sample))[bench.world.share_of(len(sample))]
    paths = [sample.root] if is_beton(sample.root) else list(dict.fromkeys(map(sample.path, mine)))
    _, num_bytes, elapsed = read_speed.read(paths, max(usable_cores() if workers is None else workers, 1), seconds)
    found = bench.world.collect(elapsed * float(sample.file_sizes.mean()) / num_bytes if num_bytes else None)
    return None if None in found else max(found) / bench.world.size

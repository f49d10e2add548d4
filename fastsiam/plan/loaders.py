"""Measures loaders alone, one for each backend that can read the images, and the stages that they are made of."""

import contextlib
import copy
import os
import time
from collections.abc import Iterator
from dataclasses import replace

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


class Loaders:
    """Loaders of a config at a batch size; they store decoded images below `folder`, not in the user's cache."""

    def __init__(self, bench: Bench, batch_size: int, folder: str):
        self.bench, self._folder = bench, folder
        self.config = with_batch_size(bench.config, batch_size, bench.world.size)
        self.sample = bench.source and sample_of(bench.source, batch_size, bench.config.train.seed)
        self.decoding_seconds = 0.0
        """Time to decode all images for data.backend=resident; 0 where an earlier run has decoded them."""

    @property
    def own_name(self) -> str:
        return OWN_AUGMENTATION if self.config.data.augment == "dali" else self.bench.backend

    def own(self) -> Loader:
        """Opens the config's loader on all images, with data.backend=resident on the sample."""
        source, data = self.bench.source, self.config.data
        if self.bench.backend != "resident":
            return self.open(source)
        began = time.perf_counter()
        loader = self.open(self.sample)
        seconds = time.perf_counter() - began
        if not open_cache(source, data.store_size, data.workers, self.bench.device).folder.exists():
            self.decoding_seconds = seconds * len(source) / len(self.sample)
        return loader

    def open(self, source: ImageSource | None, values: dict | None = None) -> Loader:
        """Opens a loader of the config, with other `values`, on a source."""
        config, world = self.config.with_values(values or {}), self.bench.world
        with world.together(), self._own_cache(config):
            skip = source and self._skip_list(source)
            return build_loader(config, source, skip=skip, rank=world.rank, **self.bench.loader_options)

    def evaluation(self) -> EvaluationLoader:
        """Opens the loader of kNN on the images of data.train, with data.backend=resident on the sample."""
        source = self.sample if self.bench.backend == "resident" else self.bench.source
        skip = self._skip_list(source)
        with self._own_cache(self.config):
            return build_evaluation_loader(self.config, source, skip=skip, **self.bench.loader_options)

    def close(self, loader) -> str:
        """Frees a training loader; returns its description."""
        if self.bench.source is None:
            return "synthetic: one fixed batch"
        loader.close()
        return loader.backend.description

    def rate(self, loader: Loader, seconds: float) -> Rate:
        """Measures finished views on the device, and frees the loader; its start is not counted."""
        batches = epochs(loader)
        # Batches that several processes make come together.
        rate = self.bench.rate(lambda: next(batches), loader.batch_size, seconds, least=2)
        batches.close()
        loader.close()
        return rate

    def decoding_and_augmentation(self, seconds: float) -> tuple[float, float | None]:
        """Returns seconds per image of decoding and cropping, and of augmenting, with the sample in the page cache.

        The second is None where DALI does both in one graph.
        """
        loader = self.open(self.sample)
        if self.own_name == OWN_AUGMENTATION:
            return 1 / self.rate(loader, seconds).median, None
        augmented = loader.augmented
        # Delivers crops as they are.
        loader.augmented = lambda crops, drawn: crops
        batches = epochs(loader)
        batch = copy.deepcopy(next(batches))
        batches.close()
        decoding = self.rate(loader, 0.7 * seconds)

        def augment():
            augmented(batch.views, loader.drawn(0, batch.indices))

        return 1 / decoding.median, 1 / self.bench.rate(augment, loader.batch_size, 0.3 * seconds).median

    def disk_seconds(self, seconds: float) -> float | None:
        """Returns seconds per image of reading the sample's files past the page cache, with data.workers readers."""
        sample, world, workers = self.sample, self.bench.world, self.config.data.workers
        mine = range(len(sample))[world.share_of(len(sample))]
        paths = [sample.root] if is_beton(sample.root) else list(dict.fromkeys(map(sample.path, mine)))
        threads = max(usable_cores() if workers is None else workers, 1)
        _, num_bytes, elapsed = read_speed.read(paths, threads, seconds)
        found = world.collect(elapsed * float(sample.file_sizes.mean()) / num_bytes if num_bytes else None)
        return None if None in found else max(found) / world.size

    def others(self, loading: Loading) -> list[tuple[str, dict, str | None, str | None]]:
        """Returns the backends other than the config's: name, values, the reason why it cannot be measured, a note."""
        if is_beton(self.bench.source.root):
            names = [name for name in ("dali", "pil") if name != self.own_name]
            return [(name, {}, "reads image files, not a .beton", None) for name in names]
        missing = None if dali_installed() else "not installed (pip install nvidia-dali-cuda120)"
        needed, free = loading.resident_bytes, loading.free_bytes
        store = {"data.backend": "resident", "data.store_size": loading.store_size}
        note = f"{needed / 1e9:.2g} GB of memory; measured on {len(self.sample):,} images"
        too_large = f"{needed / 1e9:,.0f} GB of decoded images, and {free / 1e9:,.0f} GB of memory are free"
        found = [
            ("dali", {"data.backend": "dali"}, missing, None),
            ("pil", {"data.backend": "pil"}, None, None),
            ("resident", store, too_large if needed > free / 2 else None, note),
            ("ffcv", {}, "reads .beton files; python -m fastsiam.prepare ffcv writes one of these images", None),
        ]
        return [one for one in found if one[0] != self.own_name]

    @contextlib.contextmanager
    def _own_cache(self, config: Config) -> Iterator[None]:
        before = dict(os.environ)
        if config.data.backend == "resident":
            os.environ["XDG_CACHE_HOME"] = self._folder
        try:
            yield
        finally:
            os.environ.pop("XDG_CACHE_HOME", None)
            os.environ.update(before)

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


def other_loaders(bench: Bench, loaders: Loaders, loading: Loading) -> tuple[LoaderRate, ...]:
    """Measures every backend but the config's, each in an equal part of the time."""
    candidates = loaders.others(loading)
    parts, found = sum(reason is None for _, _, reason, _ in candidates), []
    for name, values, reason, note in candidates:
        if loaders.own_name == OWN_AUGMENTATION and values:
            values = values | {"data.augment": "fastsiam"}
        settings, rate = " ".join(f"{key}={value}" for key, value in values.items()), None
        if reason is None:
            bench.say(f"measuring the loader of data.backend={name}")
            seconds = bench.seconds_for("other loaders", parts)
            source = loaders.sample if name == "resident" else bench.source
            rate = loaders.rate(loaders.open(source, values), seconds)
        found.append(LoaderRate(name, rate, reason or note, settings))
    return tuple(found)

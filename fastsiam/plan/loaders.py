"""Loaders alone, one for each backend that can read the images, and the stages that they are made of."""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastsiam.data import rng
from fastsiam.data.backends.choose import dali_installed, open_backend, open_cache
from fastsiam.data.backends.resident import ResidentBackend, Store
from fastsiam.data.bottleneck import Loading
from fastsiam.data.build import build_loader
from fastsiam.data.loader import EvaluationLoader, Loader
from fastsiam.data.skip_list import SkipList
from fastsiam.data.sources.beton import is_beton
from fastsiam.data.sources.folder import Packed
from fastsiam.data.sources.image_header import UNREADABLE
from fastsiam.data.sources.source import ImageSource
from fastsiam.plan.bench import WARM_UP, Bench, epochs
from fastsiam.plan.results import LoaderRate, Rate
from fastsiam.plan.steps import with_batch_size

# Images that are read, decoded and kept in memory as a sample of all; two batches at least.
SAMPLE_IMAGES = 256
OWN_AUGMENTATION = "dali, its own augmentation"


class Sample(NamedTuple):
    """Some of the images, drawn at random, as a source of their own."""

    source: ImageSource
    indices: np.ndarray
    """Into the source of all."""


def sample_of(source: ImageSource, batch_size: int, seed: int) -> Sample:
    """Of a .beton, which is read by the numbers of its images, the whole."""
    usable = np.flatnonzero(source.kinds < UNREADABLE)
    if is_beton(source.root):
        return Sample(source, usable)
    count = min(max(SAMPLE_IMAGES, 2 * batch_size), len(usable))
    indices = usable[np.sort(rng.probe_indices(seed, len(usable), count))]
    packed = source.packed
    if packed:
        packed = Packed(packed.shards, packed.shard[indices], packed.offset[indices])
    columns = {name: getattr(source, name)[indices] for name in ("names", "file_sizes", "labels")}
    columns |= {name: getattr(source, name)[indices].copy() for name in ("image_sizes", "kinds")}
    return Sample(replace(source, **columns, packed=packed, cached_kinds=None, known_fingerprint=None), indices)


class Resident(NamedTuple):
    """A store of a sample; all images would take as long for each of them."""

    backend: ResidentBackend
    seconds_per_image: float
    """To decode it."""
    is_decoded: bool
    """The store of all images has been written by an earlier run."""


class Loaders:
    """The loaders of a config at a batch size, opened when they are asked for. Use it in a `with`."""

    def __init__(self, bench: Bench, batch_size: int, loading: Loading):
        self._bench, self.batch_size, self._loading = bench, batch_size, loading
        self.config = with_batch_size(bench.config, batch_size)
        self.sample = sample_of(bench.source, batch_size, bench.config.train.seed)
        self._stack = contextlib.ExitStack()
        self._resident: dict[int, Resident] = {}

    def __enter__(self) -> "Loaders":
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    @property
    def own_name(self) -> str:
        return OWN_AUGMENTATION if self.config.data.augment == "dali" else self._bench.backend

    @property
    def augments_itself(self) -> bool:
        return self.config.data.augment == "dali"

    def own(self, *, on_sample: bool = False) -> Loader:
        """The config's, on all images; resident is always on the sample, for decoding all takes a run's time."""
        bench = self._bench
        if bench.backend == "resident":
            return self._loader(self.resident(self.config.data.store_size).backend, self.sample.source)
        source = self.sample.source if on_sample else bench.source
        return build_loader(
            self.config,
            source,
            skip=bench.skip_list(source),
            device=bench.device,
            dtype=bench.dtype,
            rank=bench.world.rank,
            world_size=bench.world.size,
        )

    def crops_only(self) -> Loader:
        """The config's backend on the sample, which delivers crops as they are."""
        if self._bench.backend == "resident":
            backend = self.resident(self.config.data.store_size).backend
        else:
            backend = self._open(self._bench.backend, self.sample.source)
        # A loader leaves alone what a backend has augmented.
        return self._loader(backend, self.sample.source, backend_augments=True)

    def evaluation(self) -> EvaluationLoader:
        """That of kNN, on the images of data.train; on the sample where they would have to be decoded first."""
        bench, data = self._bench, self.config.data
        if bench.backend == "resident":
            source, backend = self.sample.source, self.resident(data.store_size).backend
        else:
            source, backend = bench.source, self._open(bench.backend, bench.source, num_views=1)
        return EvaluationLoader(
            source,
            bench.specs[0],
            backend,
            batch_size=min(self.batch_size // bench.world.size, len(source)),
            crop_ratio=self.config.evaluate.crop_ratio,
            dtype=bench.dtype,
            skip=bench.skip_list(source),
        )

    def candidates(self) -> list[tuple[str, str, Callable[[], Loader] | str, str | None]]:
        """Backends other than the config's: name, what to set, how to open one or why it cannot be used, a note."""
        found, loading, bench = [], self._loading, self._bench
        if is_beton(bench.source.root):
            own = [self.own_name]
            return [(name, "", "reads image files, not a .beton", None) for name in ("dali", "pil") if name not in own]
        for name in ("dali", "pil"):
            settings = f"data.backend={name}" + (" data.augment=fastsiam" if self.augments_itself else "")
            opened = self._opener(name)
            if name == "dali" and not dali_installed():
                opened = "not installed (pip install nvidia-dali-cuda120)"
            found.append((name, settings, opened, None))
        side, needed, free = loading.store_size, loading.resident_bytes, loading.free_bytes
        settings = f"data.backend=resident data.store_size={side}"
        if needed <= free / 2:
            note = f"{needed / 1e9:.2g} GB of memory; measured on {len(self.sample.indices):,} images"
            found.append(
                ("resident", settings, lambda: self._loader(self.resident(side).backend, self.sample.source), note)
            )
        else:
            reason = f"{needed / 1e9:,.0f} GB of decoded images, and {free / 1e9:,.0f} GB of memory are free"
            found.append(("resident", settings, reason, None))
        reads = "reads .beton files; python -m fastsiam.prepare ffcv writes one of these images"
        return [*(entry for entry in found if entry[0] != self.own_name), ("ffcv", "", reads, None)]

    def resident(self, side: int) -> Resident:
        """The sample decoded to squares of this side, in a folder that goes with this object."""
        if side not in self._resident:
            bench, source = self._bench, self.sample.source
            workers = self.config.data.workers
            whole = open_cache(bench.source, side, workers, bench.device)
            folder = self._stack.enter_context(tempfile.TemporaryDirectory())
            cache = replace(open_cache(source, side, workers, bench.device), folder=Path(folder) / "store")
            began = time.perf_counter()
            store = Store(cache, source, bench.device)
            seconds = (time.perf_counter() - began) / len(source)
            cache.recall_headers(source)
            self._resident[side] = Resident(ResidentBackend(bench.specs[0].size, store), seconds, whole.folder.exists())
        return self._resident[side]

    def _opener(self, name):
        return lambda: self._loader(self._open(name, self._bench.source), self._bench.source)

    def _open(self, name, source, num_views=None):
        bench, share = self._bench, self.batch_size // self._bench.world.size
        size, views = bench.specs[0].size, num_views or len(bench.specs)
        return open_backend(name, source, size, views, share, self.config.data.workers, bench.device)

    def _loader(self, backend, source, backend_augments=False):
        bench = self._bench
        return Loader(
            source,
            bench.specs,
            backend,
            batch_size=self.batch_size,
            seed=self.config.train.seed,
            dtype=bench.dtype,
            skip=SkipList(len(source), self.config.data.max_bad_fraction, source.kinds >= UNREADABLE),
            rank=bench.world.rank,
            world_size=bench.world.size,
            backend_augments=backend_augments,
        )


def loader_rate(bench: Bench, loader: Loader, seconds: float) -> Rate:
    """Finished views on the device; the start of the loader is not counted."""
    batches = epochs(loader)
    try:
        bench.warm_up(lambda: next(batches), seconds)
        # Batches that several processes make come together.
        return bench.windows(lambda: next(batches), loader.batch_size, (1 - WARM_UP) * seconds, least=2)
    finally:
        batches.close()
        loader.backend.close()


def other_loaders(bench: Bench, loaders: Loaders) -> list[LoaderRate]:
    """Every backend but the config's, each in its own share of the time."""
    found, candidates = [], loaders.candidates()
    bench.split("other loaders", [f"loader {name}" for name, _, opened, _ in candidates if callable(opened)])
    for name, settings, opened, note in candidates:
        if not callable(opened):
            found.append(LoaderRate(name, None, opened, settings))
            continue
        bench.say(f"measuring the loader of data.backend={name}")
        seconds = bench.share(f"loader {name}")
        found.append(LoaderRate(name, loader_rate(bench, opened(), seconds), note, settings))
    return found


def decoding_and_augmentation(bench: Bench, loaders: Loaders, seconds: float) -> tuple[float, float | None]:
    """Seconds for each image of decoding and cropping, and of augmenting; the sample's bytes in the page cache.

    None for the second where DALI does both in one graph.
    """
    if loaders.augments_itself:
        return 1 / loader_rate(bench, loaders.own(on_sample=True), seconds).median, None
    loader = loaders.crops_only()
    batches = epochs(loader)
    batch = next(batches)
    batches.close()
    crops, indices = batch.views.clone(), batch.indices
    decoding = loader_rate(bench, loader, 0.7 * seconds)

    def augment():
        loader.augmented(crops, loader.drawn(0, indices))

    bench.warm_up(augment, 0.3 * seconds)
    augmenting = bench.windows(augment, loaders.batch_size, 0.3 * (1 - WARM_UP) * seconds)
    return 1 / decoding.median, 1 / augmenting.median


def disk(bench: Bench, loaders: Loaders, workers: int, seconds: float) -> tuple[float | None, str | None]:
    """Seconds for each image of reading the sample's bytes from the disk, by `workers` readers; or why not.

    The kernel is told to drop the bytes first, and does so with what no other process has mapped.
    """
    sample, source = loaders.sample, bench.source
    if bench.backend == "resident":
        return None, "disk not measured: images are in memory"
    indices = sample.indices[bench.world.share_of(len(sample.indices))]
    indices = np.random.default_rng(0).permutation(indices)[: 4 * SAMPLE_IMAGES]
    places = [_place(source, index) for index in indices.tolist()]
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        try:
            list(pool.map(_forget, places))
            bench.world.barrier()
            began, count = time.perf_counter(), 0
            for first in range(0, len(places), 4 * workers or 4):
                part = places[first : first + (4 * workers or 4)]
                list(pool.map(_read, part))
                count += len(part)
                if time.perf_counter() - began > seconds:
                    break
            mine = (time.perf_counter() - began) / count, None
        except OSError as error:
            mine = None, f"disk not measured: {error}"
    found = bench.world.collect(mine)
    if any(value is None for value, _ in found):
        return next(entry for entry in found if entry[0] is None)
    return max(value for value, _ in found) / bench.world.size, None


def _place(source: ImageSource, index: int) -> tuple[Path, int, int]:
    """File, first byte and number of bytes of an image; of a .beton, which keeps them to itself, as many anywhere."""
    size = int(source.file_sizes[index])
    if is_beton(source.root):
        return source.root, int(index / len(source) * max(source.root.stat().st_size - size, 0)), size
    return source.path(index), int(source.packed.offset[index]) if source.packed else 0, size


def _forget(place):
    path, offset, size = place
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), offset, size, os.POSIX_FADV_DONTNEED)


def _read(place):
    path, offset, size = place
    with open(path, "rb") as file:
        os.pread(file.fileno(), size, offset)

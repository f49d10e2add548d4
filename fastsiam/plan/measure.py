"""All measurements of a plan, within about the minutes that it is given; compilation comes on top."""

import contextlib
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from fastsiam.config import Config
from fastsiam.data.backends.synthetic import SyntheticLoader
from fastsiam.data.bottleneck import Loading, cpu_times, describe, window_of
from fastsiam.data.loader import EvaluationLoader
from fastsiam.evaluate.knn import CHUNK, count_correct
from fastsiam.evaluate.online import evaluating
from fastsiam.plan.bench import WARM_UP, Bench, epochs, free
from fastsiam.plan.loaders import Loaders, decoding_and_augmentation, disk, loader_rate, other_loaders
from fastsiam.plan.results import STAGES, BatchRate, Checkpoint, LoaderRate, Measured, Rate
from fastsiam.plan.steps import (
    Affordable,
    Stepper,
    batch_rate,
    communication,
    largest_affordable,
    other_batch_sizes,
    probe,
    step_rate,
    with_batch_size,
)
from fastsiam.run import checkpoint
from fastsiam.runtime.cores import usable_cores
from fastsiam.runtime.device import DTYPES, autocast
from fastsiam.runtime.distributed import World
from fastsiam.runtime.energy import EnergyMeter
from fastsiam.training.data_wait import data_wait_on

# Parts of the time, in the order of measuring.
WEIGHTS = {
    "step": 12,
    "end to end": 25,
    "loader": 9,
    "kNN": 6,
    "one rank alone": 6,
    "disk": 3,
    "stages": 9,
    "other loaders": 18,
    "other batch sizes": 18,
}
# Of a bank of features, for the cost of a search in it.
BANK = 8192


def measure(config: Config, world: World, minutes: float, began: float) -> tuple[Measured, Loading]:
    """Train for about `minutes`, and write nothing that stays but the index of the images.

    `began`: when this process began, by `time.monotonic`. Raises the `UserError` that the run would raise.
    """
    with contextlib.ExitStack() as stack:
        bench = Bench(config, world, stack, minutes)
        ready = time.monotonic() - began - bench.drawing_seconds
        loading = describe(bench.config, bench.source, bench.backend, bench.device)
        return _Plan(bench, loading, minutes, ready, stack).measured(), loading


class _Plan:
    """One after the other, what matters most first."""

    def __init__(self, bench: Bench, loading: Loading, minutes: float, ready: float, stack: contextlib.ExitStack):
        self.bench, self.loading = bench, loading
        self.began = time.perf_counter()
        self.start_seconds, self.compile_seconds = ready, 0.0
        self.loader_text = "synthetic: one fixed batch"
        self.energy = stack.enter_context(EnergyMeter.of(bench.device, bench.notes.append))
        bench.weights = dict(WEIGHTS)
        if bench.world.size == 1:
            del bench.weights["one rank alone"]
        asked, size = bench.config.train.batch_size, bench.world.size
        self.affordable = Affordable.of(bench, probe(bench), 60 * minutes * WEIGHTS["step"] / sum(WEIGHTS.values()))
        self.batch_size, reason = largest_affordable(asked, size, self.affordable)
        if reason:
            bench.notes.append(f"batch {asked}: {reason}; measured at batch {self.batch_size}")
        self.loaders = None
        if bench.source is not None:
            self.loaders = stack.enter_context(Loaders(bench, self.batch_size, loading))

    def measured(self) -> Measured:
        bench = self.bench
        stepper, step = self._step()
        end_to_end = self._end_to_end(stepper)
        collapse_seconds = stepper.collapse_seconds()
        saving = self._saving(stepper)
        loaders, knn_seconds = (), None
        if self.loaders is not None:
            own = self._own_loader()
            knn_seconds = self._knn_seconds(stepper)
        del stepper
        free(bench)
        stages = self._stages(step)
        if self.loaders is not None:
            loaders = (own, *other_loaders(bench, self.loaders))
        batch_sizes = self._batch_sizes(step)
        return Measured(
            device=bench.device.type,
            gpu=torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else None,
            dtype=next(name for name, dtype in DTYPES.items() if dtype == bench.dtype),
            compile=bench.compiles,
            ranks=bench.world.size,
            images=bench.images,
            val_images=bench.val_images,
            measured_batch_size=self.batch_size,
            backend=bench.backend if self.loaders is None else self.loaders.own_name,
            loader=self.loader_text,
            **end_to_end,
            energy=self.energy.description,
            step_images_per_second=step,
            loaders=loaders,
            batch_sizes=batch_sizes,
            seconds_per_image=stages,
            start_seconds=self.start_seconds,
            compile_seconds=self.compile_seconds,
            knn_seconds=knn_seconds,
            collapse_seconds=collapse_seconds,
            checkpoint=saving,
            notes=tuple(bench.notes),
            measuring_seconds=time.perf_counter() - self.began,
        )

    def _step(self) -> tuple[Stepper, Rate]:
        """The step alone; its first call compiles."""
        bench = self.bench
        bench.say(f"measuring the step at batch {self.batch_size}" + (", compiling it first" * bench.compiles))
        began = time.perf_counter()
        with bench.world.together():
            stepper = Stepper(bench, self.batch_size)
        stepper.fixed_views()
        self.start_seconds += time.perf_counter() - began
        first = bench.timed(stepper)
        second = bench.timed(stepper)
        self.compile_seconds = max(first - second, 0.0)
        return stepper, step_rate(bench, stepper, bench.share("step"))

    def _end_to_end(self, stepper: Stepper) -> dict:
        bench = self.bench
        bench.say("measuring training, loader and step together")
        loader, began = self._own(), time.perf_counter()
        if bench.backend == "resident":
            store = self.loaders.resident(bench.config.data.store_size)
            decoding = 0.0 if store.is_decoded else store.seconds_per_image * bench.images
            self.start_seconds += decoding
            if decoding > 1:
                bench.notes.append(f"the first start decodes all images once, in about {decoding:,.0f} s")
        batches, data_wait, steps = epochs(loader), data_wait_on(bench.device), 0
        first = next(batches)
        self.start_seconds += time.perf_counter() - began
        stepper(first.views)

        def train():
            nonlocal steps
            before = time.perf_counter()
            batch = next(batches)
            data_wait.arrived(time.perf_counter() - before)
            stepper(batch.views)
            data_wait.launched()
            steps += 1

        seconds = bench.share("end to end")
        bench.warm_up(train, seconds)
        cpus, joules, began, steps = cpu_times(), self.energy.joules(), bench.now(), 0
        data_wait.seconds()
        rate = bench.windows(train, self.batch_size, (1 - WARM_UP) * seconds)
        ended = bench.now()
        window = window_of(data_wait.seconds() / (ended - began), cpus, cpu_times())
        after, images = self.energy.joules(), steps * self.batch_size
        used = bench.world.collect(None if joules is None or after is None else after - joules)
        batches.close()
        if self.loaders is not None:
            loader.backend.close()
        joules_per_image = None if None in used else sum(used) / images
        return {"images_per_second": rate, **asdict(window), "joules_per_image": joules_per_image}

    def _own(self):
        if self.loaders is None:
            world = self.bench.world
            numbers = {"batch_size": self.batch_size, "seed": 0, "world_size": world.size}
            return SyntheticLoader(self.bench.specs, **numbers, device=self.bench.device, dtype=self.bench.dtype)
        with self.bench.world.together():
            loader = self.loaders.own()
        self.loader_text = loader.backend.description
        return loader

    def _own_loader(self) -> LoaderRate:
        bench = self.bench
        bench.say("measuring the loader alone")
        rate = loader_rate(bench, self._own(), bench.share("loader"))
        note = f"measured on {len(self.loaders.sample.indices):,} images" if bench.backend == "resident" else None
        return LoaderRate(self.loaders.own_name, rate, note)

    def _stages(self, step: Rate) -> dict[str, float | None]:
        bench, found = self.bench, dict.fromkeys(STAGES)
        if bench.world.size > 1:
            bench.say("measuring the step of one rank alone")
            found["communication"] = communication(bench, self.batch_size, step, bench.share("one rank alone"))
        else:
            bench.notes.append("communication not measured: one process")
        found["step"] = 1 / step.median - (found["communication"] or 0.0)
        if self.loaders is None:
            bench.notes.append("no images are read")
            return found
        bench.say("measuring the disk, decoding and augmentation")
        workers = bench.config.data.workers
        workers = usable_cores() if workers is None else workers
        found["disk"], reason = disk(bench, self.loaders, workers, bench.share("disk"))
        if reason:
            bench.notes.append(reason)
        found["decoding"], found["augmentation"] = decoding_and_augmentation(bench, self.loaders, bench.share("stages"))
        if found["augmentation"] is None:
            bench.notes.append("augmentation not measured: DALI decodes and augments in one graph")
        return found

    def _knn_seconds(self, stepper: Stepper) -> float | None:
        """Features of all images, and the search among them."""
        bench = self.bench
        if bench.val is None:
            return None
        bench.say("measuring what kNN costs")
        loader, precision = self.loaders.evaluation(), autocast(bench.device, bench.dtype)
        batches = _evaluation_batches(loader, bench.world)

        @torch.no_grad()
        def extract():
            batch = next(batches)
            with precision():
                return stepper.method.encoder(batch.views).float()

        with evaluating(stepper.method):
            start = bench.timed(extract)
            seconds = bench.share("kNN")
            bench.warm_up(extract, seconds)
            rate = bench.windows(extract, loader.batch_size * bench.world.size, (1 - WARM_UP) * seconds)
            features = extract().shape[1]
        batches.close()
        loader.backend.close()
        images, queries = bench.images, bench.val_images
        search = _search_seconds(bench, features) * (images / BANK) * (queries / CHUNK) / bench.world.size
        return 2 * start + (images + queries) / rate.median + search

    def _saving(self, stepper: Stepper) -> Checkpoint:
        """A checkpoint's bytes to the disk of run.dir, in a folder that is removed."""
        bench = self.bench
        found = None
        if bench.world.is_first:
            parent = Path(bench.config.run.dir).absolute()
            while not parent.exists():
                parent = parent.parent
            state = stepper.step.state_dict()
            try:
                with tempfile.TemporaryDirectory(prefix=".fastsiam-plan-", dir=parent) as folder:
                    began = time.perf_counter()
                    checkpoint.save(Path(folder), state, 1)
                    seconds = time.perf_counter() - began
                    found = Checkpoint(checkpoint.path_of(Path(folder), 0).stat().st_size, seconds)
            except (OSError, checkpoint.SaveError) as error:
                found = f"checkpoints not measured: {error}"
        found = bench.world.share(found)
        if isinstance(found, str):
            bench.notes.append(found)
            return Checkpoint()
        return found

    def _batch_sizes(self, step: Rate) -> tuple[BatchRate, ...]:
        bench, config = self.bench, self.bench.config
        own = with_batch_size(config, self.batch_size)
        found = {self.batch_size: BatchRate(self.batch_size, own.learning_rate, step)}
        sizes = other_batch_sizes(self.batch_size, bench.images, bench.world.size)
        bench.split("other batch sizes", [f"batch {size}" for size in sizes])
        for size in sizes:
            bench.say(f"measuring the step at batch {size}")
            found[size] = batch_rate(bench, size, self.affordable, bench.share(f"batch {size}"))
        return tuple(found[size] for size in sorted(found))


def _evaluation_batches(loader: EvaluationLoader, world: World):
    """This rank's part of the images over and over, whole batches only."""
    part = np.arange(len(loader.source))[world.share_of(len(loader.source))]
    least = loader.batch_size
    while True:
        for batch in loader.batches(part):
            if len(batch.indices) == least or len(part) < least:
                yield batch


def _search_seconds(bench: Bench, features: int) -> float:
    """Of `CHUNK` queries in a bank of `BANK` features."""
    settings, device = bench.config.evaluate, bench.device
    bank = torch.randn(BANK, features, device=device)
    labels = torch.arange(BANK, device=device) % 100
    queries, truth = bank[:CHUNK], labels[:CHUNK]

    def search():
        count_correct(bank, labels, queries, truth, k=settings.knn_k, temperature=settings.knn_temperature)

    bench.timed(search)
    return bench.timed(search)

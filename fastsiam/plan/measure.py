"""Measures a config within about the minutes that it is given, what matters most first; compilation comes on top."""

import contextlib
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from fastsiam.config import Config
from fastsiam.config.views import view_specs
from fastsiam.data.backends.synthetic import SyntheticLoader
from fastsiam.data.bottleneck import Loading, cpu_times, describe, window_of
from fastsiam.evaluate.knn import CHUNK, count_correct
from fastsiam.evaluate.online import evaluating
from fastsiam.plan.bench import Bench, epochs
from fastsiam.plan.loaders import Loaders, decoding_and_augmentation, disk_seconds, loader_rate, other_loaders
from fastsiam.plan.results import STAGES, BatchRate, Checkpoint, LoaderRate, Measured, Rate
from fastsiam.plan.steps import Affordable, Stepper, batch_rate, other_batch_sizes, with_batch_size
from fastsiam.run import checkpoint
from fastsiam.runtime.distributed import World
from fastsiam.runtime.energy import EnergyMeter
from fastsiam.runtime.runtime import Runtime
from fastsiam.training.data_wait import data_wait_on

# Of a bank of features, for the cost of a search in it.
BANK = 8192


def measure(config: Config, world: World, minutes: float, began: float) -> tuple[Measured, Loading]:
    """Trains for about `minutes`, and writes nothing that stays but the index of the images.

    `began`: when this process began, by `time.monotonic`. Raises the `UserError` that the run would raise.
    """
    with world.together():
        runtime = Runtime.of(config.train, world)
    with contextlib.ExitStack() as stack:
        bench = Bench(config, stack.enter_context(runtime), minutes)
        ready = time.monotonic() - began - bench.drawing_seconds
        loading = describe(bench.config, bench.source, bench.backend, bench.device)
        return _Measurements(bench, minutes, ready, stack).all(loading), loading


class _Measurements:
    """Measurements in turn; `all` makes them."""

    def __init__(self, bench: Bench, minutes: float, ready: float, stack: contextlib.ExitStack):
        self.bench, self.began, self.start_seconds = bench, time.perf_counter(), ready
        self.energy = stack.enter_context(EnergyMeter.of(bench.device, bench.notes.append))
        self.affordable, asked = Affordable.of(bench, minutes), bench.config.train.batch_size
        self.batch_size = self.affordable.largest(asked, bench.world.size)
        if self.batch_size != asked:
            reason = self.affordable.refusal(asked)
            bench.note(f"batch {asked}: {reason}; measured at batch {self.batch_size}", "smaller-batch")
        self.loaders = None
        if bench.source is not None:
            self.loaders = stack.enter_context(Loaders(bench, self.batch_size))

    def all(self, loading: Loading) -> Measured:
        bench, runtime = self.bench, self.bench.runtime
        stepper, step, compile_seconds = self._step()
        training = self._training(stepper)
        collapse_seconds = stepper.collapse_seconds()
        saving = self._saving(stepper)
        loaders, knn_seconds = (), None
        if self.loaders is not None:
            own = self._own_loader()
            knn_seconds = self._knn_seconds(stepper)
        del stepper
        bench.free()
        stages = self._stages(step)
        if self.loaders is not None:
            loaders = (own, *other_loaders(bench, self.loaders, loading))
        batch_sizes = self._batch_sizes(step)
        return Measured(
            **runtime.names,
            gpu=torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else None,
            ranks=bench.world.size,
            images=bench.images,
            val_images=0 if bench.val is None else len(bench.val),
            measured_batch_size=self.batch_size,
            backend=bench.backend if self.loaders is None else self.loaders.own_name,
            **training,
            energy=self.energy.description,
            step_images_per_second=step,
            loaders=loaders,
            batch_sizes=batch_sizes,
            seconds_per_image=stages,
            start_seconds=self.start_seconds,
            compile_seconds=compile_seconds,
            knn_seconds=knn_seconds,
            collapse_seconds=collapse_seconds,
            checkpoint=saving,
            notes=tuple(bench.notes),
            measuring_seconds=time.perf_counter() - self.began,
        )

    def _step(self) -> tuple[Stepper, Rate, float]:
        """Returns the step, its rate alone, and the seconds that its first call takes beyond the second."""
        bench = self.bench
        bench.say(f"measuring the step at batch {self.batch_size}" + (", compiling it first" * bench.runtime.compiles))
        began = time.perf_counter()
        with bench.world.together():
            stepper = Stepper(bench, self.batch_size)
        self.start_seconds += time.perf_counter() - began
        with bench.untimed():
            first = bench.timed(stepper)
        compile_seconds = max(first - bench.timed(stepper), 0.0)
        return stepper, stepper.rate(bench.seconds_for("step")), compile_seconds

    def _training(self, stepper: Stepper) -> dict:
        """Measures loader and step together; returns fields of `Measured`."""
        bench, began = self.bench, time.perf_counter()
        bench.say("measuring training, loader and step together")
        with bench.world.together():
            loader = self._own()
        if self.loaders and (decoding := self.loaders.decoding_seconds) > 1:
            self.start_seconds += decoding
            bench.note(f"the first start decodes all images once, in about {decoding:,.0f} s", "decodes-first")
        batches, data_wait = epochs(loader), data_wait_on(bench.device)
        first = next(batches)
        self.start_seconds += time.perf_counter() - began
        stepper(first.views)
        at_start = {}

        def begin():
            at_start.update(cpus=cpu_times(), joules=self.energy.joules(), began=bench.now(), steps=0)
            data_wait.seconds()

        def train():
            before = time.perf_counter()
            batch = next(batches)
            data_wait.arrived(time.perf_counter() - before)
            stepper(batch.views)
            data_wait.launched()
            at_start["steps"] = at_start.get("steps", 0) + 1

        rate = bench.rate(train, self.batch_size, bench.seconds_for("training"), begin=begin)
        seconds = bench.now() - at_start["began"]
        window = window_of(data_wait.seconds() / seconds, at_start["cpus"], cpu_times())
        after, before = self.energy.joules(), at_start["joules"]
        used = bench.world.collect(None if None in (before, after) else after - before)
        batches.close()
        if self.loaders is not None:
            loader.backend.close()
        images = at_start["steps"] * self.batch_size
        return {
            "loader": "synthetic: one fixed batch" if self.loaders is None else loader.backend.description,
            "images_per_second": rate,
            **asdict(window),
            "joules_per_image": None if None in used else sum(used) / images,
        }

    def _own(self):
        if self.loaders is not None:
            return self.loaders.own()
        runtime, specs = self.bench.runtime, view_specs(self.bench.config.views)
        numbers = {"batch_size": self.batch_size, "seed": 0, "world_size": runtime.world.size}
        return SyntheticLoader(specs, **numbers, device=runtime.device, dtype=runtime.dtype)

    def _own_loader(self) -> LoaderRate:
        bench = self.bench
        bench.say("measuring the loader alone")
        rate = loader_rate(bench, self._own(), bench.seconds_for("loader"))
        note = f"measured on {len(self.loaders.sample):,} images" if bench.backend == "resident" else None
        return LoaderRate(self.loaders.own_name, rate, note)

    def _stages(self, step: Rate) -> dict[str, float | None]:
        bench, found = self.bench, dict.fromkeys(STAGES)
        if bench.world.size > 1:
            bench.say("measuring the step of one rank alone")
            alone = Stepper(bench, self.batch_size, alone=True).rate(bench.seconds_for("one rank alone"))
            found["communication"] = max(1 / step.median - 1 / alone.median, 0.0)
            bench.free()
        else:
            bench.note("communication not measured: one process", "one-process")
        found["step"] = 1 / step.median - (found["communication"] or 0.0)
        if self.loaders is None:
            bench.note("no images are read", "synthetic")
            return found
        bench.say("measuring the disk, decoding and augmentation")
        if bench.backend == "resident":
            bench.note("disk not measured: images are in memory", "resident")
        else:
            found["disk"] = disk_seconds(bench, self.loaders.sample, bench.seconds_for("disk"))
        both = decoding_and_augmentation(bench, self.loaders, bench.seconds_for("stages"))
        found["decoding"], found["augmentation"] = both
        if both[1] is None:
            bench.note("augmentation not measured: DALI decodes and augments in one graph", "one-graph")
        return found

    def _knn_seconds(self, stepper: Stepper) -> float | None:
        """Measures features of images, and a search among them; returns the seconds for all images."""
        bench = self.bench
        if bench.val is None:
            return None
        bench.say("measuring what kNN costs")
        loader, ranks = self.loaders.evaluation(), bench.world.size
        part = np.arange(len(loader.source))[bench.world.share_of(len(loader.source))]
        batches = _batches(loader, part)

        @torch.no_grad()
        def extract():
            with bench.runtime.autocast():
                return stepper.method.encoder(next(batches).views).float()

        with evaluating(stepper.method):
            start = bench.timed(extract)
            rate = bench.rate(extract, loader.batch_size * ranks, bench.seconds_for("kNN"))
            features = extract().shape[1]
        batches.close()
        loader.backend.close()
        images, queries = bench.images, len(bench.val)
        search = _search_seconds(bench, features) * (images / BANK) * (queries / CHUNK) / ranks
        return 2 * start + (images + queries) / rate.median + search

    def _saving(self, stepper: Stepper) -> Checkpoint:
        """Writes a checkpoint to the disk of run.dir, in a folder that is removed."""
        bench, found = self.bench, Checkpoint()
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
                bench.note(f"checkpoints not measured: {error}", "no-checkpoint")
        return bench.world.share(found)

    def _batch_sizes(self, step: Rate) -> tuple[BatchRate, ...]:
        bench = self.bench
        own = with_batch_size(bench.config, self.batch_size).learning_rate
        found = {self.batch_size: BatchRate(self.batch_size, own, step)}
        sizes = other_batch_sizes(self.batch_size, bench.images, bench.world.size)
        for size in sizes:
            bench.say(f"measuring the step at batch {size}")
            seconds = bench.seconds_for("other batch sizes", len(sizes))
            found[size] = batch_rate(bench, size, self.affordable, seconds)
        return tuple(found[size] for size in sorted(found))


def _batches(loader, indices: np.ndarray):
    """Yields evaluation batches of these images over and over, whole ones only."""
    while True:
        for batch in loader.batches(indices):
            if len(batch.indices) == loader.batch_size or len(indices) < loader.batch_size:
                yield batch


def _search_seconds(bench: Bench, features: int) -> float:
    """Measures `CHUNK` queries in a bank of `BANK` features."""
    settings, device = bench.config.evaluate, bench.device
    bank = torch.randn(BANK, features, device=device)
    labels = torch.arange(BANK, device=device) % 100
    queries, truth = bank[:CHUNK], labels[:CHUNK]

    def search():
        count_correct(bank, labels, queries, truth, k=settings.knn_k, temperature=settings.knn_temperature)

    bench.timed(search)
    return bench.timed(search)

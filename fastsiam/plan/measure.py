"""Measures a config within about the minutes that it is given, what matters most first; compilation comes on top."""

import contextlib
import itertools
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from fastsiam.config import Config
from fastsiam.data.bottleneck import Loading, cpu_times, describe, window_of
from fastsiam.evaluate.knn import CHUNK, nearest
from fastsiam.evaluate.online import evaluation_mode
from fastsiam.plan.bench import Bench, epochs
from fastsiam.plan.loaders import Loaders, other_loaders
from fastsiam.plan.results import STAGES, BatchRate, Checkpoint, LoaderRate, Measured
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
    """Measurements in turn, each of which adds its fields of `Measured` to `found`."""

    def __init__(self, bench: Bench, minutes: float, ready: float, stack: contextlib.ExitStack):
        self.bench, self.began = bench, time.perf_counter()
        self.energy = stack.enter_context(EnergyMeter.of(bench.device, bench.notes.append))
        self.affordable, asked = Affordable.of(bench, minutes), bench.config.train.batch_size
        self.batch_size = self.affordable.largest(asked, bench.world.size)
        if self.batch_size != asked:
            reason = self.affordable.refusal(asked)
            bench.note(f"batch {asked}: {reason}; measured at batch {self.batch_size}", "smaller-batch")
        self.loaders = Loaders(bench, self.batch_size, stack.enter_context(tempfile.TemporaryDirectory()))
        self.found = {
            **bench.runtime.names,
            "gpu": torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else None,
            "ranks": bench.world.size,
            "images": bench.images,
            "val_images": 0 if bench.val is None else len(bench.val),
            "measured_batch_size": self.batch_size,
            "backend": self.loaders.own_name,
            "loaders": (),
            "knn_seconds": None,
            "start_seconds": ready,
        }

    def all(self, loading: Loading) -> Measured:
        bench, has_images = self.bench, self.bench.source is not None
        stepper = self._step()
        self._training(stepper)
        self.found["collapse_seconds"] = stepper.collapse_seconds()
        self._saving(stepper)
        if has_images:
            self._loader()
        if bench.val is not None:
            self._knn(stepper)
        del stepper
        bench.free()
        self._stages()
        if has_images:
            self.found["loaders"] += other_loaders(bench, self.loaders, loading)
        self._batch_sizes()
        self.found |= {"energy": self.energy.description, "notes": tuple(bench.notes)}
        return Measured(**self.found, measuring_seconds=time.perf_counter() - self.began)

    def _step(self) -> Stepper:
        bench, began = self.bench, time.perf_counter()
        bench.say(f"measuring the step at batch {self.batch_size}" + (", compiling it first" * bench.runtime.compiles))
        with bench.world.together():
            stepper = Stepper(bench, self.batch_size)
        self.found["start_seconds"] += time.perf_counter() - began
        with bench.untimed():
            first = bench.timed(stepper)
        self.found["compile_seconds"] = max(first - bench.timed(stepper), 0.0)
        self.found["step_images_per_second"] = stepper.rate(bench.seconds_for("step"))
        return stepper

    def _training(self, stepper: Stepper) -> None:
        bench, began = self.bench, time.perf_counter()
        bench.say("measuring training, loader and step together")
        loader = self.loaders.own()
        decoding = self.loaders.decoding_seconds
        if decoding > 1:
            bench.note(f"the first start decodes all images once, in about {decoding:,.0f} s", "decodes-first")
        batches, data_wait = epochs(loader), data_wait_on(bench.device)
        first = next(batches)
        self.found["start_seconds"] += decoding + time.perf_counter() - began
        stepper(first)
        steps, before = itertools.count(), {}

        def begin():
            before.update(cpus=cpu_times(), joules=self.energy.joules(), time=bench.now(), steps=next(steps))
            data_wait.seconds()

        def train():
            asked = time.perf_counter()
            batch = next(batches)
            data_wait.arrived(time.perf_counter() - asked)
            stepper(batch)
            data_wait.launched()
            next(steps)

        rate = bench.rate(train, self.batch_size, bench.seconds_for("training"), begin=begin)
        seconds, images = bench.now() - before["time"], self.batch_size * (next(steps) - before["steps"] - 1)
        window = window_of(data_wait.seconds() / seconds, before["cpus"], cpu_times())
        joules = self.energy.joules()
        used = bench.world.collect(None if None in (joules, before["joules"]) else joules - before["joules"])
        batches.close()
        self.found |= asdict(window) | {
            "loader": self.loaders.close(loader),
            "images_per_second": rate,
            "joules_per_image": None if None in used else sum(used) / images,
        }

    def _loader(self) -> None:
        bench = self.bench
        bench.say("measuring the loader alone")
        rate = self.loaders.rate(self.loaders.own(), bench.seconds_for("loader"))
        note = f"measured on {len(self.loaders.sample):,} images" if bench.backend == "resident" else None
        self.found["loaders"] = (LoaderRate(self.loaders.own_name, rate, note),)

    def _knn(self, stepper: Stepper) -> None:
        """Measures features of images and a search among them."""
        bench, settings, ranks = self.bench, self.bench.config.evaluate, self.bench.world.size
        chunk = CHUNK[bench.device.type]
        bench.say("measuring what kNN costs")
        loader = self.loaders.evaluation()
        part = np.arange(len(loader.source))[bench.world.share_of(len(loader.source))]
        batches = _batches(loader, part)

        @torch.no_grad()
        def extract():
            with bench.runtime.autocast():
                return stepper.method.encoder(next(batches).images).float()

        with evaluation_mode(stepper.method):
            start = bench.timed(extract)
            rate = bench.rate(extract, loader.batch_size * ranks, bench.seconds_for("kNN"))
            bank = torch.randn(BANK, extract().shape[1], device=bench.device).half()
        batches.close()
        loader.backend.close()

        def search():
            nearest(bank, bank[:chunk], settings.knn_k)

        bench.timed(search)
        images, queries = bench.images, len(bench.val)
        searches = bench.timed(search) * (images / BANK) * (queries / chunk) / ranks
        self.found["knn_seconds"] = 2 * start + (images + queries) / rate.median + searches

    def _saving(self, stepper: Stepper) -> None:
        """Measures a checkpoint on the disk of run.dir, in a folder that is removed."""
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
        self.found["checkpoint"] = bench.world.share(found)

    def _stages(self) -> None:
        bench, loaders, stages = self.bench, self.loaders, dict.fromkeys(STAGES)
        stages["step"] = 1 / self.found["step_images_per_second"].median
        if bench.world.size > 1:
            bench.say("measuring the step of one rank alone")
            runtime = replace(bench.runtime, world=World())
            alone = Stepper(bench, self.batch_size, runtime).rate(bench.seconds_for("one rank alone"))
            stages["communication"] = max(stages["step"] - 1 / alone.median, 0.0)
            stages["step"] -= stages["communication"]
            bench.free()
        if bench.source is not None:
            bench.say("measuring the disk, decoding and augmentation")
            if bench.backend == "resident":
                bench.note("disk not measured: images are in memory", "disk-not-measured")
            else:
                stages["disk"] = loaders.disk_seconds(bench.seconds_for("disk"))
            seconds = bench.seconds_for("stages")
            stages["decoding"], stages["augmentation"] = loaders.decoding_and_augmentation(seconds)
            if stages["augmentation"] is None:
                bench.note("augmentation not measured: DALI augments in the graph that decodes", "one-graph")
        self.found["seconds_per_image"] = stages

    def _batch_sizes(self) -> None:
        bench, own = self.bench, self.batch_size
        learning_rate = with_batch_size(bench.config, own, bench.world.size).learning_rate
        found = {own: BatchRate(own, learning_rate, self.found["step_images_per_second"])}
        sizes = other_batch_sizes(own, bench.images, bench.world.size)
        for size in sizes:
            bench.say(f"measuring the step at batch {size}")
            seconds = bench.seconds_for("other batch sizes", len(sizes))
            found[size] = batch_rate(bench, size, self.affordable, seconds)
        self.found["batch_sizes"] = tuple(found[size] for size in sorted(found))


def _batches(loader, indices: np.ndarray):
    """Yields evaluation batches of these images over and over, whole ones only."""
    while True:
        for batch in loader.batches(indices):
            if len(batch.indices) == loader.batch_size or len(indices) < loader.batch_size:
                yield batch

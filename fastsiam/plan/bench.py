"""A config on this machine without a run folder: its images, device and ranks, and windows of time on all ranks."""

import contextlib
import gc
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator

import torch

from fastsiam.config import Config
from fastsiam.config.views import view_specs
from fastsiam.data.backends.base import Batch
from fastsiam.data.backends.choose import choose_backend
from fastsiam.data.backends.store_size import with_its_store
from fastsiam.data.backends.synthetic import IMAGENET_TRAIN_IMAGES
from fastsiam.data.build import with_its_cores
from fastsiam.data.loader import check_batch_size, check_divides
from fastsiam.data.skip_list import SkipList
from fastsiam.data.sources.image_header import UNREADABLE
from fastsiam.data.sources.open import open_sources
from fastsiam.data.sources.source import ImageSource
from fastsiam.errors import UserError
from fastsiam.plan.results import Rate
from fastsiam.runtime import malloc
from fastsiam.runtime.device import choose_compile, choose_device, choose_precision
from fastsiam.runtime.distributed import World
from fastsiam.runtime.rank_check import check_alike, facts_of_config, facts_of_images

WINDOWS = 5
# Of the time for a measurement, in which what was made ahead of it is used up.
WARM_UP = 0.2
WARM_UP_CALLS = 4
# For a measurement, where those before it have taken longer than they should.
LEAST_SECONDS = 0.2


class Bench:
    """What all measurements of a plan share. Raises the `UserError` that the run would raise."""

    def __init__(self, config: Config, world: World, stack: contextlib.ExitStack, minutes: float):
        check_alike(world, facts_of_config(config))
        self.config, self.world = with_its_cores(config, world), world
        self.notes: list[str] = []
        self.drawing_seconds = 0.0
        """Of the demo images, which a run finds drawn."""
        self._drew_from: float | None = None
        with world.together():
            check_divides(config.train.batch_size, world.size)
            self.device = choose_device(config.train.device, world.device_rank, world.device_ranks)
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            self.dtype = choose_precision(config.train.precision, self.device)
            self.compiles = choose_compile(config.train.compile, self.device)
            self.backend, _ = choose_backend(config.data.backend, config.data.train)
        with world.together(), world.leader_first():
            self.source, self.val = open_sources(config, self.notes.append, self._drawing)
            self.config = with_its_store(self.config, self.source, self.notes.append)
            if self._drew_from is not None:
                self.drawing_seconds = time.monotonic() - self._drew_from
            if self.source is not None:
                check_batch_size(config.train.batch_size, len(self.source), config.data.train)
        check_alike(world, {"data.backend": self.backend, **facts_of_images(self.source, self.val)})
        self.specs = view_specs(config.views)
        if world.is_first and (load := others_busy()):
            self.notes.append(
                f"other processes keep {load:.1f} cores of this machine busy: rates are of what they leave"
            )
        self.weights: dict[str, float] = {}
        """Of the measurements that are still to come, by name."""
        self._deadline = time.perf_counter() + 60 * minutes
        torch.backends.cudnn.benchmark = self.device.type == "cuda"
        if self.device.type == "cpu":
            malloc.keep_freed()
            stack.callback(malloc.give_back_freed)

    @property
    def images(self) -> int:
        return IMAGENET_TRAIN_IMAGES if self.source is None else len(self.source)

    @property
    def val_images(self) -> int:
        return 0 if self.val is None else len(self.val)

    def say(self, text: str) -> None:
        """To stderr, for stdout is the answer's; only the first rank speaks."""
        if self.world.is_first:
            print(text, file=sys.stderr, flush=True)

    def share(self, name: str) -> float:
        """Seconds for the measurement of this name: its part of what is left for it and those after it."""
        part = self.weights[name] / sum(self.weights.values())
        del self.weights[name]
        return self.world.share(max(part * (self._deadline - time.perf_counter()), LEAST_SECONDS))

    def split(self, name: str, parts: list[str]) -> None:
        """Share the time of a measurement equally among these."""
        weight = self.weights.pop(name)
        self.weights |= {part: weight / len(parts) for part in parts}

    def extend(self, seconds: float) -> None:
        """What passed is no measuring."""
        self._deadline += seconds

    def skip_list(self, source: ImageSource) -> SkipList:
        """As the run has it, but that nothing is written down."""
        return SkipList(
            len(source), self.config.data.max_bad_fraction, source.kinds >= UNREADABLE, location=self.config.data.train
        )

    def now(self) -> float:
        """When the device has done what it was told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def timed(self, call: Callable[[], object]) -> float:
        """Seconds of a call, to the end of the device's work; of several ranks the slowest's."""
        self.world.barrier()
        began = self.now()
        call()
        return max(self.world.collect(self.now() - began))

    def windows(self, call: Callable[[], object], images: int, seconds: float, least: int = 1) -> Rate:
        """`call()` takes `images` of all ranks; repeated for about `seconds`, at least `least` times in each window."""
        began, rates = self.now(), []
        while not rates or (len(rates) < WINDOWS and not self._over(began, seconds)):
            self.world.barrier()
            window, calls = self.now(), 0
            while calls < least or not self._over(window, seconds / WINDOWS):
                call()
                calls += 1
            rates.append(calls * images / max(self.world.collect(self.now() - window)))
        return Rate.of(rates)

    def warm_up(self, call: Callable[[], object], seconds: float) -> None:
        """A few calls that are not counted, one at least."""
        began = time.perf_counter()
        for number in range(WARM_UP_CALLS):
            if number and self._over(began, WARM_UP * seconds):
                return
            call()

    def _drawing(self, text):
        self._drew_from = time.monotonic()
        self.say(text)

    def _over(self, began, seconds):
        """Whether the time has passed on some rank: all of them must take the same steps."""
        return bool(self.world.largest(int(time.perf_counter() - began >= seconds))[0])


def others_busy() -> float | None:
    """How many cores were busy in the last minute (proc(5), loadavg); None where that is less than half of one.

    To be asked before this process has been busy for long.
    """
    load = min(os.getloadavg()[0], len(os.sched_getaffinity(0)))
    return load if load >= 0.5 else None


def epochs(loader) -> Iterator[Batch]:
    """The batches of one epoch after the other, without end; an epoch without any ends the plan."""
    for number in itertools.count():
        empty = True
        for batch in loader.epoch(number):
            empty = False
            yield batch
        if empty:
            raise UserError("data.train: an epoch has no batch")


def free(bench: Bench) -> None:
    """What nobody holds any more goes back to the device; compiled shapes are forgotten, lest the next be dynamic."""
    if bench.compiles:
        torch.compiler.reset()
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()

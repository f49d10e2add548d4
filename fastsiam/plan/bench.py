"""Data, ranks and clock of a plan's measurements: a config on this machine without a run folder."""

import contextlib
import gc
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator

import torch

from fastsiam.config import Config
from fastsiam.config.method_sections import check_images
from fastsiam.config.micro_batch import check_micro_batch
from fastsiam.data.backends.base import Batch
from fastsiam.data.backends.synthetic import IMAGENET_TRAIN_IMAGES
from fastsiam.data.loader import check_batch_size, check_divides
from fastsiam.errors import Notice
from fastsiam.plan.results import Rate
from fastsiam.run.training_data import open_images
from fastsiam.runtime.rank_check import check_alike, facts_of_config
from fastsiam.runtime.runtime import Runtime

# Parts of the time, in the order of measuring.
PARTS = {
    "step": 12,
    "training": 25,
    "loader": 9,
    "kNN": 6,
    "one rank alone": 6,
    "disk": 3,
    "stages": 9,
    "other loaders": 18,
    "other batch sizes": 18,
}
WINDOWS = 5
# Share of a measurement in which batches that were made ahead of it are used up.
WARM_UP = 0.2
WARM_UP_CALLS = 4
# For a measurement, where those before it have taken longer than planned.
LEAST_SECONDS = 0.2


class Bench:
    """Data and ranks of a config. Raises the `UserError` that a run would raise."""

    def __init__(self, config: Config, runtime: Runtime, minutes: float):
        self.runtime, self.world, self.device = runtime, runtime.world, runtime.device
        self.notes: list[str] = []
        self._drawing_since: float | None = None
        check_alike(self.world, facts_of_config(config))
        self.config, self.backend, _, self.source, self.val = open_images(
            config, runtime, self.notes.append, self._drawing
        )
        since = self._drawing_since
        self.drawing_seconds = 0.0 if since is None else time.monotonic() - since
        """Seconds for drawing the demo images, which a run finds drawn."""
        with self.world.together():
            check_divides(config.train.batch_size, self.world.size)
            check_micro_batch(config.train.batch_size, config.train.micro_batch, self.world.size)
            if self.source is not None:
                check_batch_size(config.train.batch_size, len(self.source), config.data.train)
                check_images(config.method, len(self.source), config.data.train)
        # The load of the last minute; this process has not been busy for long.
        load = min(os.getloadavg()[0], len(os.sched_getaffinity(0)))
        if load >= 0.5:
            self.note(f"other processes keep {load:.1f} cores of this machine busy, which lowers all rates", "busy")
        self._left, self._deadline = sum(PARTS.values()), time.perf_counter() + 60 * minutes

    @property
    def images(self) -> int:
        return IMAGENET_TRAIN_IMAGES if self.source is None else len(self.source)

    @property
    def loader_options(self) -> dict:
        """Arguments of `build_loader` and `build_evaluation_loader`."""
        runtime = self.runtime
        return {"device": runtime.device, "dtype": runtime.dtype, "world_size": runtime.world.size}

    def say(self, text: str) -> None:
        """Prints a line to stderr on the first rank; stdout is for the plan."""
        if self.world.is_first:
            print(text, file=sys.stderr, flush=True)

    def note(self, text: str, code: str) -> None:
        self.notes.append(Notice(text, code))

    def seconds_for(self, name: str, parts: int = 1) -> float:
        """Returns the time of a measurement, or of one of its `parts`: its share of the time that is left."""
        part = PARTS[name] / parts
        left, self._left = self._left, self._left - part
        return self.world.share(max(part / left * (self._deadline - time.perf_counter()), LEAST_SECONDS))

    @contextlib.contextmanager
    def untimed(self) -> Iterator[None]:
        """Extends the deadline by the time of the block, which measures nothing."""
        began = time.perf_counter()
        yield
        self._deadline += time.perf_counter() - began

    def now(self) -> float:
        """Waits for the device; returns the time in seconds."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def timed(self, call: Callable[[], object]) -> float:
        """Returns the seconds of a call on the slowest rank, to the end of the device's work."""
        self.world.barrier()
        began = self.now()
        call()
        return max(self.world.collect(self.now() - began))

    def rate(
        self, call: Callable, images: int, seconds: float, *, least: int = 1, begin: Callable | None = None
    ) -> Rate:
        """Measures a call that takes `images` of all ranks, for about `seconds`.

        `least`: calls in a window. `begin()` is called when warming up is over.
        """
        began = time.perf_counter()
        for number in range(WARM_UP_CALLS):
            if number and self._over(began, WARM_UP * seconds):
                break
            call()
        if begin:
            begin()
        seconds, rates = (1 - WARM_UP) * seconds, []
        began = self.now()
        while not rates or (len(rates) < WINDOWS and not self._over(began, seconds)):
            self.world.barrier()
            window, calls = self.now(), 0
            while calls < least or not self._over(window, seconds / WINDOWS):
                call()
                calls += 1
            rates.append(calls * images / max(self.world.collect(self.now() - window)))
        return Rate.of(rates)

    def free(self) -> None:
        """Returns unused memory to the device; compiled shapes are forgotten, lest the next one be dynamic."""
        if self.runtime.compiles:
            torch.compiler.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _over(self, began: float, seconds: float) -> bool:
        """True once the time has passed on some rank: all of them must take the same steps."""
        return bool(self.world.largest(int(time.perf_counter() - began >= seconds))[0])

    def _drawing(self, text: str) -> None:
        # The first line is that of drawing, if there is any to do; a later one comes when all is open.
        self._drawing_since = self._drawing_since or time.monotonic()
        self.say(text)


def epochs(loader) -> Iterator[Batch]:
    """Yields the batches of one epoch after the other, without end."""
    for number in itertools.count():
        yield from loader.epoch(number)

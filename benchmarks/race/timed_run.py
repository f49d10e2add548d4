"""One run against the clock: warm-up on a state that is thrown away, training by the clock, evaluation beside it.

The schedule's progress is clock / budget, so that each contestant anneals fully whatever its speed.
"""

import contextlib
import copy
import math
import multiprocessing
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from benchmarks import peers
from benchmarks.harness.timing import allocated_at_peak, peak_memory
from benchmarks.race.contestants import FASTSIAM, OURS, PEERS, Contestant, Loading, Product, seed_everything
from fastsiam.config import Config
from fastsiam.data.skip_list import SkipList
from fastsiam.data.sources.image_header import UNREADABLE
from fastsiam.data.sources.open import open_source, open_sources
from fastsiam.evaluate.online import OnlineEvaluation
from fastsiam.optim.build import set_learning_rate
from fastsiam.runtime.device import choose_device
from fastsiam.runtime.runtime import Runtime

WARMUP_STEPS = 3
# Of a run's time, and no longer than: what one way to load is tried for, in so many turns.
_TRIAL_SHARE, _TRIAL_SECONDS, _TRIAL_TURNS = 0.02, 5.0, 2


@dataclass(frozen=True)
class Job:
    """Job of a process: one run."""

    variant: str
    config: Config
    """The config with the run's seed, rate, batch and data."""
    seconds: float
    """Training time, evaluation and warm-up not counted."""
    evaluations: int
    """Number of evaluations at equal shares of `seconds`, the last one at the end."""
    loading: Loading | None = None
    """A peer's, as its trial has chosen; None for ours."""
    checkout: Path | None = None
    """Path of solo-learn."""


@dataclass(frozen=True)
class Point:
    """One evaluation."""

    seconds: float
    """Time of the clock."""
    images: int
    """Consumed by training steps."""
    knn: float
    """Top-1 accuracy in percent."""


@dataclass(frozen=True)
class Outcome:
    """A run that has used up its time."""

    curve: tuple[Point, ...]
    final_loss: float | None
    """Loss of the last step; None where it was not finite."""
    setup_seconds: float
    """To build model and loader, decoding into memory included."""
    warmup_seconds: float
    """Seconds of the thrown-away steps: compilation, first calls, the start of workers."""
    peak_memory_bytes: int
    """Tensors alive at the peak of a step: those of the run, and what the step allocates."""
    facts: dict

    def numbers(self) -> dict:
        """Returns the numbers of a result line."""
        last = self.curve[-1]
        return {
            "knn": last.knn,
            "seconds": last.seconds,
            "images": last.images,
            "images_per_second": last.images / last.seconds,
            "final_loss": self.final_loss,
            "setup_seconds": self.setup_seconds,
            "warmup_seconds": self.warmup_seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "curve": [list(asdict(point).values()) for point in self.curve],
            **self.facts,
        }


class Clock:
    """Seconds between `start` and `stop`, added up; both wait until the device has finished."""

    def __init__(self, device: torch.device, now: Callable[[], float] = time.perf_counter):
        self._device, self._now = device, now
        self._before, self._since = 0.0, None

    @property
    def seconds(self) -> float:
        return self._before + (self._now() - self._since if self._since is not None else 0.0)

    def start(self) -> None:
        self._wait()
        self._since = self._now()

    def stop(self) -> None:
        self._wait()
        self._before, self._since = self.seconds, None

    def _wait(self):
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


@contextlib.contextmanager
def thrown_away(contestant: Contestant) -> Iterator[None]:
    """Undoes what is trained inside: weights, buffers, optimizer and random generators are put back bit by bit.

    Compiled code and started workers stay.
    """
    model, optimizer = contestant.model, contestant.optimizer
    # The state dict leaves out some buffers, such as lightly's queue of negatives.
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    generators = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        model.load_state_dict(saved[0])
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        optimizer.load_state_dict(saved[1])
        optimizer.zero_grad(set_to_none=True)
        random.setstate(generators[0])
        np.random.set_state(generators[1])
        torch.set_rng_state(generators[2])
        if on_devices:
            torch.cuda.set_rng_state_all(on_devices)


def warm_up(contestant: Contestant, config: Config, steps: int = WARMUP_STEPS) -> float:
    """Runs the first steps on a state that is thrown away, in each size of views; returns their seconds."""
    start = time.perf_counter()
    with thrown_away(contestant):
        for size in contestant.sizes or (None,):
            contestant.size = size
            # A loader has one epoch open at a time.
            with contextlib.closing(contestant.batches()) as batches:
                for _ in range(steps):
                    set_learning_rate(contestant.optimizer, config, 0.5)
                    contestant.step(next(batches)).item()
        contestant.size = None
    return time.perf_counter() - start


def peak_of_a_step(contestant: Contestant, device: torch.device) -> int:
    """Bytes of the model, its buffers and its optimizer's state, and what a step on top of them has alive at its peak.

    Views and the loader's memory are left out. The step is thrown away.
    """
    with thrown_away(contestant), contextlib.closing(contestant.batches()) as batches:
        views = next(batches)
        contestant.step(views)
        state = [value for of_one in contestant.optimizer.state.values() for value in of_one.values()]
        held = [*contestant.model.parameters(), *contestant.model.buffers(), *filter(torch.is_tensor, state)]
        measure = peak_memory if device.type == "cuda" else allocated_at_peak
        return sum(tensor.nbytes for tensor in held) + measure(lambda: contestant.step(views), device)


def against_the_clock(
    contestant: Contestant,
    config: Config,
    seconds: float,
    evaluations: int,
    evaluate: Callable[[], float],
    clock: Clock,
    say: Callable[[str], None] = print,
) -> tuple[tuple[Point, ...], float | None]:
    """Trains until the clock is at `seconds`; returns the evaluations at equal shares of it and the last loss.

    An evaluation comes after the first step that ends at or past its share; the clock stands meanwhile.
    """
    curve, images, passed = [], 0, 0
    contestant.train()
    clock.start()
    while passed < evaluations:
        contestant.train_step(config, min(clock.seconds / seconds, 1.0))
        images += config.train.batch_size
        share = min(int(clock.seconds / seconds * evaluations), evaluations)
        if share > passed:
            clock.stop()
            # A step longer than a share stands for all that it has passed: curves of one race are of one length.
            curve += [Point(clock.seconds, images, evaluate())] * (share - passed)
            passed, loss = share, contestant.loss()
            say(f"  {clock.seconds:6.1f} s {images:9,} images   kNN {curve[-1].knn:5.2f} %   loss {loss:.3f}")
            if passed < evaluations:
                clock.start()
    return tuple(curve), loss if math.isfinite(loss) else None


def run_job(job: Job) -> Outcome:
    """Builds, warms up and races, in a process of its own. Raises `AbsentError` for a peer that cannot run here."""
    began = time.perf_counter()
    with prepared(job) as (contestant, monitor):
        setup = time.perf_counter() - began
        warmup = _in_a_thread(warm_up, contestant, job.config)
        memory = _in_a_thread(peak_of_a_step, contestant, _device(job))
        clock = Clock(_device(job))
        seed_everything(job.config.train.seed)

        def evaluate():
            return _in_a_thread(monitor.knn, contestant.encoder)

        curve, loss = against_the_clock(contestant, job.config, job.seconds, job.evaluations, evaluate, clock, _say)
    return Outcome(curve, loss, setup, warmup, memory, contestant.facts)


def _in_a_thread(function, *arguments):
    """Calls a function in a thread that then ends, and with it the OpenMP threads that it had.

    libgomp lets no thread spin at a barrier where it has more of them than there are cores. Ours trains in a thread
    other than the main one, which would cost it 1.6 times its speed with 16 px on two cores.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *arguments).result()


@contextlib.contextmanager
def prepared(job: Job) -> Iterator[tuple[Contestant, OnlineEvaluation]]:
    """Yields the contestant of a job and its evaluation, which has one precision and one code for all."""
    device = _device(job)
    torch.backends.cudnn.benchmark = device.type == "cuda"
    seed_everything(job.config.train.seed)
    contestant = build(job)
    try:
        yield contestant, build_monitor(job.config, device)
    finally:
        contestant.close()


def build(job: Job) -> Contestant:
    # Workers begin as forks of a process that has imported what all of them need.
    multiprocessing.set_forkserver_preload(["torch", "torchvision.transforms", peers.__name__])
    if job.variant in OURS:
        return Product(job.config)
    source = open_source(job.config.data.train)
    return PEERS[job.variant].build(job.config, source, _device(job), job.checkout, job.loading)


def build_monitor(config: Config, device: torch.device) -> OnlineEvaluation:
    """kNN of val images against training images, for every contestant the same."""
    train, val = open_sources(config, _say, _say)
    skips = [SkipList(len(source), 0.0, source.kinds >= UNREADABLE) for source in (train, val)]
    settings = config.with_values({"train.precision": "auto", "train.device": device.type}).train
    return OnlineEvaluation(config, train, val, skips, Runtime.of(settings))


def controls(config: Config) -> dict[str, float]:
    """kNN without training: of the seed's initial weights with filled batch-norm statistics, and of raw pixels."""
    with prepared(Job(FASTSIAM, config, 0.0, 0)) as (contestant, monitor):
        contestant.size = config.view_stages[-1]
        # A contestant's epochs as a monitor reads them.
        loader = SimpleNamespace(
            epoch=lambda number: (SimpleNamespace(views=[views]) for views in contestant.epoch(number))
        )
        untrained = monitor.untrained(contestant.model, loader)
        return {"untrained_knn": untrained, "raw_pixels_knn": monitor.raw_pixels()}


def try_loadings(job: Job) -> dict[Loading, float]:
    """Images a second of short training with each way to load that a peer has, the better of two turns.

    Raises `AbsentError` for a peer that cannot run here.
    """
    streams, rates = {}, {}
    for loading in PEERS[job.variant].candidates():
        contestant = build(replace(job, loading=loading))
        streams[loading] = contestant, contestant.batches()
    # In turns: a machine that is slow for a moment is not so for one of them alone.
    for _ in range(_TRIAL_TURNS):
        for loading, (contestant, batches) in streams.items():
            seconds = min(_TRIAL_SHARE * job.seconds, _TRIAL_SECONDS)
            rate = _rate(contestant, batches, job.config.train.batch_size, seconds)
            rates[loading] = max(rate, rates.get(loading, 0.0))
    for loading, rate in rates.items():
        _say(f"  {loading}: {rate:.1f} images/s")
    return rates


def _rate(contestant, batches, batch_size, seconds):
    """Workers come up and use up what they have prepared before the clock starts."""
    for _ in range(2 * WARMUP_STEPS):
        contestant.step(next(batches)).item()
    images, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds or not images:
        contestant.step(next(batches)).item()
        images += batch_size
    return images / passed


def _device(job):
    return choose_device(job.config.train.device)


def _say(text):
    print(text, flush=True)

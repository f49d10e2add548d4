"""Contestants of a race to a kNN accuracy: the product, and its method as three other projects run it.

All of them train one model (architecture and initial weights of the config and its seed) on the same files with the
same batch, rate schedule and augmentation numbers. Each brings its own loader, step, precision and memory layout:

- fastsiam: the product's own loop with the config, its schedule, log and checks included. Beside it, whatever the
  config has: with two views of one size (plain), with four of one size, and with two that grow from half of it.
- authors: PIL transforms in a DataLoader, fp32, eager; their predictor keeps its rate where the config's does.
- lightly: its transform, heads and losses, fp32, eager, one rate for all parameters, as its examples have it.
- lightly + bf16 + channels-last: the same with the two switches that its example leaves off.
- solo-learn: its method and transforms, channels-last; mixed precision, since its CIFAR configs say `16-mixed`, for
  which Lightning takes bf16 on a CPU. Where the hardware does not multiply bf16 it is run in fp32. Its CIFAR configs
  load by PIL, as this one does. The loss it tells has that of its online classifier in it, which moves no encoder.
- solo-learn DALI: the same with the DALI pipeline that its configs for folders of images ask for.
"""

import itertools
import os
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.harness.product import ProductRun
from benchmarks.peers import authors, lightly, solo_learn
from benchmarks.variants.step import initial_weights
from fastsiam.config import Config
from fastsiam.data.sources.source import ImageSource
from fastsiam.optim.build import set_learning_rate
from fastsiam.runtime.device import autocast, choose_precision

FASTSIAM = "fastsiam"
PLAIN, FOUR_VIEWS, GROWING = "fastsiam plain", "fastsiam + 4 views", "fastsiam + growing views"
OURS = (FASTSIAM, PLAIN, FOUR_VIEWS, GROWING)
CHANNELS_LAST = "channels-last"
# Parts in which the product counts its progress.
WHOLE = 10**9


@dataclass(frozen=True)
class Loading:
    """Loading of a peer's views: `kind` is PIL in a DataLoader of `workers` processes, or DALI with as many threads."""

    kind: str
    workers: int

    def __str__(self):
        return f"{self.kind}, {self.workers} {'threads' if self.kind == 'DALI' else 'workers'}"


@dataclass
class Contestant:
    """Model with the one step that trains it and the one loader that feeds it."""

    step: Callable[[torch.Tensor], torch.Tensor]
    """Maps views [V*N, 3, S, S] on the device to the loss of one training step, detached."""
    epoch: Callable[[int], Iterable[torch.Tensor]]
    """Returns the views of an epoch's batches."""
    model: nn.Module
    encoder: nn.Module
    """The part of `model` whose pooled features are evaluated."""
    optimizer: torch.optim.Optimizer
    """Groups with `scheduled`, for `fastsiam.optim.set_learning_rate`."""
    facts: dict[str, str | bool] = field(default_factory=dict)
    """Facts of its result line: precision, memory format, compiler, loader."""
    sizes: tuple[tuple[int, ...], ...] = ()
    """Sizes of its views, where there are several; each has a graph of its own to compile."""
    size: tuple[int, ...] | None = None
    """The size of the views of `epoch`; None: as that function has them."""
    close: Callable[[], None] = lambda: None
    before: Callable[[float], None] = lambda progress: None
    """Called before a step with the share of its time that is over, for what follows a schedule beside the rate."""
    _stream: Iterator[torch.Tensor] | None = None
    _loss: torch.Tensor | None = None

    def batches(self) -> Iterator[torch.Tensor]:
        """Yields views of epoch after epoch, without end."""
        for number in itertools.count():
            yield from self.epoch(number)

    def train_step(self, config: Config, progress: float) -> None:
        """Takes one step on the next batch at the learning rate of `progress`, the share of its time that is over."""
        if self._stream is None:
            self._stream = self.batches()
        set_learning_rate(self.optimizer, config, progress)
        self.before(progress)
        self._loss = self.step(next(self._stream))

    def loss(self) -> float:
        """Returns the loss of the last step; waits for the device."""
        return self._loss.item()

    @property
    def training(self) -> bool:
        return self.model.training

    def train(self, mode: bool = True) -> None:
        self.model.train(mode)

    def eval(self) -> None:
        self.model.eval()


class Product(Contestant):
    """The product's own loop, whose schedule follows the clock of the race in place of its own budget."""

    def __init__(self, config: Config):
        # The amount does not matter: `measure` is the race's. A last evaluation of no cost keeps nothing in reserve.
        self.run = ProductRun(config.with_values({"budget": "1000h", "train.epochs": None}))
        self._share, parts = 0.0, self.run.parts
        parts.progress.measure = lambda: round(self._share * WHOLE)
        parts.progress.state.progress = parts.progress.state.evaluation_cost = 0.0
        runtime, method = parts.data.runtime, parts.step.method
        facts = {
            "precision": runtime.names["dtype"],
            "memory_format": CHANNELS_LAST if config.train.channels_last else "contiguous",
            "compiled": runtime.compiles,
            "loader": parts.data.description,
        }
        super().__init__(
            lambda views: parts.step([views], 1)["loss"].detach(),
            lambda number: (batch.views[0] for batch in parts.data.loader.epoch(number, sizes=self.size)),
            method,
            method.encoder,
            parts.step.optimizer,
            facts,
            sizes=config.view_stages,
            close=self.run.close,
        )

    def train_step(self, config: Config, progress: float) -> None:
        # At 1 the loop would end.
        self._share = min(progress, 1 - 1 / WHOLE)
        self.run.parts.progress.agree()
        self.run()

    def loss(self) -> float:
        return self.run.parts.step.read().loss


def seed_everything(seed: int) -> None:
    """Seeds the global generators, from which peers draw and the product does not."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def overrides_of(variant: str, config: Config) -> list[str]:
    """Returns the overrides of a variation of ours; none for a peer."""
    size = config.views[0].full_size
    recipes = {PLAIN: (2, f"{size}"), FOUR_VIEWS: (4, f"{size}"), GROWING: (2, f"{size // 2}..{size}")}
    if variant not in recipes:
        return []
    count, sizes = recipes[variant]
    return [f"views.count={count}", f"views.size={sizes}", "train.views_grow_at=null"]


@dataclass(frozen=True)
class Peer:
    """Training of another project, as its own recipe builds it."""

    build_step: Callable
    loaders: dict[str, Callable]
    """`build_loader` by kind of `Loading`."""
    mixed: bool = False
    """bf16 where the hardware multiplies it."""
    channels_last: bool = False
    checkout: bool = False
    """True where it comes from a checkout, whose path its functions take."""

    def candidates(self) -> list[Loading]:
        """Returns the choices of a trial: PIL with up to a worker a core, DALI with a thread a core."""
        cores = len(os.sched_getaffinity(0))
        counts = {"PIL": sorted({0, 1, max(cores // 2, 1), cores}), "DALI": [cores]}
        return [Loading(kind, workers) for kind in self.loaders for workers in counts[kind]]

    def build(
        self, config: Config, source: ImageSource, device: torch.device, checkout: Path | None, loading: Loading
    ) -> Contestant:
        """Raises `AbsentError` where it cannot run here."""
        more = (checkout,) if self.checkout else ()
        dtype = choose_precision("auto", device) if self.mixed else torch.float32
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        numbers = {"precision": autocast(device, dtype), "memory_format": memory_format}
        step = self.build_step(config, initial_weights(config, device), device, *more, **numbers)
        paths = [str(source.path(index)) for index in range(len(source))]
        numbers = {"batch_size": config.train.batch_size, "workers": loading.workers, "device": device}
        loader = self.loaders[loading.kind](paths, *more, groups=config.view_groups, **numbers)
        (group,) = config.view_groups

        def epoch(_number):
            for batch in loader:
                yield torch.cat([view.to(device, non_blocking=True) for view in batch[: group.count]])

        facts = {
            "precision": "bf16" if dtype == torch.bfloat16 else "fp32",
            "memory_format": CHANNELS_LAST if self.channels_last else "contiguous",
            "compiled": False,
            "loader": str(loading),
        }
        contestant = Contestant(step, epoch, step.model, step.encoder, step.optimizer, facts)
        contestant.before = getattr(step, "before", contestant.before)
        return contestant


PEERS = {
    "authors": Peer(authors.build_step, {"PIL": authors.build_loader}),
    "lightly": Peer(lightly.build_step, {"PIL": lightly.build_loader}),
    "lightly + bf16 + channels-last": Peer(
        lightly.build_step, {"PIL": lightly.build_loader}, mixed=True, channels_last=True
    ),
    "solo-learn": Peer(
        solo_learn.build_step, {"PIL": solo_learn.build_loader}, mixed=True, channels_last=True, checkout=True
    ),
    "solo-learn DALI": Peer(
        solo_learn.build_step, {"DALI": solo_learn.build_dali_loader}, mixed=True, channels_last=True, checkout=True
    ),
}
CONTESTANTS = (*OURS, *PEERS)

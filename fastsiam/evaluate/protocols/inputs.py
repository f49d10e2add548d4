"""Encoder, images, device and precision of an evaluation, from its command line."""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fastsiam.config.schema import TrainConfig
from fastsiam.config.views import IMAGENET_MEAN, IMAGENET_STD, ViewSpec
from fastsiam.data.build import open_evaluation_loader
from fastsiam.data.loader import EvaluationLoader
from fastsiam.data.skip_list import SkipList
from fastsiam.data.sources.image_header import UNREADABLE
from fastsiam.data.sources.levels import Levels
from fastsiam.data.sources.open import check_labels, open_source
from fastsiam.data.sources.source import ImageSource
from fastsiam.errors import UserError
from fastsiam.evaluate.protocols.arguments import check_numbers
from fastsiam.models.encoder import build_encoder
from fastsiam.models.weights import not_finite
from fastsiam.run.encoder_file import load_encoder
from fastsiam.runtime.distributed import World
from fastsiam.runtime.runtime import Runtime

# With momentum 0.1 they leave 7 % of the initial running statistics.
FILL_BATCHES = 25


@dataclass(frozen=True)
class Inputs:
    """What a protocol works on: a frozen encoder in evaluation mode on its device, and how it is fed."""

    encoder: nn.Module
    """Images [B, 3, S, S] to features [B, D]; `num_features` is D."""
    origin: dict
    """`path` as given, `untrained`, and the encoder's own `description`."""
    folder: Path | None
    """The run folder that the encoder comes from; None for a lone file."""
    spec: ViewSpec
    """Size and normalisation of the views."""
    crop_ratio: float
    runtime: Runtime
    arguments: argparse.Namespace

    def say(self, line: str) -> None:
        """Prints a line on stderr, on the first rank alone."""
        if self.runtime.world.is_first:
            print(line, file=sys.stderr, flush=True)

    def source(self, location: str, key: str, levels: str | Levels = "scale") -> ImageSource:
        """The images at `location`; `key` (`--train`) begins the messages of errors.

        `levels`: those of other images, where deep pixels must be scaled alike.
        """
        return open_source(
            os.path.expanduser(location), key, max_bad_fraction=self.arguments.max_bad_fraction, levels=levels
        )

    def labelled(self, what: str = "kNN") -> tuple[ImageSource, ImageSource, torch.Tensor]:
        """The images of --train and --val, and [C_val] int64: the label in --train of each class of --val.

        Raises `UserError` where one has no labels, which `what` needs, and for classes of --val that --train lacks.
        """
        train = self.source(self.arguments.train, "--train")
        val = self.source(self.arguments.val, "--val", train.levels if train.levels.ranges else "scale")
        check_labels(train, val, keys=("--train", "--val"), what=what)
        return train, val, torch.tensor([train.classes.index(name) for name in val.classes])

    def skip_list(self, source: ImageSource) -> SkipList:
        """The excluded images of a source; reading stops where more than --max-bad-fraction fail to decode."""
        known, most = source.kinds >= UNREADABLE, self.arguments.max_bad_fraction
        return SkipList(len(source), most, known, location=str(source.root), key="--max-bad-fraction")

    @torch.no_grad()
    def fill_statistics(self, source: ImageSource) -> None:
        """With --untrained: batch-norm statistics from images of `source`, the training images; else nothing.

        Without them a random network's features are those of no network: they alone move its kNN.
        """
        if not self.arguments.untrained:
            return
        loader = self.loader(source)
        whole = len(source) // loader.batch_size * loader.batch_size
        order = np.random.default_rng(self.arguments.seed).permutation(len(source))[:whole]
        batches = chain.from_iterable(loader.batches(order) for _ in range(FILL_BATCHES))
        self.encoder.train()
        for batch in islice(batches, FILL_BATCHES):
            with self.runtime.autocast():
                self.encoder(batch.images)
        self.encoder.eval()
        loader.backend.close()

    def loader(self, source: ImageSource) -> EvaluationLoader:
        """Each image once, in the source's order, as the encoder expects it."""
        asked = self.arguments
        return open_evaluation_loader(
            source,
            self.spec,
            batch_size=asked.batch_size,
            crop_ratio=self.crop_ratio,
            backend=asked.backend,
            workers=asked.workers,
            skip=self.skip_list(source),
            device=self.runtime.device,
            dtype=self.runtime.dtype,
        )


@contextlib.contextmanager
def opened(arguments: argparse.Namespace, world: World | None = None) -> Iterator[Inputs]:
    """The inputs of a protocol, with its device in force inside the block.

    Raises `UserError` for a mistake, among them results that could not be written; writes nothing.
    """
    check_numbers(arguments)
    encoder = load_encoder(arguments.encoder)
    description = encoder.description
    if bad := not_finite(encoder.state_dict()):
        raise UserError(
            f"ENCODER: {arguments.encoder} holds NaN or infinite values in {bad[0]}; take an earlier checkpoint",
            "weights-not-finite",
        )
    size = arguments.size or description.get("size")
    if size is None:
        raise UserError(f"--size: {arguments.encoder} does not say its view size; give --size", "no-size")
    folder = arguments.encoder if arguments.encoder.is_dir() else arguments.encoder.parent
    folder = folder if (folder / "config.yaml").is_file() else None
    check_writable(arguments, folder)
    mean, std = encoder.mean or IMAGENET_MEAN, encoder.std or IMAGENET_STD
    if arguments.untrained:
        torch.manual_seed(arguments.seed)
        encoder = build_encoder(*(description[key] for key in ("encoder", "stem", "width")), zero_init_residual=False)
    asked = TrainConfig(batch_size=2, epochs=1, device=arguments.device, precision=arguments.precision, compile="off")
    runtime = Runtime.of(asked, world)
    with runtime:
        encoder = encoder.eval().requires_grad_(False).to(runtime.device, memory_format=torch.channels_last)
        given = arguments.crop_ratio or description.get("crop_ratio") or 0.875
        origin = {"path": str(arguments.encoder), "untrained": arguments.untrained, "description": description}
        spec = ViewSpec(size=size, color="exact", mean=mean, std=std)
        yield Inputs(encoder, origin, folder, spec, given, runtime, arguments)


def folder_of_results(arguments: argparse.Namespace, run_folder: Path | None) -> Path | None:
    """--out, or evaluate/ in the encoder's run folder; None for a lone file."""
    return getattr(arguments, "out", None) or (run_folder and run_folder / "evaluate")


def check_writable(arguments: argparse.Namespace, run_folder: Path | None) -> None:
    """Raises `UserError` where the folder of the results is a file or lies where nothing may be written."""
    folder = folder_of_results(arguments, run_folder)
    # Other commands write a file, wherever they are told.
    if folder is None or not getattr(arguments, "has_results_folder", False):
        return
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "is not a folder" if not there.is_dir() else "may not be written"
        raise UserError(f"--out: {there} {why}; give a folder for the results with --out", "out-unwritable")

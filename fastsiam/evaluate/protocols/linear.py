"""Linear evaluation: top-1 of a linear classifier on the frozen encoder, trained as SimSiam's authors train theirs.

Section 4 of the paper and the authors' code: 90 epochs of random crops of 8 to 100 % of the area and flips, batch 4096,
LARS (LARC, trust 0.001) around SGD with momentum 0.9, no weight decay, a cosine that changes between epochs, weights
from N(0, 0.01), biases from 0. Their code has the learning rate 0.1 x batch / 256, the paper says 0.02. The encoder is
in evaluation mode throughout. `--cached` runs it over a few augmented passes alone, and trains on what it has kept.
"""

import argparse
import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from fastsiam.config.views import ViewGroup, ViewSpec
from fastsiam.data import rng
from fastsiam.data.build import open_training_loader, workers_of
from fastsiam.data.loader import check_divides
from fastsiam.data.sources.source import ImageSource
from fastsiam.errors import UserError
from fastsiam.evaluate.linear_features import AT_ONCE, Cached, Streamed, centre_features, decoded_at_once
from fastsiam.evaluate.linear_training import Epoch, LinearTraining, Rule, Sweep
from fastsiam.evaluate.protocols.arguments import add_encoder_arguments, add_labelled_arguments, check_least
from fastsiam.evaluate.protocols.inputs import Inputs, opened
from fastsiam.evaluate.protocols.result import publish, results_folder
from fastsiam.run.weight_files import sha256_of_tensors
from fastsiam.runtime.distributed import World

# Share of the training images on which a sweep chooses its head.
HELD_OUT = 0.1
PASSES = 4
STOPPED = "stopped; with a folder for results and without --cached the same command goes on after the last whole epoch"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_encoder_arguments(parser)
    add_labelled_arguments(parser)
    parser.set_defaults(batch_size=4096)
    parser.add_argument("--epochs", type=int, default=90, metavar="E", help="(%(default)s)")
    text = (
        "learning rate for a batch of 256, or several with commas, which are trained at once; B images take "
        "LR x B / 256 (%(default)s, of the authors' code; their paper says 0.02)"
    )
    parser.add_argument("--lr", default="0.1", metavar="LR[,LR...]", help=text)
    text = "weight decay, or several with commas, each with every learning rate (%(default)s)"
    parser.add_argument("--weight-decay", default="0", metavar="WD[,WD...]", help=text)
    text = "lars: LARC around SGD as the authors have it, bias included; sgd: momentum 0.9 alone (%(default)s)"
    parser.add_argument("--optimizer", choices=("lars", "sgd"), default="lars", help=text)
    text = "keep the features of a few augmented passes in memory: the encoder runs over these alone"
    parser.add_argument("--cached", action="store_true", help=text)
    text = f"with --cached, augmented passes over --train ({PASSES}), which the epochs take in turn"
    parser.add_argument("--passes", type=int, metavar="P", help=text)


def run(arguments: argparse.Namespace) -> dict:
    """The result's line; under torchrun that of all ranks, which the first prints and writes."""
    sweep = sweep_of(arguments)
    world = World.of_environment()
    with world.joined(arguments.device):
        return measure(arguments, sweep, world)


def measure(arguments: argparse.Namespace, sweep: Sweep, world: World) -> dict:
    """As `run`, for ranks that have joined."""
    began = time.perf_counter()
    with ExitStack() as stack:
        with world.together():
            check_divides(sweep.batch_size, world.size)
            inputs = stack.enter_context(opened(for_decoding(arguments, world), world))
            task = Task(inputs, sweep, *inputs.labelled("linear evaluation"))
            task.check_batch_size()
            inputs.fill_statistics(task.train)
            features = task.features()
            training = LinearTraining(
                sweep, inputs.encoder.num_features, len(task.train.classes), inputs.runtime, task.state_path()
            )
        training.resume()
        if training.epoch:
            inputs.say(f"resume    after epoch {training.epoch}")
        held_out, queries = task.held_out(), task.queries()
        if isinstance(features, Cached):
            features.fill(lambda done: inputs.say(f"pass {done}/{arguments.passes or PASSES}"))
        masked = torch.zeros(len(task.train), dtype=torch.bool)
        masked[held_out] = True
        training.train(features, queries, masked.to(inputs.runtime.device), task.report)
        scores = training.scores(*task.centre(task.train, held_out)) if training.choosing else None
        line = task.line(training, queries, scores, features.decoder, time.perf_counter() - began)
        with world.together():
            if world.is_first:
                line = publish(**line)
        training.forget()
        return line


@dataclass(frozen=True)
class Task:
    """The images of a linear evaluation, and what is said of it."""

    inputs: Inputs
    sweep: Sweep
    train: ImageSource
    val: ImageSource
    val_label: torch.Tensor
    """[C_val] int64: label in `train` of each class of `val`."""

    def check_batch_size(self) -> None:
        """Raises `UserError` for a batch that the training images cannot fill."""
        asked, images = self.sweep.batch_size, len(self.train)
        if asked > images:
            raise UserError(
                f"--batch-size: {asked} is more than the {images:,} images of --train; set --batch-size "
                f"{1 << (images.bit_length() - 1)} or less (the learning rate follows: --lr x batch / 256)",
                "batch-too-large",
            )

    def features(self) -> Streamed | Cached:
        """Features of the training images; those to keep are not filled yet."""
        asked, encoder, runtime, spec = (
            self.inputs.arguments,
            self.inputs.encoder,
            self.inputs.runtime,
            self.inputs.spec,
        )
        world, batch_size = runtime.world, self.sweep.batch_size
        loader = open_training_loader(
            self.train,
            (ViewGroup(1, training_view(spec)),),
            batch_size=decoded_at_once(len(self.train), None if asked.cached else batch_size, world.size),
            seed=self.sweep.seed,
            backend=asked.backend,
            workers=asked.workers,
            skip=self.inputs.skip_list(self.train),
            device=runtime.device,
            dtype=runtime.dtype,
            rank=world.rank,
            world_size=world.size,
        )
        if asked.cached:
            return Cached(encoder, loader, batch_size, runtime, asked.passes or PASSES)
        return Streamed(encoder, loader, batch_size, runtime)

    def queries(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Features of this rank's part of the validation images, and their labels in `train`."""
        features, labels = self.centre(self.val, np.flatnonzero(self.val.labels >= 0))
        return features, self.val_label.to(labels.device)[labels]

    def centre(self, source: ImageSource, images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Features of the centred crops of this rank's part of some images, and their labels."""
        return centre_features(self.inputs.encoder, self.inputs.loader(source), images, self.inputs.runtime)

    def held_out(self) -> np.ndarray:
        """Training images on which a sweep chooses: a tenth of them, by the seed; none for a single head."""
        if len(self.sweep.rules) == 1:
            return np.empty(0, np.int64)
        chosen = rng.probe_indices(self.sweep.seed, len(self.train), max(1, round(HELD_OUT * len(self.train))))
        return chosen[self.train.labels[chosen] >= 0]

    def state_path(self) -> Path | None:
        """File in the folder of the results for the state after each epoch; its name is a hash of what it belongs to.

        None with cached features, which would have to be made again, and without such a folder.
        """
        folder = None if self.inputs.arguments.cached else results_folder(self.inputs)
        if folder is None:
            return None
        sources = [source.fingerprint() for source in (self.train, self.val)]
        views = [repr(self.inputs.spec), self.inputs.crop_ratio]
        weights = sha256_of_tensors(self.inputs.encoder.state_dict())
        facts = [repr(self.sweep), *views, *sources, self.inputs.runtime.names, weights]
        digest = hashlib.sha256(json.dumps(facts).encode() + self.train.labels.tobytes() + self.val.labels.tobytes())
        return folder / f"linear-{digest.hexdigest()[:12]}.pt"

    def report(self, epoch: Epoch) -> None:
        """A line on stderr after an epoch."""
        low, high = min(epoch.val_top1), max(epoch.val_top1)
        top1 = (
            f"{low:.2f} %"
            if len(epoch.val_top1) == 1
            else f"{low:.2f} to {high:.2f} % of {len(self.sweep.rules)} heads"
        )
        finite = [loss for loss in epoch.losses if math.isfinite(loss)]
        loss = f"{min(finite):.4f}" if finite else "not finite"
        self.inputs.say(
            f"epoch {epoch.number}/{self.sweep.epochs}  lr {epoch.scale * max(self.sweep.rates):.4g}  loss {loss}  "
            f"val {top1}  {epoch.images / max(epoch.seconds, 1e-9):,.0f} images/s"
        )

    def line(
        self, training: LinearTraining, queries: tuple, scores: list[float] | None, decoder: str, seconds: float
    ) -> dict:
        """Arguments of `publish`; all ranks must call. `scores`: of the heads on the images held out."""
        sweep, asked = self.sweep, self.inputs.arguments
        chosen = 0 if scores is None else int(np.argmax(scores))
        heads = [
            {**rule._asdict(), "lr": rate, "top1_held_out": score, "top1": top1, "top5": top5}
            | {"best_top1": best, "best_epoch": number}
            for rule, rate, score, top1, top5, (best, number) in zip(
                sweep.rules,
                sweep.rates,
                scores or [None],
                *training.heads.accuracy(*queries, top=(1, 5)),
                training.best,
                strict=True,
            )
        ]
        table = [
            {
                "base lr": f"{head['base_lr']:g}" + " *" * (number == chosen),
                "weight decay": f"{head['weight_decay']:g}",
                "held out, %": head["top1_held_out"],
                f"last epoch ({sweep.epochs}), %": head["top1"],
                "top-5, %": head["top5"],
                "best epoch, %": head["best_top1"],
                "which": head["best_epoch"],
            }
            for number, head in enumerate(heads)
        ]
        passes = f", {asked.passes or PASSES} cached passes" if asked.cached else ""
        settings = {
            "epochs": sweep.epochs,
            "batch": sweep.batch_size,
            "optimizer": sweep.optimizer,
            **{key: heads[chosen][key] for key in ("base_lr", "lr", "weight_decay")},
            "epoch": "last",
            "features": f"offline{passes}",
            "chosen_on": None if scores is None else f"{HELD_OUT:.0%} of --train, held out",
        }
        numbers = {key: heads[chosen][key] for key in ("top1", "top5", "best_top1", "best_epoch")}
        if len(self.train.classes) <= 5:
            del numbers["top5"]
        data = {
            "train": str(self.train.root),
            "val": str(self.val.root),
            "train_images": int((self.train.labels >= 0).sum()),
            "val_images": int((self.val.labels >= 0).sum()),
            "classes": len(self.train.classes),
            "decoder": decoder,
        }
        result = {
            "protocol": "linear",
            "settings": settings,
            "numbers": numbers | {"seconds": seconds},
            "inputs": self.inputs,
            "data": data,
        }
        return {**result, "table": table, "details": {"heads": heads}}


def training_view(spec: ViewSpec) -> ViewSpec:
    """The authors' augmentation for linear evaluation: a random resized crop of 8 to 100 % of the area, and a flip."""
    return replace(spec, color="matrix", crop_scale=(0.08, 1.0), flip=0.5, jitter=0.0, grayscale=0.0, blur=0.0)


def for_decoding(arguments: argparse.Namespace, world: World) -> argparse.Namespace:
    """The arguments with a batch as the decoder makes it, and with this rank's share of the cores as its workers."""
    workers = workers_of(arguments.workers, world)
    return argparse.Namespace(**{**vars(arguments), "batch_size": AT_ONCE, "workers": workers})


def sweep_of(arguments: argparse.Namespace) -> Sweep:
    """The heads that are asked for. Raises `UserError` for numbers out of range."""
    check_least(arguments, epochs=1, batch_size=1, passes=1)
    if arguments.passes is not None and not arguments.cached:
        raise UserError("--passes: has a meaning with --cached only; add --cached, or leave it out", "passes-uncached")
    rates = _numbers(arguments.lr, "--lr", "0.01,0.03,0.1", lambda value: value > 0, "above 0")
    decays = _numbers(arguments.weight_decay, "--weight-decay", "0,1e-6", lambda value: value >= 0, "at least 0")
    rules = tuple(Rule(rate, decay) for rate, decay in itertools.product(rates, decays))
    return Sweep(rules, arguments.optimizer, arguments.batch_size, arguments.epochs, arguments.seed)


def _numbers(text: str, key: str, example: str, fits: Callable[[float], bool], bound: str) -> list[float]:
    """Different numbers between commas, in their order."""
    found = {}
    for word in text.split(","):
        try:
            value = float(word)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and fits(value)):
            raise UserError(f"{key}: '{word}' is not a number {bound}; write for example {key} {example}", "no-number")
        found[value] = None
    return list(found)

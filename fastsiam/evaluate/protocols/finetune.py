"""Fine-tune an encoder with all labels, or with a part of them (semi-supervised), and measure its accuracy.

Writes FOLDER/finetune-LABELS/: model.safetensors, the list of images whose labels were used, and a checkpoint after
each epoch, from which the same command goes on. Under torchrun several processes share each batch.
"""

import contextlib
import hashlib
import json
import math
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from fastsiam.config.views import ViewGroup
from fastsiam.data.backends.choose import choose_backend
from fastsiam.data.build import open_training_loader, workers_of
from fastsiam.data.labelled_subset import Subset, listed, share_of_labels, write_list
from fastsiam.data.loader import EvaluationLoader, Loader
from fastsiam.data.sources.source import ImageSource
from fastsiam.errors import UserError
from fastsiam.evaluate.protocols import finetune_settings
from fastsiam.evaluate.protocols.arguments import add_encoder_arguments, add_labelled_arguments
from fastsiam.evaluate.protocols.classifier import FILE, Classifier, save_classifier
from fastsiam.evaluate.protocols.finetune_folder import FinetuneFolder
from fastsiam.evaluate.protocols.finetune_settings import Settings, check_settings, parse_labels, resolve
from fastsiam.evaluate.protocols.finetune_training import FineTuning, accuracy, not_finite
from fastsiam.evaluate.protocols.inputs import Inputs, folder_of_results, opened
from fastsiam.evaluate.protocols.result import publish, written
from fastsiam.run.progress_line import ProgressLine
from fastsiam.run.weight_files import sha256_of_tensors
from fastsiam.runtime.distributed import World
from fastsiam.runtime.rank_check import check_alike

STOPPED = "stopped; the same command goes on after the last whole epoch"
"""At Ctrl-C."""

# RandomResizedCrop of 8 to 100 % and a flip, as in all of the published protocols.
_PLAIN = {"crop_scale": (0.08, 1.0), "flip": 0.5, "jitter": 0.0, "grayscale": 0.0, "blur": 0.0, "solarize": 0.0}


def add_arguments(parser: ArgumentParser) -> None:
    """ENCODER, --train, --val, --labels, the settings, --fresh."""
    add_encoder_arguments(parser, batch_size=None)
    add_labelled_arguments(parser)
    finetune_settings.add_arguments(parser)
    parser.add_argument("--fresh", action="store_true", help="start over where an earlier fine-tuning was begun")


def run(arguments: Namespace, world: World | None = None) -> dict | None:
    """Fine-tunes, or goes on where an earlier start has stopped; returns the result's line on the first rank.

    `world`: ranks that have joined; None for those of the environment.
    """
    with contextlib.ExitStack() as stack:
        if world is None:
            world = World.of_environment()
            stack.enter_context(world.joined(arguments.device))
        with world.together():
            check_settings(arguments)
            labels = parse_labels(arguments.labels)
            inputs = stack.enter_context(opened(arguments, world))
        data = Data.open(inputs, labels)
        with world.together():
            folder = _folder(inputs, data, labels)
        check_alike(world, folder.terms)
        with world.together():
            stack.enter_context(folder.entered() if world.is_first else contextlib.nullcontext())
        return _finetune(inputs, data, folder)


@dataclass(frozen=True)
class Data:
    """Images, the part of them whose labels are used, and how a classifier is trained on it."""

    source: ImageSource
    val: ImageSource
    label_of: torch.Tensor
    """[C_val] int64: the label in `source` of each class of `val`."""
    subset: Subset
    settings: Settings
    notes: tuple[str, ...]

    @classmethod
    def open(cls, inputs: Inputs, labels: float | Path) -> "Data":
        """The images of --train and --val; all ranks must call. Raises `UserError` where they are not fit."""
        world, asked = inputs.runtime.world, inputs.arguments
        with world.together(), world.leader_first():
            source, val, label_of = inputs.labelled("fine-tuning")
            if isinstance(labels, Path):
                subset = listed(labels, source, "--labels")
            else:
                subset = share_of_labels(source, labels, asked.seed)
            labelled = int((source.labels >= 0).sum())
            settings, notes = resolve(asked, len(subset.indices), labelled, world.size)
        asked.workers = workers_of(asked.workers, world)
        asked.batch_size = settings.batch_size // world.size
        return cls(source, val, label_of, subset, settings, (*subset.notes, *notes))

    def loaders(self, inputs: Inputs) -> tuple[Loader, EvaluationLoader]:
        """Augmented views of the chosen images, and centred crops of all of --val."""
        runtime, asked = inputs.runtime, inputs.arguments
        train = open_training_loader(
            self.source,
            (ViewGroup(1, replace(inputs.spec, **_PLAIN)),),
            batch_size=self.settings.batch_size,
            seed=asked.seed,
            backend=asked.backend,
            workers=asked.workers,
            skip=inputs.skip_list(self.source),
            device=runtime.device,
            dtype=runtime.dtype,
            rank=runtime.world.rank,
            world_size=runtime.world.size,
            among=self.subset.indices,
        )
        return train, inputs.loader(self.val)


def _folder(inputs, data, labels):
    """The folder of this fine-tuning, and the terms on which it may be resumed."""
    asked = inputs.arguments
    settings = {key.replace("_", "-"): value for key, value in asdict(data.settings).items()}
    terms = {
        **{f"--{key}": value for key, value in settings.items()},
        "--seed": asked.seed,
        "--size": inputs.spec.size,
        "--crop-ratio": inputs.crop_ratio,
        "--precision": inputs.runtime.names["dtype"],
        "--backend": choose_backend(asked.backend, data.source.root)[0],
        "ENCODER": sha256_of_tensors(inputs.encoder.state_dict()),
        "--train": data.source.fingerprint(),
        "--val": data.val.fingerprint(),
        "--labels": hashlib.sha256(data.subset.indices.tobytes()).hexdigest(),
    }
    name = f"finetune-{labels.stem if isinstance(labels, Path) else asked.labels.replace('%', 'pct')}"
    results = folder_of_results(asked, inputs.folder)
    if results is None:
        text = f"--out: {asked.encoder} is not in a run's folder; give a folder for the fine-tuned model"
        raise UserError(text, "no-out")
    return FinetuneFolder(results / (name + "-untrained" * asked.untrained), terms)


def _finetune(inputs, data, folder):
    world, runtime = inputs.runtime.world, inputs.runtime
    speaker = Speaker(world)
    with world.together():
        saved = folder.saved(inputs.arguments.fresh) if world.is_first else None
    saved = world.share(saved)
    if saved and saved.get("line"):
        speaker.say(f"done before: this is the result in {folder.path}; --fresh trains anew")
        if world.is_first:
            print(saved["line"], flush=True)
        return json.loads(saved["line"]) if world.is_first else None
    for line in _opening(inputs, data, folder):
        speaker.say(line)
    torch.manual_seed(inputs.arguments.seed)
    model = Classifier(inputs.encoder, len(data.source.classes)).to(runtime.device, memory_format=torch.channels_last)
    with world.together():
        training = FineTuning(model, data.settings, runtime, inputs.arguments.seed)
    history = []
    if saved:
        training.load_state_dict(saved)
        history = saved["history"]
        speaker.say(f"resumed   after epoch {len(history)} of {data.settings.epochs}")
    with world.together():
        if world.is_first:
            with written(folder.list_path):
                write_list(folder.list_path, data.source, data.subset.indices)
        loaders = data.loaders(inputs)
    try:
        _train(training, data, loaders, folder, history, speaker)
    finally:
        speaker.close()
        for loader in loaders:
            loader.backend.close()
    if not world.is_first:
        return None
    save_classifier(model, _description(inputs, data), folder.path / FILE)
    line = _publish(inputs, data, loaders[0], folder, history)
    # The weights are in the file of the model; a rerun prints the line.
    folder.save({"history": history, "line": json.dumps(line)})
    return line


def _train(training, data, loaders, folder, history, speaker):
    """The epochs that are left, with a checkpoint after each; `history` gets a line for each."""
    runtime, settings, (train, val) = training.runtime, data.settings, loaders
    world, steps = runtime.world, train.steps_per_epoch
    for epoch in range(len(history), settings.epochs):
        began = time.perf_counter()
        batches = train.epoch(epoch)
        loss = training.epoch(epoch, batches, steps, speaker.showing(epoch, settings.epochs, steps))
        seconds = time.perf_counter() - began
        with world.together():
            if not math.isfinite(loss):
                raise not_finite("loss", settings, epoch)
        found = accuracy(training.model, val, data.label_of, runtime)
        with world.together():
            if not found.pop("finite"):
                raise not_finite("output", settings, epoch)
        history.append({"epoch": epoch + 1, "loss": loss, **found})
        best = max(history, key=lambda line: line["top1"])
        speaker.say(
            f"epoch {epoch + 1}/{settings.epochs}  loss {loss:.4f}  top-1 {found['top1']:.2f} % (best "
            f"{best['top1']:.2f} % in epoch {best['epoch']})  {steps * settings.batch_size / seconds:,.0f} img/s"
        )
        with world.together():
            if world.is_first:
                folder.save(training.state_dict() | {"history": history})


def _opening(inputs, data, folder):
    settings, images = data.settings, len(data.subset.indices)
    classes = np.bincount(data.source.labels[data.subset.indices], minlength=len(data.source.classes))
    low, high = int(classes.min()), int(classes.max())
    yield (
        f"labels    {images:,} of {len(data.source):,} images, {low if low == high else f'{low} to {high}'} in each of "
        f"{len(classes):,} classes; {len(data.val):,} for validation"
    )
    head = f"{settings.head_lr:g} of the new layer, {settings.schedule}"
    yield (
        f"training  {settings.epochs} epochs x {images // settings.batch_size} steps of {settings.batch_size}, "
        f"learning rate {settings.lr:g}, {head} (preset {settings.preset})"
    )
    yield f"folder    {folder.path}: rerun the same command to go on after an interruption"
    yield from (f"note      {note}" for note in data.notes)


def _description(inputs, data):
    """The encoder's own description with what the classifier adds; how to feed it is that of this evaluation."""
    return {
        **inputs.origin["description"],
        "mean": list(inputs.spec.mean),
        "std": list(inputs.spec.std),
        "size": inputs.spec.size,
        "crop_ratio": inputs.crop_ratio,
        "classes": list(data.source.classes),
        "knn": None,
        "finetuned": {
            **asdict(data.settings),
            "images": len(data.subset.indices),
            "seed": inputs.arguments.seed,
            "untrained": inputs.arguments.untrained,
        },
    }


def _publish(inputs, data, loader, folder, history):
    last, best = history[-1], max(history, key=lambda line: line["top1"])
    images, labelled = len(data.subset.indices), int((data.source.labels >= 0).sum())
    settings = {
        "labels": inputs.arguments.labels,
        "epoch": "last",
        **asdict(data.settings),
        "seed": inputs.arguments.seed,
        "ranks": inputs.runtime.world.size,
    }
    numbers = {
        **{name: last[name] for name in ("top1", "top5") if name in last},
        "best_top1": best["top1"],
        "best_epoch": best["epoch"],
        "loss": last["loss"],
    }
    about = {
        "train": inputs.arguments.train,
        "val": inputs.arguments.val,
        "train_images": len(data.source),
        "labelled_images": images,
        "label_share": round(images / labelled, 6),
        "list": str(folder.list_path),
        "val_images": last["images"],
        "classes": len(data.source.classes),
        "decoder": loader.backend.description,
        "model": str(folder.path / FILE),
    }
    return publish("finetune", settings, numbers, inputs, about)


class Speaker:
    """Lines of the first rank on stderr, with a progress line between those of epochs; other ranks are silent."""

    def __init__(self, world: World):
        self._console = Console(stderr=True, highlight=False, quiet=not world.is_first)
        self._progress: ProgressLine | None = None

    def say(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, markup=False)

    def showing(self, epoch: int, epochs: int, steps: int) -> Callable[[int, Callable[[], float]], None]:
        """A function for the number of finished steps of an epoch, and the mean loss of it so far."""
        if self._progress is None:
            self._progress = ProgressLine(self._console, "decoding the first batch")

        def show(step: int, loss: Callable[[], float]) -> None:
            if not self._console.quiet and self._progress.is_due():
                text = f"epoch {epoch + 1}/{epochs}  step {step}/{steps}  loss {loss():.4f}"
                self._progress.show((epoch + step / steps) / epochs, text)

        return show

    def close(self) -> None:
        if self._progress is not None:
            self._progress.close()
            self._progress = None

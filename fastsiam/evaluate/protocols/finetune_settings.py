"""Options of fine-tuning, and the published settings that they change."""

import argparse
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fastsiam.errors import UserError
from fastsiam.optim.build import scale_at

# Rates of the settings below are for so many images, and scale with the batch (Goyal et al. 2017).
REFERENCE = 256
# The share of labels up to which the settings for 1 % are taken.
FEW = 0.03
SCHEDULES = ("step", "cosine", "constant")
# SwAV's code: times 0.2 after 12 and 16 of 20 epochs.
STEPS, STEP_FACTOR = (0.6, 0.8), 0.2
MOMENTUM = 0.9


@dataclass(frozen=True)
class Settings:
    """How a classifier is trained. SGD with momentum 0.9, which decays every parameter."""

    preset: str
    epochs: int
    batch_size: int
    """Of all ranks."""
    lr: float
    """Of the encoder's last block."""
    head_lr: float
    schedule: str
    nesterov: bool
    weight_decay: float = 0.0
    layer_decay: float = 1.0
    """Factor of the rate from each block to the one before it."""


PRESETS = {
    # SwAV (arXiv 2006.09882), eval_semisup.py of its authors and their README for 1 %: plain momentum.
    "swav": (
        Settings("swav", 20, 256, 0.02, 5.0, "step", False),
        Settings("swav", 20, 256, 0.01, 0.2, "step", False),
    ),
    # SimCLR (arXiv 2002.05709), appendix B.5.
    "simclr": (
        Settings("simclr", 60, 4096, 0.05, 0.05, "cosine", True),
        Settings("simclr", 30, 4096, 0.05, 0.05, "cosine", True),
    ),
}
"""Settings for few labels, and for more, with rates for 256 images. Neither paper has any for all labels."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--labels, --preset, and each of the settings."""
    text = (
        "share of --train's labels, balanced over the classes (1%%, 10%%, 100%%), or a text list of file names "
        "(%(default)s)"
    )
    parser.add_argument("--labels", metavar="SHARE|FILE", default="100%", help=text)
    text = "settings of a paper, which the options below change; below 3%% of the labels those for 1%% (%(default)s)"
    parser.add_argument("--preset", choices=PRESETS, default="swav", help=text)
    parser.add_argument("--epochs", type=int, metavar="N", help="(swav 20; simclr 60 for 1%%, 30 for more)")
    parser.add_argument("--lr", type=float, help="rate of the encoder (default: the preset's times batch / 256)")
    parser.add_argument("--head-lr", type=float, metavar="LR", help="rate of the new layer (default: likewise)")
    parser.add_argument("--weight-decay", type=float, metavar="X", help="of every parameter (0)")
    text = "factor of the rate from each block of the encoder to the one before it, in (0, 1] (1)"
    parser.add_argument("--layer-decay", type=float, metavar="X", help=text)
    text = "step: times 0.2 after 60 and 80%% of the epochs; cosine: to 0 (swav step, simclr cosine)"
    parser.add_argument("--schedule", choices=SCHEDULES, help=text)
    text = "Nesterov's momentum (simclr) or plain (swav); both are 0.9"
    parser.add_argument("--nesterov", action=argparse.BooleanOptionalAction, default=None, help=text)


def check_settings(arguments: argparse.Namespace) -> None:
    """Raises `UserError` for a number that is out of range."""
    positive = {"epochs": arguments.epochs, "lr": arguments.lr, "head-lr": arguments.head_lr}
    for name, value in (positive | {"layer-decay": arguments.layer_decay}).items():
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UserError(f"--{name}: {value:g} is not above 0", "out-of-range")
    if arguments.layer_decay is not None and arguments.layer_decay > 1:
        raise UserError(f"--layer-decay: {arguments.layer_decay:g} is not in (0, 1]", "out-of-range")
    if arguments.weight_decay is not None and not 0 <= arguments.weight_decay < math.inf:
        raise UserError(f"--weight-decay: {arguments.weight_decay:g} is below 0", "out-of-range")


def parse_labels(text: str) -> float | Path:
    """Returns a share in (0, 1], or the path of a list; raises `UserError` for what is neither."""
    path = Path(text).expanduser()
    if not text.endswith("%") or path.is_file():
        if path.is_file():
            return path
        cure = f", or {text}% for a share" if text.replace(".", "", 1).isdigit() else ", or a share such as 10%"
        raise UserError(f"--labels: there is no list {text}; give a text file with a file name a line{cure}", "absent")
    try:
        share = float(text[:-1]) / 100
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise UserError(f"--labels: {text} is not above 0% and at most 100%; give for example 10%", "out-of-range")
    return share


def resolve(arguments: argparse.Namespace, images: int, labelled: int, ranks: int) -> tuple[Settings, tuple[str, ...]]:
    """Settings for `images` of `labelled` ones on so many ranks, and sentences on what a user would not expect.

    Raises `UserError` where the images are too few for a batch.
    """
    preset = PRESETS[arguments.preset][images > FEW * labelled]
    asked = arguments.batch_size or preset.batch_size
    if asked < max(2, ranks):
        text = f"--batch-size: {asked} is too few for batch norm on {ranks} ranks; give {max(2, ranks)} or more"
        raise UserError(text, "batch-too-small")
    batch_size = min(asked, images) // ranks * ranks
    if batch_size < 2:
        many = "1 image has a label" if images == 1 else f"{images} images have labels"
        raise UserError(f"--labels: {many}, too few for a batch on {ranks} ranks; give more", "too-few-images")
    notes = ()
    if batch_size != asked:
        why = f"{images:,} images have labels" if images < asked else f"{ranks} ranks share a batch"
        notes = (f"a batch has {batch_size:,} images, not {asked:,}: {why}",)
    scale = batch_size / REFERENCE
    chosen = replace(preset, batch_size=batch_size, lr=preset.lr * scale, head_lr=preset.head_lr * scale)
    given = {name: getattr(arguments, name) for name in asdict(chosen) if name not in ("preset", "batch_size")}
    return replace(chosen, **{name: value for name, value in given.items() if value is not None}), notes


def factor(schedule: str, epoch: int, step: int, steps_per_epoch: int, epochs: int) -> float:
    """What a schedule makes of the first rate at a step of an epoch, both counted from 0."""
    if schedule == "step":
        return STEP_FACTOR ** sum(epoch / epochs >= share for share in STEPS)
    return scale_at((epoch + step / steps_per_epoch) / epochs, schedule, warmup=0.0)

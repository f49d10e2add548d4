"""Quality of features without labels: RankMe, effective rank, decay of the spectrum, uniformity and alignment.

Measured on images of --train, and on images of --val beside them where that is given. Labels are not read.
"""

import argparse
from dataclasses import replace

import numpy as np
import torch

from fastsiam.config import load_config
from fastsiam.config.views import ViewGroup, ViewSpec
from fastsiam.data.build import open_training_loader
from fastsiam.data.sources.source import ImageSource
from fastsiam.errors import UserError
from fastsiam.evaluate import spectrum
from fastsiam.evaluate.protocols.arguments import add_encoder_arguments, add_out_argument
from fastsiam.evaluate.protocols.features import Features, features
from fastsiam.evaluate.protocols.inputs import Inputs, opened
from fastsiam.evaluate.protocols.result import publish

# Images of which two views are compared.
PAIRS = 2048


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_encoder_arguments(parser)
    parser.add_argument(
        "--train", metavar="SRC", required=True, help="training images: folder, shards, list; no labels"
    )
    parser.add_argument("--val", metavar="SRC", help="other images, measured beside those of --train")
    text = "at most so many images of each, drawn by --seed (%(default)s)"
    parser.add_argument("--images", type=int, default=10_000, metavar="N", help=text)
    add_out_argument(parser)


def run(arguments: argparse.Namespace) -> None:
    if arguments.images < 2:
        raise UserError(f"--images: {arguments.images} is below 2", "out-of-range")
    with opened(arguments) as inputs:
        given = {key: getattr(arguments, key) for key in ("train", "val") if getattr(arguments, key)}
        sources = {key: inputs.source(location, f"--{key}") for key, location in given.items()}
        for key, source in sources.items():
            if len(source) < 2:
                raise UserError(f"--{key}: one image has no spectrum; give at least 2", "too-few-images")
        inputs.fill_statistics(sources["train"])
        view, recipe = _view(inputs)
        settings = {"epoch": "last", "features": "offline", "seed": arguments.seed, "views": recipe}
        numbers, data, columns = {}, {}, {}
        for key, source in sources.items():
            order = np.random.default_rng(arguments.seed).permutation(len(source))[: arguments.images]
            found = features(inputs, source, f"--{key}", np.sort(order))
            pairs = _two_views(inputs, source, view, order[:PAIRS])
            measured = _measure(found, pairs, key)
            prefix = "" if key == "train" else f"{key}_"
            numbers |= {f"{prefix}{name}": value for name, value in measured.items()}
            data |= {key: str(source.root), f"{key}_images": len(found.rows), f"{key}_pairs": len(pairs[0])}
            data["decoder"] = found.decoder
            columns[f"{len(found.rows):,} images of --{key}"] = measured
        table = [
            {"measure": name, **{head: measured[name] for head, measured in columns.items()}}
            for name in next(iter(columns.values()))
        ]
        publish("spectrum", {**settings, "dim": found.rows.shape[1]}, numbers, inputs, data, table)


def _measure(found: Features, pairs, key: str) -> dict:
    try:
        return spectrum.measure(found.rows, pairs).fields()
    except ValueError as error:
        raise UserError(f"--{key}: {error}; the encoder has diverged, or is not one", "features-not-finite") from error


def _view(inputs: Inputs) -> tuple[ViewSpec, str]:
    """The views that are aligned, and their name: those of the encoder's run, else a crop and a flip."""
    plain = {"jitter": 0.0, "grayscale": 0.0, "blur": 0.0, "solarize": 0.0, "color": "matrix"}
    try:
        config = load_config(inputs.folder / "config.yaml") if inputs.folder else None
    except UserError:
        config = None
    if config is None:
        return replace(inputs.spec, **plain), "random resized crop of 20 to 100 % and flip"
    spec = config.view_groups[0].spec
    return replace(spec, size=inputs.spec.size, mean=inputs.spec.mean, std=inputs.spec.std), config.views[0].recipe


@torch.no_grad()
def _two_views(inputs: Inputs, source: ImageSource, view: ViewSpec, chosen: np.ndarray):
    """Features [P, D] twice, of two views of each of the chosen images, but those of a last, incomplete batch."""
    asked, runtime = inputs.arguments, inputs.runtime
    loader = open_training_loader(
        source,
        (ViewGroup(2, view),),
        batch_size=min(asked.batch_size, len(chosen)),
        seed=asked.seed,
        backend=asked.backend,
        workers=asked.workers,
        skip=inputs.skip_list(source),
        device=runtime.device,
        dtype=runtime.dtype,
        among=np.sort(chosen),
    )
    parts = []
    for batch in loader.epoch(0):
        with runtime.autocast():
            parts.append(inputs.encoder(batch.views[0]).float().unflatten(0, (2, -1)))
    loader.close()
    first, second = torch.cat(parts, 1)
    return first, second

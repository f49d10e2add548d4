"""What all ranks of a run must have in common: another step, image or dtype on one would hang or spoil the others."""

import json
from dataclasses import replace
from pathlib import Path

from fastsiam.config import Config
from fastsiam.config.yaml_file import flat
from fastsiam.data.sources.levels import Levels
from fastsiam.data.sources.source import ImageSource
from fastsiam.errors import UserError
from fastsiam.runtime.distributed import World

# Where things lie may differ from machine to machine.
_LOCAL = ("data.train", "data.val", "data.workers", "data.manifest", "run.dir", "run.name")


def check_alike(world: World, facts: dict) -> None:
    """Raise `UserError` on all ranks where one of them has another fact than the first; all ranks must ask."""
    firsts = world.share(facts)
    with world.together():
        for name, mine in facts.items():
            if mine != firsts[name]:
                raise UserError(
                    f"{name}: {mine} here and {firsts[name]} on the first rank; all ranks must have the same"
                )


def facts_of_config(config: Config) -> dict:
    """Its keys, but for those that say where things lie."""
    return {key: value for key, value in flat(config.model_dump(mode="json")).items() if key not in _LOCAL}


def facts_of_images(train: ImageSource | None, val: ImageSource | None) -> dict:
    """How many images there are, and their names and sizes as a hash."""
    sources = {"images of data.train": train, "images of data.val": val}
    return {name: source and f"{len(source):,} ({source.fingerprint()[:8]})" for name, source in sources.items()}


def with_levels(world: World, run: Path | None, *sources: ImageSource | None) -> list[ImageSource | None]:
    """The sources with the ranges of deep pixels that the first rank has measured, or that a run began with.

    `run`: the folder of a run that goes on, whose environment.json holds them; None for a new one. All ranks must ask.
    """
    found = []
    for key, source in zip(("train_images", "val_images"), sources, strict=True):
        levels = world.share(_levels_of_run(source, run, key) if world.is_first and source is not None else None)
        found.append(source and replace(source, levels=levels))
    return found


def _levels_of_run(source, run, key):
    if run is None or source.levels.asked != "scale":
        return source.levels
    try:
        kept = json.loads((run / "environment.json").read_text(encoding="utf-8"))["deep_pixels"][key]
        return replace(source.levels, ranges={kind: (float(low), float(high)) for kind, (low, high) in kept.items()})
    except KeyError:
        # Earlier runs knew no other.
        return Levels("type")
    except (OSError, ValueError, TypeError):
        return source.levels

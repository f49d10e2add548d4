"""What all ranks of a run must have in common: another step, image or dtype on one would hang or spoil the others."""

from fastsiam.config import Config, UserError
from fastsiam.config_file import flat
from fastsiam.data.sources import ImageSource
from fastsiam.distributed import World

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

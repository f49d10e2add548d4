"""Checks that all ranks agree on config, data and dtype; a mismatch would deadlock or corrupt training."""

from fastsiam.config import Config
from fastsiam.config.yaml_file import flat
from fastsiam.errors import UserError
from fastsiam.runtime.distributed import World

# Where things lie may differ from machine to machine.
_LOCAL = ("data.train", "data.val", "data.workers", "data.manifest", "model.weights", "run.dir", "run.name")


def check_alike(world: World, facts: dict) -> None:
    """Raise `UserError` on all ranks where one of them has another fact than the first; all ranks must call."""
    firsts = world.share(facts)
    with world.together():
        for name, mine in facts.items():
            if mine != firsts[name]:
                raise UserError(
                    f"{name}: {mine} here and {firsts[name]} on the first rank; all ranks must have the same",
                    "ranks-differ",
                )


def facts_of_config(config: Config) -> dict:
    """Keys of a config, except those of places on this machine."""
    return {key: value for key, value in flat(config.model_dump(mode="json")).items() if key not in _LOCAL}

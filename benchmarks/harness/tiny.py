"""A benchmark at its smallest sizes on a CPU, to try scripts: `python -m benchmarks.harness.tiny NAME ...`."""

import sys
from importlib import import_module
from types import ModuleType


def small_sizes(name: str, module: ModuleType) -> dict[str, object]:
    """Returns the constants of a benchmark's module that make it small, by name."""
    return {
        "loss": lambda: {"BATCHES": {"cpu": (8,)}},
        "augment": lambda: {"CASES": {"cpu": module.CASES["cpu"][-1:]}},
        "crop": lambda: {"CASES": {"cpu": [module.Case(8, 32, 32)]}},
        "end_to_end": lambda: {"CONFIG": "r18_cifar10_800ep", "BATCH": {"cpu": 4}, "STEPS": {"cpu": 3}, "REPEATS": 3},
        "loader": lambda: {
            "IMAGES_PER_WORKER": 8, "BATCH": {"cpu": 4}, "SIZE": 32, "SMALL_SIZE": 16, "REPEATS": 3,
            "builders": _without_peers(module.builders),
        },
    }[name]()  # fmt: skip


def _without_peers(builders):
    """Their worker processes take half a minute to start."""
    return lambda *arguments: {
        name: build for name, build in builders(*arguments).items() if name in ("dali matrix", "authors")
    }


if __name__ == "__main__":
    name = sys.argv.pop(1)
    module = import_module(f"benchmarks.{name}")
    vars(module).update(small_sizes(name, module))
    sys.exit(module.command(module.run, name, module.__doc__, minutes=0.05))

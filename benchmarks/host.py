"""Host's CPU time for a step besides launching: draws, their table, the hand-over to DALI and back.

    python -m benchmarks.host --config r50_100ep --against COMMIT --out DIR

Boxes and augmentations are drawn by a thread beside the step, the rest is the main thread's. CPU time of the thread
that does it, so that a busy machine changes it little. The other commit takes turns with this code; the hand-over is
measured where its DALI backend has the same form.
"""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness.cli import command
from benchmarks.harness.results import Results
from benchmarks.harness.timing import Samples
from benchmarks.traffic.__main__ import worktree

BENCHMARK = "host"
ROUNDS, CALLS = 5, 20
HERE = Path(__file__).parents[1]


def run(
    results: Results,
    *,
    device: torch.device,
    minutes: float,
    config: str = "r50_100ep",
    batch: int = 512,
    against: str | None = None,
) -> None:
    """Writes a line for each part and for their sum, of this code and of the commit `against`."""
    trees = {"": HERE}
    with contextlib.ExitStack() as stack:
        if against is not None:
            trees[f" at {against}"] = stack.enter_context(worktree(against))
        write(results, config, batch, turns(trees, config, batch))


def turns(trees: dict[str, Path], config: str, batch: int) -> dict[str, dict[str, list[float]]]:
    """Seconds by tree and part; the trees take turns, a process each."""
    found: dict[str, dict[str, list[float]]] = {name: {} for name in trees}
    for _ in range(ROUNDS):
        for name, imports in trees.items():
            for part, seconds in measured(imports, config, batch).items():
                found[name].setdefault(part, []).extend(seconds)
    return found


def measured(imports: Path, config: str, batch: int) -> dict[str, list[float]]:
    """Seconds by part of the `fastsiam` in the folder `imports`."""
    arguments = [sys.executable, "-m", "benchmarks.variants.host", config, str(batch), str(CALLS)]
    environment = os.environ | {"PYTHONPATH": str(imports)}
    done = subprocess.run(arguments, cwd=imports, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def write(results: Results, config: str, batch: int, found: dict[str, dict[str, list[float]]]) -> None:
    """`found`: of `turns`; its names end those of the rows."""
    for name, of_parts in found.items():
        whole = np.sum(list(of_parts.values()), 0).tolist()
        for part, seconds in (of_parts | {"all": whole}).items():
            taken = Samples(tuple(seconds))
            results.write(BENCHMARK, f"{part}{name}", {"config": config, "batch": batch}, taken)
            print(f"{config} {part}{name}: {1000 * taken.median:.2f} ms of CPU", flush=True)


def main(argv: list[str] | None = None) -> int:
    return command(run, BENCHMARK, "Host's CPU time for a step's draws.", minutes=2.0, argv=argv)


if __name__ == "__main__":
    sys.exit(main())

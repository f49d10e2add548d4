"""Methods component by component: kNN at equal time, images per second and memory, ours and the peers' versions.

    python -m benchmarks.methods --data data/cifar10 --train 10000 --val 2000 --minutes-each 3 --seeds 3 \\
        --solo-learn PATH --out DIR

A race (`benchmarks.time_to_accuracy`, whose rules it has) for each method. DIR/methods.jsonl gets a line a run; the
same command goes on where it was stopped. `benchmarks/race/methods.py` holds the methods and their settings.
"""

import os
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.harness.cli import command
from benchmarks.harness.results import Results
from benchmarks.harness.worker_process import apart
from benchmarks.race.contestants import FASTSIAM, OURS
from benchmarks.race.methods import BENCHMARK, ENTRIES
from benchmarks.race.standings import Lines, plus_minus, read, standings
from benchmarks.time_to_accuracy import Race, check_entrants, images_of, in_words, seconds_each
from fastsiam.cli import let_threads_sleep
from fastsiam.errors import UserError

CONFIG = Path(__file__).parent / "race" / "methods_cpu.yaml"
DEFAULT = (FASTSIAM, "lightly", "solo-learn DALI")


def run(
    results: Results,
    *,
    device: torch.device,
    minutes: float,
    method: tuple[str, ...] = tuple(ENTRIES),
    config: str = str(CONFIG),
    data: Path | None = None,
    train: int | None = None,
    val: int | None = None,
    minutes_each: float | None = None,
    seeds: int = 3,
    target: float = 40.0,
    rates: tuple[str, ...] = ("0.5x", "1x", "2x"),
    own_rates: tuple[str, ...] = ("1x",),
    contestants: tuple[str, ...] = DEFAULT,
    solo_learn: Path | None = None,
    call=apart,
) -> None:
    """Runs the race of each method, or the rest of it; a peer without the method is absent.

    `minutes` are for all of it where `minutes_each` does not say how long a run trains.
    """
    check_entrants(contestants, seeds, rates, own_rates)
    for name in method:
        if name not in ENTRIES:
            raise UserError(f"--method: '{name}' is unknown; write some of {', '.join(ENTRIES)}", code="unknown-method")
    if not method:
        raise UserError(f"--method: is empty; write some of {', '.join(ENTRIES)}", code="empty-race")
    runs = len(method) * sum(len(own_rates if name in OURS else rates) + seeds - 1 for name in contestants)
    seconds = seconds_each(minutes_each, minutes, runs)
    with tempfile.TemporaryDirectory() as scratch:
        lists = (results.folder or Path(scratch)).resolve() / "images"
        images = images_of(config, device.type, data, train, val, lists)
        lines = Lines(results, BENCHMARK)
        for name in method:
            print(f"method {name}", flush=True)
            entry, checkout = ENTRIES[name], solo_learn and solo_learn.resolve()
            race = Race(lines, config, images, seconds, target, checkout, call, entry)
            own = race.config.optimizer.base_lr
            grids = {
                variant: [in_words(rate, own) * entry.of(variant).rate for rate in _grid(variant, rates, own_rates)]
                for variant in contestants
            }
            race.run(grids, seeds)
    if results.folder:
        conclude(results.folder)


def _grid(variant, rates, own_rates):
    return own_rates if variant in OURS else rates


def conclude(folder: Path) -> None:
    """Says how the contestants of each method stand."""
    for standing in standings(read(folder / f"{BENCHMARK}.jsonl")):
        first = standing.runs[0]
        print(
            f"{standing.params['method']} {standing.variant}: kNN {plus_minus(standing.knn, 2)} % (n = "
            f"{len(standing.runs)}), {standing.images_per_second:.0f} images/s, "
            f"{first['peak_memory_bytes'] / 2**20:.1f} MiB, base_lr {standing.base_lr:g}, {first['protocol']}"
        )


def main(argv: list[str] | None = None) -> int:
    return command(run, BENCHMARK, "Race of the methods, each against its peers.", minutes=240.0, argv=argv)


if __name__ == "__main__":
    # As `fastsiam.train` sets it, here for everyone. solo-learn's imports warn in each of its workers.
    let_threads_sleep()
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    sys.exit(main())

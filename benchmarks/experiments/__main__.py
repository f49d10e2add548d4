"""The SimSiam paper's experiments, recorded: python -m benchmarks.experiments --data data/cifar10 --out DIR.

    python -m benchmarks.experiments stop_gradient predictor --seeds 3 --at-once 2 --data data/cifar10 --out DIR
    python -m benchmarks.experiments --seeds 2 --at-once 2 --data data/cifar10 --out DIR

Runs `fastsiam experiments` with base.yaml, one experiment after another, and then writes DIR/experiments.jsonl, a line
a run, of all that lie under --runs. The same command goes on where it was stopped, and what has ended is not run again:
the second command above leaves those of the first as they are. DIR/stop_gradient.png and .svg are the paper's Figure 2.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from benchmarks.experiments import plot
from benchmarks.experiments.lines import BENCHMARK, collected, seeds_begun
from benchmarks.harness.results import Results, readable
from benchmarks.race.subset import write_list
from fastsiam.config import load_config
from fastsiam.errors import UserError
from fastsiam.experiments.__main__ import main as run_experiment
from fastsiam.experiments.experiments import EXPERIMENTS, experiment_named

BASE = Path(__file__).parent / "base.yaml"
TRAIN, VAL = 8000, 2000


def run(arguments) -> int:
    names = [experiment_named(name).name for name in arguments.names or EXPERIMENTS]
    runs, lists = arguments.runs, arguments.runs / "images"
    images = [
        f"data.{part}={write_list(arguments.data / part, count, lists, '--data')}"
        for part, count in (("train", arguments.train), ("val", arguments.val))
    ]
    overrides = [*images, f"run.dir={runs}", *arguments.overrides]
    for name in names:
        seeds = max(arguments.seeds, seeds_begun(runs / name))
        options = ["--config", str(BASE), "--seeds", str(seeds), "--at-once", str(arguments.at_once)]
        code = run_experiment([name, *options, *overrides, f"run.name={name}"])
        if code:
            return code
    results = Results(None, torch.device("cpu"))
    setting = {"data": arguments.data.name, "images": arguments.train, "val": arguments.val}
    lines = collected(results, runs, load_config(BASE, overrides), setting)
    for line in lines:
        print(readable({key: value for key, value in line.items() if key != "curves"}))
    if arguments.out:
        write(arguments.out, lines)
    return 0


def write(folder: Path, lines: list[dict]) -> None:
    """Writes experiments.jsonl in place of an earlier one, and the picture."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    (folder / f"{BENCHMARK}.jsonl").write_text(text, encoding="utf-8")
    figure = [line for line in lines if line["params"]["experiment"] == "stop_gradient"]
    if figure:
        plot.draw(figure, folder, "stop_gradient")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experiments", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="experiments; without one all of them")
    parser.add_argument("--data", type=Path, required=True, help="folder with train/CLASS/ and val/CLASS/")
    parser.add_argument("--train", type=int, default=TRAIN, help="so many training images (%(default)s)")
    parser.add_argument("--val", type=int, default=VAL, help="so many images that kNN classifies (%(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each variant (%(default)s)")
    parser.add_argument("--at-once", type=int, default=1, help="runs side by side (%(default)s)")
    parser.add_argument("--runs", type=Path, default=Path("runs/experiments"), help="for run folders (%(default)s)")
    parser.add_argument("--out", type=Path, help=f"folder for {BENCHMARK}.jsonl; without it lines are only printed")
    parser.add_argument("--set", dest="overrides", nargs="*", default=[], metavar="key=value", help="changes base.yaml")
    arguments = parser.parse_args(argv)
    try:
        return run(arguments)
    except UserError as error:
        print(f"benchmarks: {error} [{error.code}]", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

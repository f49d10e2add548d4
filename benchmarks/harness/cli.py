"""Command line of a benchmark: python -m benchmarks.NAME [--out DIR] [--device D] [--minutes M] ..."""

import argparse
import inspect
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.harness.results import Results
from fastsiam.errors import UserError
from fastsiam.runtime.device import choose_device


def words(text: str) -> tuple[str, ...]:
    """Splits at commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def row_names(text: str) -> tuple[str, ...]:
    """Splits at semicolons, because a row's name may contain commas."""
    return tuple(name.strip() for name in text.split(";") if name.strip())


# What some of them take besides, by the name of the parameter.
OPTIONS = {
    "images": (Path, "folder of JPEGs; without it they are drawn"),
    "ranks": (int, "processes, on a GPU each where the device is cuda; without it 2"),
    "solo_learn": (Path, "a checkout of github.com/vturrisi/solo-learn"),
    "config": (str, "a YAML file, or the name of one in configs/ (%(default)s)"),
    "method": (words, "methods (%(default)s)"),
    "data": (Path, "folder with train/CLASS/ and val/CLASS/; without it the config's own"),
    "train": (int, "so many training images, equally many of each class; without it all"),
    "val": (int, "so many images that kNN classifies, likewise"),
    "classes": (int, "only the first so many classes by name; without it all"),
    "minutes_each": (float, "training time of a run; without it --minutes divided among the runs"),
    "seeds": (int, "runs of each contestant at its best rate (%(default)s)"),
    "target": (float, "kNN in percent whose first evaluation is told (%(default)s)"),
    "evaluations": (int, "kNN evaluations of a run, 10 s or more apart (%(default)s)"),
    "rates": (words, "rates of the peers: base_lr, or with an x multiples of the config's (%(default)s)"),
    "own_rates": (words, "likewise ours (%(default)s)"),
    "batch": (int, "images of a step; without it those of the benchmark for this config, or the config's own"),
    "rows": (row_names, "variants between semicolons, measured whatever the time; without it all that fit"),
    "against": (str, "a commit to compare with"),
    "contestants": (words, "who takes part (%(default)s)"),
}


def command(
    run: Callable[..., None], name: str, description: str, minutes: float, argv: list[str] | None = None
) -> int:
    """Calls `run(results, *, device, minutes, ...)` as the command line says, with those of OPTIONS that it takes.

    Returns the exit code: 0, or 2 for an error that a sentence on stderr explains.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--out", type=Path, help=f"folder for {name}.jsonl; without it lines are only printed")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--minutes", type=float, default=minutes, help="for the whole (%(default)s)")
    parameters = inspect.signature(run).parameters
    taken = [option for option in OPTIONS if option in parameters]
    for option in taken:
        kind, text = OPTIONS[option]
        default = parameters[option].default
        default = ",".join(default) if isinstance(default, tuple) else default
        text = text if default else text.replace(" (%(default)s)", "")
        parser.add_argument(f"--{option.replace('_', '-')}", type=kind, default=default, help=text)
    arguments = parser.parse_args(argv)
    try:
        device = choose_device(arguments.device)
        options = {option: getattr(arguments, option) for option in taken}
        run(Results(arguments.out, device), device=device, minutes=arguments.minutes, **options)
    except UserError as error:
        print(f"benchmarks: {error} [{error.code}]", file=sys.stderr)
        return 2
    return 0

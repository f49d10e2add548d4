"""The command line of a benchmark: python -m benchmarks.NAME [--out DIR] [--device D] [--minutes M] ..."""

import argparse
import inspect
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.protocol import Results
from fastsiam.config import UserError
from fastsiam.device import choose_device

# What some of them take besides, by the name of the parameter.
OPTIONS = {
    "images": (Path, "folder of JPEGs; without it they are drawn"),
    "ranks": (int, "processes, on a GPU each where the device is cuda; without it 2"),
    "solo_learn": (Path, "a checkout of github.com/vturrisi/solo-learn"),
}


def command(
    run: Callable[..., None], name: str, description: str, minutes: float, argv: list[str] | None = None
) -> int:
    """Call `run(results, *, device, minutes, ...)` as the command line says, with those of OPTIONS that it takes.

    Returns the exit code: 0, or 2 for a mistake that a sentence on stderr explains.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--out", type=Path, help=f"folder for {name}.jsonl; without it lines are only printed")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--minutes", type=float, default=minutes)
    taken = [option for option in OPTIONS if option in inspect.signature(run).parameters]
    for option in taken:
        kind, text = OPTIONS[option]
        parser.add_argument(f"--{option.replace('_', '-')}", type=kind, help=text)
    arguments = parser.parse_args(argv)
    try:
        device = choose_device(arguments.device)
        options = {option: getattr(arguments, option) for option in taken}
        run(Results(arguments.out, device), device=device, minutes=arguments.minutes, **options)
    except UserError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    return 0

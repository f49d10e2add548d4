"""Results of the protocols: one JSON line on stdout and in evaluations.jsonl, a table on stderr."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

import fastsiam
from fastsiam.errors import UserError
from fastsiam.evaluate.protocols.inputs import Inputs, folder_of_results
from fastsiam.runtime.environment import environment


def results_folder(inputs: Inputs) -> Path | None:
    """The folder for results and pictures, made where it is missing: --out, or evaluate/ in the encoder's run folder.

    None for an encoder that lies outside of a run folder, without --out. Raises `UserError` where the disk refuses.
    """
    folder = folder_of_results(inputs.arguments, inputs.folder)
    if folder is not None:
        with written(folder):
            folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def written(path: Path) -> Iterator[None]:
    """Raises `UserError` in place of the `OSError` of a block that writes `path`."""
    try:
        yield
    except OSError as error:
        sentence = f"--out: cannot write {path} ({error.strerror or error}); give another folder with --out"
        raise UserError(sentence, "out-unwritable") from error


def publish(
    protocol: str,
    settings: dict,
    numbers: dict,
    inputs: Inputs,
    data: dict,
    table: list[dict] | None = None,
    details: dict | None = None,
) -> dict:
    """Prints and writes a result; returns its line.

    `settings`: what defines the protocol (k, epochs, learning rate, "epoch": "last", "features": "offline").
    `numbers`: the accuracies in percent, and others, by name; finite, or None for one that does not exist.
    `data`: numbers of images and classes, decoder. `table`: rows with the same keys to print in place of `numbers`.
    `details`: what else the line has, and no table.
    Raises `UserError` where the disk refuses, after printing.
    """
    line = {
        "protocol": protocol,
        **settings,
        **numbers,
        "results": list(numbers),
        **(details or {}),
        "encoder": inputs.origin,
        "data": data,
        "size": inputs.spec.size,
        "crop_ratio": inputs.crop_ratio,
        **inputs.runtime.names,
        "fastsiam": fastsiam.__version__,
        "environment": environment(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    text = json.dumps(line, allow_nan=False)
    # Printed first: a disk that refuses must not cost the measurement.
    _print_table(protocol, settings, table or [{"result": name, "value": value} for name, value in numbers.items()])
    print(text, flush=True)
    folder = results_folder(inputs)
    if folder is not None:
        path = folder / "evaluations.jsonl"
        with written(path), open(path, "a", encoding="utf-8") as file:
            file.write(text + "\n")
    return line


def _print_table(protocol, settings, rows):
    console = Console(stderr=True, highlight=False)
    table = Table(title=protocol, title_justify="left")
    for index, key in enumerate(rows[0]):
        table.add_column(key, justify="right" if index else "left")
    for row in rows:
        table.add_row(*map(_text, row.values()))
    console.print(table)
    # Rates may be small.
    exact = {key: f"{value:g}" if isinstance(value, float) else _text(value) for key, value in settings.items()}
    console.print(", ".join(f"{key} {text}" for key, text in exact.items()), soft_wrap=True, markup=False)


def _text(value):
    if value is None:
        return "none"
    if isinstance(value, list | tuple):
        return "/".join(map(_text, value))
    return f"{value:.2f}" if isinstance(value, float) else str(value)

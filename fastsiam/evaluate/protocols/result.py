"""Results of the protocols: one JSON line on stdout and in evaluations.jsonl, a table on stderr."""

import json
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

import fastsiam
from fastsiam.errors import UserError
from fastsiam.evaluate.protocols.inputs import Inputs
from fastsiam.runtime.environment import environment


def results_folder(inputs: Inputs) -> Path | None:
    """The folder for results and pictures, made where it is missing: --out, or evaluate/ in the encoder's run folder.

    None for an encoder that lies outside of a run folder, without --out.
    """
    folder = getattr(inputs.arguments, "out", None) or (inputs.folder and inputs.folder / "evaluate")
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out: cannot write {folder} ({error.strerror or error})", "out-unwritable") from error
    return folder


def publish(protocol: str, settings: dict, numbers: dict, inputs: Inputs, data: dict) -> dict:
    """Prints and writes a result; returns its line.

    `settings`: what defines the protocol (k, epochs, learning rate, "epoch": "last", "features": "offline").
    `numbers`: the accuracies in percent, and others, by name. `data`: numbers of images and classes, decoder.
    """
    line = {
        "protocol": protocol,
        **settings,
        **numbers,
        "encoder": inputs.origin,
        "data": data,
        "size": inputs.spec.size,
        "crop_ratio": inputs.crop_ratio,
        **inputs.runtime.names,
        "fastsiam": fastsiam.__version__,
        "environment": environment(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    text = json.dumps(line)
    folder = results_folder(inputs)
    if folder is not None:
        path = folder / "evaluations.jsonl"
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(text + "\n")
        except OSError as error:
            raise UserError(f"--out: cannot write {path} ({error.strerror or error})", "out-unwritable") from error
    _print_table(protocol, settings, numbers)
    print(text, flush=True)
    return line


def _print_table(protocol, settings, numbers):
    console = Console(stderr=True, highlight=False)
    table = Table(title=f"{protocol} ({', '.join(f'{key} {value}' for key, value in settings.items())})")
    table.add_column("result")
    table.add_column("value", justify="right")
    for name, value in numbers.items():
        table.add_row(name, f"{value:.2f}" if isinstance(value, float) else str(value))
    console.print(table)

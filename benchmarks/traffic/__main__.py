"""Bytes, launches and operations of a config's compiled step by class, and the least time it takes a named GPU.

No GPU is needed: Inductor schedules the step for one that is not there. `--against COMMIT` counts the code of another
commit in the same way, in a worktree and a process of its own.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.harness.checkout import CHECKOUT
from benchmarks.harness.results import Results
from benchmarks.traffic.classes import CLASSES
from benchmarks.traffic.gpus import GPUS
from benchmarks.traffic.step import VIEW_BY_VIEW, count
from fastsiam.config import load_config
from fastsiam.errors import UserError

WHOLE = "whole step"
_SUMMED = ("launches", "read_bytes", "written_bytes", "operations", "seconds")


def lines_of(counted: dict, other: dict | None = None) -> dict[str, dict]:
    """Returns the numbers of each class and of the whole step, by name.

    `other`: the count of another commit, whose bytes and launches those of this one are divided by.
    """
    batch, lines = counted["params"]["batch"], {}
    theirs = {} if other is None else _with_whole(other["classes"])
    for kind, numbers in _with_whole(counted["classes"]).items():
        moved = numbers["read_bytes"] + numbers["written_bytes"]
        lines[kind] = {
            "launches": numbers["launches"],
            "read_bytes": numbers["read_bytes"],
            "written_bytes": numbers["written_bytes"],
            "bytes": moved,
            "bytes_per_image": moved / batch,
            "operations": numbers["operations"],
            "predicted_seconds": numbers["seconds"],
        }
        if kind in theirs:
            before = theirs[kind]
            lines[kind]["bytes_ratio"] = moved / (before["read_bytes"] + before["written_bytes"])
            lines[kind]["launches_ratio"] = numbers["launches"] / before["launches"]
            lines[kind]["seconds_ratio"] = numbers["seconds"] / before["seconds"]
    lines[WHOLE] |= {
        "images_per_second": batch / lines[WHOLE]["predicted_seconds"],
        "saved_bytes": counted["saved_bytes"],
        "peak_activation_bytes": counted["peak_bytes"],
    }
    return lines


def _with_whole(classes: dict[str, dict]) -> dict[str, dict]:
    whole = {key: sum(numbers[key] for numbers in classes.values()) for key in _SUMMED}
    return {kind: classes[kind] for kind in CLASSES if kind in classes} | {WHOLE: whole}


def table(lines: dict[str, dict]) -> str:
    """Text for a terminal."""
    rows = [("", "launches", "GB read", "written", "MB an image", "TFLOP", "ms", "bytes", "launches")]
    for kind, numbers in lines.items():
        ratios = [f"{numbers[key]:.3f}x" if key in numbers else "" for key in ("bytes_ratio", "launches_ratio")]
        gigabytes = [f"{numbers[key] / 1e9:.2f}" for key in ("read_bytes", "written_bytes")]
        more = f"{numbers['bytes_per_image'] / 1e6:.1f}", f"{numbers['operations'] / 1e12:.2f}"
        seconds = f"{1000 * numbers['predicted_seconds']:.2f}"
        rows.append((kind, f"{numbers['launches']:,}", *gigabytes, *more, seconds, *ratios))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    text = ["  ".join(cell.ljust(w) if not place else cell.rjust(w) for place, (cell, w) in
                      enumerate(zip(row, widths, strict=True))).rstrip() for row in rows]  # fmt: skip
    whole = lines[WHOLE]
    text.append(
        f"at most {whole['images_per_second']:,.0f} images/s; kept for the backward pass "
        f"{whole['saved_bytes'] / 1e9:.2f} GB, at the fullest moment {whole['peak_activation_bytes'] / 1e9:.2f} GB"
    )
    return "\n".join(text)


@contextlib.contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """A folder from which Python imports the code of `commit`, and the benchmarks of this checkout."""
    git = ["git", "-C", str(CHECKOUT)]
    found = subprocess.run([*git, "rev-parse", "--verify", f"{commit}^{{commit}}"], capture_output=True, text=True)
    if found.returncode:
        raise UserError(f"--against {commit}: git knows no such commit here; name one of git log", "no-such-commit")
    with tempfile.TemporaryDirectory() as scratch:
        tree, imports = Path(scratch, "tree"), Path(scratch, "imports")
        subprocess.run([*git, "worktree", "add", "--quiet", "--detach", tree, found.stdout.strip()], check=True)
        try:
            imports.mkdir()
            (imports / "fastsiam").symlink_to(tree / "fastsiam")
            (imports / "benchmarks").symlink_to(CHECKOUT / "benchmarks")
            yield imports
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", tree], check=True)


def count_at(commit: str, arguments: list[str]) -> dict:
    """`count` for the code of another commit."""
    with worktree(commit) as imports:
        command = [sys.executable, "-m", "benchmarks.traffic.step", *arguments]
        # First on the path, before an installed fastsiam.
        environment = os.environ | {"PYTHONPATH": str(imports)}
        done = subprocess.run(command, cwd=imports, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        message = f"--against {commit}: its step could not be counted (the reason is above); name a later commit"
        raise UserError(message, "commit-not-counted")
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.traffic", description=__doc__.partition("\n")[0])
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="not of the commit to compare with")
    parser.add_argument("--config", default="r50_100ep", help="YAML file, or the name of one in configs/ (%(default)s)")
    parser.add_argument("--batch", type=int, help="images of a step; without it the config's")
    parser.add_argument("--gpu", choices=tuple(GPUS), default="h200", help="(%(default)s)")
    parser.add_argument("--against", metavar="COMMIT", help="another commit to count and to compare with")
    parser.add_argument(VIEW_BY_VIEW, action="store_true", help="the encoder once for each view, not once for all")
    parser.add_argument("--out", type=Path, help="folder for traffic.jsonl; without it lines are only printed")
    arguments = parser.parse_args(argv)
    batch = [] if arguments.batch is None else [f"train.batch_size={arguments.batch}"]
    overrides = [*arguments.overrides, *batch]
    try:
        load_config(arguments.config, overrides)
        name = os.path.abspath(arguments.config) if os.path.isfile(arguments.config) else arguments.config
        results = Results(arguments.out, torch.device("cpu"))
        counted = count(name, arguments.gpu, overrides, arguments.view_by_view)
        # It may not know a key, and what a key changes is the question.
        other = count_at(arguments.against, [name, arguments.gpu, *batch]) if arguments.against else None
    except UserError as error:
        print(f"benchmarks: {error} [{error.code}]", file=sys.stderr)
        return 2
    lines = lines_of(counted, other)
    params = counted["params"] | ({"against": arguments.against} if other else {})
    if arguments.overrides:
        params["overrides"] = " ".join(arguments.overrides)
    for kind, numbers in lines.items():
        results.write("traffic", kind, params, None, **numbers)
    print(table(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Does a run end with its budget of time? python -m benchmarks.budget [--out DIR] [--minutes 5]

The quickstart with `budget` in seconds, killed (SIGKILL) after a third of it and started again. What its processes have
lived, start to exit, is set beside the budget: from outside, by this process' clock, and by the run's own account.
"""

import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.harness.checkout import CHECKOUT
from benchmarks.harness.cli import command
from benchmarks.harness.results import Results
from fastsiam.config.budget import parse_budget

CONFIG = "quickstart.yaml"
KILLED_AFTER = 1 / 3
SAVED_EVERY = 1 / 12
# Between the two processes, which must not count.
DEAD_SECONDS = 10


def run(results: Results, *, device: torch.device, minutes: float) -> None:
    budget = f"{60 * minutes - DEAD_SECONDS:.0f}s"
    seconds = parse_budget(budget).amount
    with tempfile.TemporaryDirectory() as folder:
        arguments = [
            f"budget={budget}", f"train.device={device.type}", "run.name=run", "evaluate.controls=false",
            f"run.dir={folder}", f"checkpoint.every_seconds={SAVED_EVERY * seconds:g}",
            *(f"data.{part}={folder}/demo/{part}" for part in ("train", "val")),
        ]  # fmt: skip
        start = [sys.executable, "-m", "fastsiam.train", "--config", CONFIG, *arguments]
        lived = live(start, KILLED_AFTER * seconds)
        time.sleep(DEAD_SECONDS)
        lived += live(start)
        lines = [json.loads(line) for line in (Path(folder) / "run/metrics.jsonl").read_text().splitlines()]
    end, resumed = lines[-1], [line["step"] for line in lines if line["kind"] == "resume"]
    assert (end["kind"], end["status"], len(resumed)) == ("end", "done", 1), lines[-1]
    results.add(
        "budget",
        "killed once",
        {"config": CONFIG, "budget_seconds": seconds, "killed_after_seconds": KILLED_AFTER * seconds},
        None,
        lived_seconds=lived,
        spent_seconds=end["spent_seconds"],
        lived_share=lived / seconds,
        spent_share=end["spent_seconds"] / seconds,
        steps=end["step"],
        resumed_at_step=resumed[0],
        knn_top1=end["knn_top1"],
    )


def live(start: list[str], killed_after: float | None = None) -> float:
    """Runs a command to its end, or for so many seconds; returns the lifetime of its process in seconds."""
    began = time.monotonic()
    with subprocess.Popen(start, cwd=CHECKOUT) as process:
        try:
            code = process.wait(killed_after)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            code = process.wait()
    assert code == (0 if killed_after is None else -signal.SIGKILL), code
    return time.monotonic() - began


def main(argv: list[str] | None = None) -> int:
    return command(run, "budget", __doc__.partition("\n")[0], 5.0, argv)


if __name__ == "__main__":
    sys.exit(main())

"""Time from the command to the first training step of the quickstart on warm caches, of two commits in turns.

`python -m benchmarks.startup BEFORE [AFTER] --images data/demo --out DIR`. A run ends as soon as metrics.jsonl shows
its first step. Uses only the command line, config keys and that file, so that modules of two commits may differ.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.harness.checkout import CHECKOUT
from benchmarks.harness.results import Results
from benchmarks.harness.timing import Samples
from benchmarks.same_weights import check_out
from fastsiam.data.demo_images import draw_demo

TICKS = os.sysconf("SC_CLK_TCK")
LIMIT_SECONDS = 300


def first_step(checkout: Path, images: Path) -> tuple[float, float]:
    """Seconds on the clock, and of all cores, from the command to the first line of a step in metrics.jsonl."""
    with tempfile.TemporaryDirectory() as runs:
        settings = (
            "train.log_every_steps=1",
            "train.device=cpu",
            f"data.train={images}/train",
            f"data.val={images}/val",
            f"run.dir={runs}",
            "run.name=run",
        )
        command = [sys.executable, "-m", "fastsiam.train", "--config", "quickstart.yaml", *settings]
        metrics, began = Path(runs) / "run/metrics.jsonl", time.perf_counter()
        process = subprocess.Popen(
            command,
            cwd=checkout,
            env=os.environ | {"PYTHONPATH": str(checkout)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            while not (metrics.exists() and '"kind": "train"' in metrics.read_text()):
                if process.poll() is not None or time.perf_counter() - began > LIMIT_SECONDS:
                    raise RuntimeError(f"{' '.join(command)} reached no step in {checkout}")
                time.sleep(0.005)
            seconds = time.perf_counter() - began
            # User and system time are fields 14 and 15, counted from before the name in parentheses.
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            return seconds, (int(fields[11]) + int(fields[12])) / TICKS
        finally:
            process.kill()
            process.wait()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__.partition("\n")[0])
    parser.add_argument("before", help="commit")
    parser.add_argument("after", nargs="?", help="commit; the working tree without it")
    parser.add_argument("--runs", type=int, default=7, help="timed runs of each, after one untimed (%(default)s)")
    parser.add_argument("--images", type=Path, help="folder of the demo images; without it they are drawn")
    parser.add_argument("--out", type=Path, help="folder for startup.jsonl; without it lines are only printed")
    arguments = parser.parse_args(argv)
    # Unwinds, so that the run at hand is killed too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory() as folder:
        images = arguments.images and arguments.images.resolve()
        if images is None:
            images = Path(folder) / "demo"
            draw_demo(images, seed=0)
        sides = {"before": check_out(arguments.before, Path(folder) / "before"), "after": CHECKOUT}
        if arguments.after:
            sides["after"] = check_out(arguments.after, Path(folder) / "after")
        for checkout in sides.values():
            first_step(checkout, images)
        pairs = [
            {side: first_step(checkout, images) for side, checkout in sides.items()} for _ in range(arguments.runs)
        ]
    results = Results(arguments.out, torch.device("cpu"))
    for side in sides:
        seconds, cpu_seconds = (Samples(tuple(pair[side][kind] for pair in pairs)) for kind in (0, 1))
        ratio = Samples(tuple(pair[side][0] / pair["before"][0] for pair in pairs)).median
        params = {"commit": getattr(arguments, side) or "working tree", "config": "quickstart.yaml"}
        results.add("startup", side, params, seconds, cpu_seconds=cpu_seconds.median, ratio=ratio)
    return 0


if __name__ == "__main__":
    sys.exit(main())

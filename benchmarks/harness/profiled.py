"""Rows of benchmarks.step with the kernels of a step by name: `python -m benchmarks.harness.profiled --rows NAMES`.

Each row is built once, timed in turns as benchmarks.step does it, and then profiled. With `--warm` rows are built and
two steps of each are run, which fills the compiler's caches, and nothing is measured.
"""

import argparse
import contextlib
import json
import re
import sys
import time
from pathlib import Path

import torch

from benchmarks import step as bench
from benchmarks.harness.cli import row_names
from benchmarks.harness.results import Results
from benchmarks.harness.timing import timed, traced
from fastsiam.config import load_config
from fastsiam.errors import UserError
from fastsiam.runtime.device import choose_device

# The first that matches a kernel's name is its kind; names are cuDNN's, cuBLAS's, Inductor's, torch's and ours.
KINDS = {
    "optimizer": r"multi_tensor|fused_sgd|FusedSgd|foreach",
    "convolution or product": r"cudnn|xmma|cutlass|gemm|nvjet|wgrad|dgrad|implicit|conv(?!ert)|cublas|winograd",
    "loss": r"^_(forward|backward)_kernel",
    "augment or crop": r"^_(contrast|views|crop)_kernel",
    "triton reduction": r"^triton_(red|per)",
    "triton copy or cat": r"^triton_poi_fused_(cat|_to_copy|clone)",
    "triton pointwise": r"^triton_poi",
    "batch norm": r"batch_norm|bn_|batchnorm",
    "cat": r"CatArray|cat_",
    "copy, fill": r"copy|fill|memset|memcpy|Memcpy|Memset",
    "pool": r"pool",
}
OTHER = "pointwise and others"
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
STEPS, RANKED = 3, 40


def kind(kernel: str) -> str:
    return next((label for label, pattern in KINDS.items() if re.search(pattern, kernel)), OTHER)


def kernels(step, device: torch.device) -> tuple[dict[str, tuple[float, float]], float]:
    """Returns milliseconds and launches a step by kernel (on a CPU by operator), and wall milliseconds a step."""

    def steps(count):
        for index in range(count):
            step(index)

    timed(lambda: steps(2), device)
    seconds = []
    events = traced(lambda: seconds.append(timed(lambda: steps(STEPS), device)), device)
    found = {}
    for event in events:
        if event.get("cat") in (ON_DEVICE if device.type == "cuda" else ("cpu_op",)):
            spent, launches = found.get(event["name"], (0.0, 0.0))
            found[event["name"]] = spent + event["dur"] / 1000 / STEPS, launches + 1 / STEPS
    return found, seconds[0] * 1000 / STEPS


def by_kind(found: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    sums = {}
    for kernel, (spent, launches) in found.items():
        before = sums.get(kind(kernel), (0.0, 0.0))
        sums[kind(kernel)] = before[0] + spent, before[1] + launches
    return sums


def write_profile(folder: Path, name: str, params: dict, found: dict, wall: float) -> str:
    """`<name>.txt` to read and `<name>.json` with every kernel; returns the head of the text."""
    kinds = by_kind(found)

    def table(numbers):
        ranked = sorted(numbers.items(), key=lambda each: -each[1][0])
        return [f"{spent:9.3f} ms {launches:7.1f}  {label[:150]}" for label, (spent, launches) in ranked]

    busy = sum(spent for spent, _ in found.values())
    title = f"{params} {name}: {busy:.2f} ms of kernels a step, {wall:.2f} ms of wall under the profiler"
    head = [title, *table(kinds)]
    file = re.sub(r"\W+", "-", f"{params['encoder']} {params['size']} {params['batch']} {name}").strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    lines = [*head, "", f"the {RANKED} that take most", *table(found)[:RANKED]]
    (folder / f"{file}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    told = {"params": params, "row": name, "wall_ms": wall, "by_kind": kinds, "kernels": found}
    (folder / f"{file}.json").write_text(json.dumps(told), encoding="utf-8")
    return "\n".join(head)


def build(setting: bench.Setting, rows: list[bench.Row]) -> list[bench.Row]:
    """Builds rows and runs two steps of each; prints why a row fails, and continues with the others."""
    ready = []
    for row in rows:
        began = time.perf_counter()
        try:
            absent = bench.prepare(setting, [row], deadline=0.0)
        # Whatever one row meets, the others are measured: the machine is there for minutes.
        except Exception as error:
            absent = {row.name: f"{type(error).__name__}: {error}"}
            row.step = None
            torch.cuda.empty_cache()
        told = absent.get(row.name) or f"built in {time.perf_counter() - began:.1f} s"
        print(f"{row.name}: {told}", flush=True)
        ready += [] if row.name in absent else [row]
    return ready


def run(arguments, device: torch.device) -> int:
    overrides = [f"train.batch_size={arguments.batch}", f"train.device={device.type}", "data.backend=synthetic"]
    setting = bench.Setting(load_config(arguments.config, [*overrides, *arguments.set]), device, None)
    torch.backends.cudnn.benchmark = device.type == "cuda"
    with contextlib.ExitStack() as stack:
        rows = build(setting, bench.chosen(setting.rows_here(stack), arguments.rows))
        if arguments.warm or not rows:
            return 0 if rows else 1
        results = Results(arguments.out, device)
        taken = bench.run_in_turns(setting, rows, time.perf_counter() + 60 * arguments.minutes)
        for row in rows:
            bench.write(results, setting, row, taken[row.name], {})
        for row in rows:
            print(write_profile(arguments.profiles, row.name, setting.params, *kernels(row.step, device)), flush=True)
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.harness.profiled", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--rows", type=row_names, required=True, help="rows of benchmarks.step, between semicolons")
    parser.add_argument("--minutes", type=float, default=0.2, help="for the rounds; building comes on top")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the config, besides")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=Path, help="folder for step.jsonl")
    parser.add_argument("--profiles", type=Path, default=Path("profiles"), help="folder for tables of kernels")
    parser.add_argument("--warm", action="store_true", help="only fill the compiler's caches")
    arguments = parser.parse_args(argv)
    try:
        return run(arguments, choose_device(arguments.device))
    except UserError as error:
        print(f"benchmarks: {error} [{error.code}]", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

"""Every benchmark in one command: `python -m benchmarks.suite --out DIR --minutes 8`.

Each runs in a process of its own, so that none inherits another's memory, thread pools or compiled code, and one that
crashes takes no other with it. A benchmark that fails fails the suite after the others have run, and its lines are put
aside: a table never shows what is left of it. Whatever happens, the suite ends within 1.15 times its minutes (8 fit
into a command that is stopped after ten) and prints the tables of what has been measured, on SIGTERM as well.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.checkout import CHECKOUT
from benchmarks.harness.images import photographs
from benchmarks.tables import TABLES, read, render
from fastsiam.cli import let_threads_sleep
from fastsiam.errors import UserError

DRAWN_COUNT = 256

# All together may take so many times their minutes, for compilation most of all. What one may overrun its share by
# leaves the later ones at least this part of theirs.
_OVERRUN, _LEAST = 1.15, 0.5
# Less is not worth starting Python for.
_SHORTEST_SECONDS = 5.0

SHORT_RACE = ("--contestants", "fastsiam,authors", "--seeds", "1", "--rates", "1x", "--target", "60")


@dataclass(frozen=True)
class Benchmark:
    """A script to run, its share of the minutes, and which of the suite's own options it takes."""

    module: str
    share: float
    options: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    """Always the same."""

    @property
    def name(self) -> str:
        return self.module.rpartition(".")[2]


BENCHMARKS = (
    Benchmark("benchmarks.loss", 0.06),
    Benchmark("benchmarks.augment", 0.09),
    Benchmark("benchmarks.crop", 0.05),
    Benchmark("benchmarks.step", 0.33, ("solo_learn",)),
    Benchmark("benchmarks.loader", 0.18, ("images", "solo_learn")),
    Benchmark("benchmarks.end_to_end", 0.15, ("images",)),
    # On the demo images, which the quickstart draws.
    Benchmark("benchmarks.time_to_accuracy", 0.10, arguments=SHORT_RACE),
    Benchmark("benchmarks.distributed", 0.04, ("ranks",)),
)


@dataclass(frozen=True)
class Clock:
    """When the suite is to end, and when it ends whatever happens."""

    began: float
    minutes: float

    def share(self, now: float, rest: tuple[Benchmark, ...]) -> float:
        """Minutes of the first of these that are left to run: the next ones pay for one that took longer."""
        left = max(self.began + 60 * self.minutes - now, 0) / 60
        return left * rest[0].share / sum(other.share for other in rest)

    def limit(self, now: float, rest: tuple[Benchmark, ...]) -> float:
        """Seconds after which it is stopped."""
        later = 60 * self.minutes * sum(other.share for other in rest[1:])
        return self.began + 60 * self.minutes * _OVERRUN - now - _LEAST * later


def run(out: Path, clock: Clock, device: str, options: dict[str, Path | int | None]) -> list[str]:
    """Runs all of BENCHMARKS into `out` and prints their tables; returns what failed, as "NAME (why)"."""
    taken = [benchmark.name for benchmark in BENCHMARKS if (out / f"{benchmark.name}.jsonl").exists()]
    if taken:
        message = f"--out: {out} already holds results of {', '.join(taken)}; choose another folder"
        raise UserError(message, code="results-exist")
    out.mkdir(parents=True, exist_ok=True)
    failed = []
    try:
        for number, benchmark in enumerate(BENCHMARKS):
            now = time.perf_counter()
            own, limit = (ask(now, BENCHMARKS[number:]) for ask in (clock.share, clock.limit))
            print(f"== {benchmark.name}, {own:.1f} of {clock.minutes:g} minutes", flush=True)
            reason = run_one(benchmark, out, own, device, options, limit)
            print(f"== {benchmark.name}: {reason or 'done'}, {time.perf_counter() - now:.0f} s\n", flush=True)
            if reason:
                failed.append(f"{benchmark.name} ({reason})")
    finally:
        print_tables(out)
    return failed


def end_on_sigterm() -> None:
    """Makes SIGTERM end the suite as an error does: its process ends too, and tables are printed."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def print_tables(out: Path) -> None:
    for name, table in TABLES.items():
        path = out / f"{table.benchmark}.jsonl"
        if path.exists():
            print(f"{name}: {render(table, read(path))}", flush=True)


def run_one(
    benchmark: Benchmark, out: Path, minutes: float, device: str, options: dict[str, Path | int | None], limit: float
) -> str | None:
    """Runs one benchmark in its own process, stopped after `limit` seconds; returns why it failed, or None."""
    command = [sys.executable, "-m", benchmark.module, "--out", str(out), "--device", device, "--minutes", f"{minutes}"]
    command += benchmark.arguments
    for name in benchmark.options:
        if options[name] is not None:
            command += [f"--{name.replace('_', '-')}", str(options[name])]
    if limit < _SHORTEST_SECONDS:
        return "not begun: the time was over"
    lines, reason = out / f"{benchmark.name}.jsonl", "interrupted"
    try:
        code = stopped_after(limit, command)
        reason = f"exit code {code}" if code else None
        if reason is None and not lines.exists():
            reason = "no result lines"
    except subprocess.TimeoutExpired:
        reason = f"stopped after {limit:.0f} s"
    finally:
        if reason and lines.exists():
            lines.rename(lines.with_suffix(".failed"))
    return reason


def stopped_after(seconds: float, command: list[str]) -> int:
    """Returns the exit code of a command, which ends with all the processes that it has started.

    Raises `subprocess.TimeoutExpired` where it takes longer.
    """
    process = subprocess.Popen(command, cwd=CHECKOUT, start_new_session=True)
    try:
        return process.wait(seconds)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suite", description="Run every benchmark.")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the result lines, one file a benchmark")
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="for all together, compilation included (%(default)s)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--images", type=Path, help="folder of real JPEGs; without it JPEGs are drawn into DIR/images")
    parser.add_argument("--solo-learn", type=Path, help="checkout of solo-learn, to measure it too")
    parser.add_argument("--ranks", type=int, help="processes of the distributed step; without it 2")
    arguments = parser.parse_args(argv)
    clock = Clock(time.perf_counter(), arguments.minutes)
    out = arguments.out.resolve()
    try:
        images, label = photographs(arguments.images, out / "images", DRAWN_COUNT)
        print(f"images: {label}")
        solo_learn = arguments.solo_learn and arguments.solo_learn.resolve()
        options = {"images": images.resolve(), "solo_learn": solo_learn, "ranks": arguments.ranks}
        failed = run(out, clock, arguments.device, options)
    except UserError as error:
        print(f"benchmarks: {error} [{error.code}]", file=sys.stderr)
        return 2
    if failed:
        print(f"benchmarks: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    # As `fastsiam.train` does it, for every benchmark.
    let_threads_sleep()
    end_on_sigterm()
    sys.exit(main())

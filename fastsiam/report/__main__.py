"""python -m fastsiam.report RUN [RUN ...] [--out FILE] [--watch [SECONDS]]: one HTML page of one run or several.

Reads run folders only: no data, no GPU, no torch. A run writes its own page when it ends; --watch writes one meanwhile.
"""

import argparse
import math
import os
import sys
from pathlib import Path

from fastsiam.cli import answered, print_error
from fastsiam.config.yaml_file import expand_home
from fastsiam.errors import UserError
from fastsiam.report.read_run import open_runs
from fastsiam.report.watch import watch
from fastsiam.run.reading import check_may_begin
from fastsiam.runtime.files import replace_file

NAME = "report.html"
# Seconds between two looks at a run that is watched.
EVERY = 60.0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastsiam.report",
        description="Write one self-contained HTML page (no network, no script) of one run or of several overlaid: "
        "result, curves, view pairs, nearest neighbours, warnings, config. A run may be finished, running, killed or "
        "failed.",
    )
    text = "a run folder, for example runs/quickstart"
    parser.add_argument("runs", metavar="RUN", nargs="+", type=expand_home, help=text)
    parser.add_argument(
        "--out", metavar="FILE", type=expand_home, help=f"default: RUN/{NAME} for one run, ./{NAME} for several"
    )
    parser.add_argument(
        "--watch",
        metavar="SECONDS",
        nargs="?",
        type=float,
        const=EVERY,
        help=f"rewrite the page of one run every {EVERY:g} seconds, or as many, until the run ends or Ctrl-C",
    )
    arguments = parser.parse_args(argv)
    out = arguments.out or (arguments.runs[0] / NAME if len(arguments.runs) == 1 else Path(NAME))
    if arguments.watch is not None:
        work = lambda: _watch(arguments.runs, out, arguments.watch)  # noqa: E731
        return answered(work, gone="another process has gone", stopped=f"stopped; {out} is the page so far")
    try:
        write_report(arguments.runs, out)
    except UserError as error:
        return print_error(error)
    print(f"report    {out}")
    return 0


def _watch(runs: list[Path], out: Path, seconds: float) -> int:
    if len(runs) > 1:
        raise UserError("--watch: follows one run; give one RUN, or leave --watch out", "watch-of-several")
    if not 1 <= seconds < math.inf:
        raise UserError(f"--watch: {seconds:g} is not a number of seconds from 1 on; give 60", "bad-seconds")
    (run,) = runs
    check_may_begin(run)
    print(f"watching  {run}: {out} is rewritten every {seconds:g} s until the run ends; Ctrl-C ends the watching")
    ended = watch(
        run,
        seconds,
        # A run that ends writes the same page, by way of report.html.tmp.
        lambda is_running: write_report(runs, out, seconds if is_running else None, f".{os.getpid()}.tmp"),
        lambda line: print(line, flush=True),
    )
    print(f"report    {out} (the run has ended: {ended})")
    return 0


def write_report(paths: list[Path], out: Path, reload_seconds: float | None = None, suffix: str = ".tmp") -> None:
    """Writes the page of the run folders `paths` to `out`, whole or not at all.

    `reload_seconds`: a browser loads the page again after so many; None: never. `suffix`: of the name under which the
    page is written first. Raises `UserError` for a folder that is not a run, and where `out` cannot be written.
    """
    runs = open_runs(paths)
    # matplotlib takes 0.4 s to import, which a mistaken folder need not wait for.
    from fastsiam.report.page import page

    document = page(runs, reload_seconds)
    try:
        replace_file(out, document.encode("utf-8", errors="backslashreplace"), suffix)
    except OSError as error:
        raise UserError(
            f"--out: cannot write {out} ({error.strerror or error}); choose another file", "report-unwritten"
        ) from error


if __name__ == "__main__":
    sys.exit(main())

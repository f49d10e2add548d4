"""python -m fastsiam.report RUN [RUN ...] [--out FILE]: one self-contained HTML page of one run or several.

Reads run folders only: no data, no GPU, no torch. A run writes its own page when it ends.
"""

import argparse
import sys
from pathlib import Path

from fastsiam.cli import print_error
from fastsiam.config.yaml_file import expand_home
from fastsiam.errors import UserError
from fastsiam.report.read_run import open_runs
from fastsiam.runtime.files import replace_file

NAME = "report.html"


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
    arguments = parser.parse_args(argv)
    out = arguments.out or (arguments.runs[0] / NAME if len(arguments.runs) == 1 else Path(NAME))
    try:
        write_report(arguments.runs, out)
    except UserError as error:
        return print_error(error)
    print(f"report    {out}")
    return 0


def write_report(paths: list[Path], out: Path) -> None:
    """Writes the page of the run folders `paths` to `out`, whole or not at all.

    Raises `UserError` for a folder that is not a run, and where `out` cannot be written.
    """
    runs = open_runs(paths)
    # matplotlib takes 0.4 s to import, which a mistaken folder need not wait for.
    from fastsiam.report.page import page

    document = page(runs)
    try:
        replace_file(out, document.encode("utf-8", errors="backslashreplace"))
    except OSError as error:
        raise UserError(
            f"--out: cannot write {out} ({error.strerror or error}); choose another file", "report-unwritten"
        ) from error


if __name__ == "__main__":
    sys.exit(main())

"""python -m fastsiam.report RUN [RUN ...] [--out FILE]: one self-contained HTML page of one run or several.

It reads run folders only: no data, no GPU, no torch. A run writes the page itself when it ends.
"""

import argparse
import sys
from pathlib import Path

from fastsiam.config.yaml_file import expand_home
from fastsiam.errors import UserError
from fastsiam.report.read_run import open_runs
from fastsiam.runtime.files import replace_file

NAME = "report.html"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastsiam.report",
        description="Write one self-contained HTML page (no network, no script) of one run or of several overlaid: "
        "result, curves, view pairs, nearest neighbours, warnings, config. A run that goes on, was killed or failed "
        "works, too.",
    )
    text = "a run folder, for example runs/quickstart"
    parser.add_argument("runs", metavar="RUN", nargs="+", type=expand_home, help=text)
    parser.add_argument(
        "--out", metavar="FILE", type=expand_home, help=f"of one run by default RUN/{NAME}, of several ./{NAME}"
    )
    arguments = parser.parse_args(argv)
    out = arguments.out or (arguments.runs[0] / NAME if len(arguments.runs) == 1 else Path(NAME))
    try:
        write_report(arguments.runs, out)
    except UserError as error:
        print(f"fastsiam: {error}", file=sys.stderr)
        return 2
    print(f"report    {out}")
    return 0


def write_report(paths: list[Path], out: Path) -> None:
    """Write the page of the run folders `paths` to `out`, whole or not at all.

    Raises `UserError` for a folder that is no run, and where `out` cannot be written.
    """
    runs = open_runs(paths)
    # It imports matplotlib.
    from fastsiam.report.page import page

    document = page(runs)
    try:
        replace_file(out, document.encode("utf-8", errors="backslashreplace"))
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written ({error.strerror or error})") from error


if __name__ == "__main__":
    sys.exit(main())

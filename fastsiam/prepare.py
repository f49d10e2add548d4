"""python -m fastsiam.prepare {demo,ffcv} ...: make data sets that training reads."""

import argparse
import sys
from pathlib import Path

from fastsiam.config import UserError
from fastsiam.data import beton, demo


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastsiam.prepare", description="Make data sets.")
    commands = parser.add_subparsers(dest="command", required=True)
    draw = commands.add_parser("demo", help="draw the quickstart's images, 10 classes of patterns")
    draw.add_argument("folder", type=Path, help="where train/ and val/ go")
    draw.add_argument("--seed", type=int, default=0)
    beton.add_arguments(commands.add_parser("ffcv", help="write a .beton, which data.backend=ffcv reads"))
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "ffcv":
            print(beton.run(arguments))
            return 0
        demo.draw_demo(arguments.folder, arguments.seed)
    except (UserError, ValueError, ImportError) as error:
        if isinstance(error, ModuleNotFoundError):
            raise
        print(f"fastsiam: {error}", file=sys.stderr)
        return 2
    print(f"the demo images of seed {arguments.seed} are in {arguments.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

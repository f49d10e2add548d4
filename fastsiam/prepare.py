"""python -m fastsiam.prepare {demo,pack}: make data sets that training reads."""

import argparse
import contextlib
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastsiam.config import UserError
from fastsiam.data import demo, pack
from fastsiam.data.sources import open_source


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastsiam.prepare", description="Make data sets.")
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (_add_demo, _add_pack):
        add(commands)
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except (UserError, ValueError, OSError) as error:
        print(f"fastsiam: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"fastsiam: {arguments.command} was stopped", file=sys.stderr)
        return 130
    return 0


def _add_demo(commands):
    draw = commands.add_parser("demo", help="draw the quickstart's images, 10 classes of patterns")
    draw.add_argument("folder", type=Path, help="where train/ and val/ go")
    draw.add_argument("--seed", type=int, default=0)
    draw.set_defaults(run=_demo)


def _demo(arguments):
    demo.draw_demo(arguments.folder, arguments.seed)
    print(f"the demo images of seed {arguments.seed} are in {arguments.folder}")


def _add_pack(commands):
    command = commands.add_parser(
        "pack",
        help="images into tar shards (WebDataset's layout), their bytes as they are",
        description="Pack images into tar shards in WebDataset's layout, their bytes as they are; data.train=OUT reads "
        "them. Names, labels and order stay.",
    )
    command.add_argument("source", metavar="SRC", help="a folder of images or a text list, as for data.train")
    command.add_argument("out", metavar="OUT", type=Path, help="a new folder")
    command.add_argument("--shard-size", metavar="SIZE", default="1GB", help="of a tar file (%(default)s)")
    command.set_defaults(run=_pack)


def _pack(arguments):
    shard_bytes = pack.parse_size(arguments.shard_size)
    source = open_source(arguments.source, "SRC")
    with _progress("packing") as progress:
        shards = pack.pack(source, arguments.out, shard_bytes, progress)
    print(f"{arguments.out} holds {shards} shards; data.train={arguments.out} reads them")


@contextlib.contextmanager
def _progress(verb):
    """A bar on the terminal; gives a function of how many images are done, and of how many (None: nobody knows)."""
    columns = (TextColumn(verb), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("")
        yield lambda done, total: bar.update(task, completed=done, total=total)


if __name__ == "__main__":
    sys.exit(main())

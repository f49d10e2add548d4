"""python -m fastsiam.embed ENCODER SRC --out F.npz: write the features of images, or show nearest neighbours.

Exit codes: 0; 2 for a mistake of the user; 130 at Ctrl-C, after which the same command goes on.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastsiam import cli
from fastsiam.config.yaml_file import expand_home
from fastsiam.errors import UserError
from fastsiam.evaluate.protocols.arguments import add_encoder_arguments, keys_as_options

FORMATS = (".npz", ".parquet", ".safetensors")


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        cli.prepare_process()
        _check(arguments)
    except UserError as error:
        return cli.refused(error)
    resumes = "; the same command goes on" if arguments.out else ""
    return cli.answered(
        lambda: _embed(arguments),
        gone="another process has gone",
        stopped=f"stopped{resumes}",
        too_large=cli.BATCH_TOO_LARGE,
    )


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m fastsiam.embed",
        description="Write the features of images, with their names and labels, in the order of SRC; or show the "
        "nearest neighbours of some images among them.",
    )
    add_encoder_arguments(parser)
    parser.add_argument("source", metavar="SRC", help="a folder of images or tar shards, a text list, or a .beton")
    parser.add_argument("--out", metavar="F", type=expand_home, help=f"a file {', '.join(FORMATS)}")
    parser.add_argument("--dtype", choices=("fp16", "fp32"), default="fp32", help="of the features (%(default)s)")
    text = "a module of the encoder, for example layer3; maps are averaged over space (default: the pooled features)"
    parser.add_argument("--layer", metavar="NAME", help=text)
    text = "images whose nearest neighbours in SRC to show"
    parser.add_argument("--neighbours", metavar="IMAGE", nargs="+", type=expand_home, default=[], help=text)
    parser.add_argument("--html", metavar="F.html", type=expand_home, help="the page of --neighbours")
    parser.add_argument("--count", metavar="K", type=int, default=10, help="neighbours of an image (%(default)s)")
    return parser


def _check(arguments):
    """Raises `UserError` for what shows before torch is imported."""
    if bool(arguments.neighbours) != bool(arguments.html):
        given, other = ("--neighbours", "--html F.html") if arguments.neighbours else ("--html", "--neighbours IMAGE")
        raise UserError(f"{given}: needs {other}", "half-a-page")
    if not arguments.out and not arguments.html:
        raise UserError("--out: missing; give --out F.npz, or --neighbours IMAGE --html F.html", "no-out")
    if arguments.out and arguments.out.suffix not in FORMATS:
        raise UserError(f"--out: {arguments.out} ends in none of {', '.join(FORMATS)}", "unknown-format")
    if arguments.count < 1:
        raise UserError(f"--count: {arguments.count} is below 1", "out-of-range")
    for key in ("out", "html"):
        path = getattr(arguments, key)
        if path and not path.absolute().parent.is_dir():
            raise UserError(f"--{key}: there is no folder {path.absolute().parent}; make it first", "no-folder")
    for image in arguments.neighbours:
        if not image.is_file():
            raise UserError(f"--neighbours: there is no image {image}", "no-such-file")


def _embed(arguments):
    # Imported here: torch takes seconds, which a mistaken argument need not wait for.
    from fastsiam.embed.features import computed
    from fastsiam.embed.table import check_writable, read_table, write_table
    from fastsiam.evaluate.protocols.inputs import opened

    with keys_as_options(), opened(arguments) as inputs:
        source = inputs.source(os.path.expanduser(arguments.source), "SRC")
        before = None
        if arguments.out:
            check_writable(arguments.out)
            before = read_table(arguments.out) if arguments.out.exists() else None
        with _progress() as progress, computed(inputs, source, arguments, before, progress) as table:
            if arguments.out:
                write_table(arguments.out, table) if before is None else None
                verb = "holds" if before is None else "held already"
                rows, width = table.features.shape
                print(f"{arguments.out} {verb} the features of {rows:,} images, {width:,} {arguments.dtype} each")
            if arguments.html:
                from fastsiam.embed.neighbours import write_page

                write_page(arguments.html, inputs, source, table, arguments.neighbours, arguments.count)
                count = min(arguments.count, len(table.features))
                print(f"{arguments.html} shows {count} neighbours of {len(arguments.neighbours)} images")
    return 0


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar on the terminal; yields a function of images done and images in all."""
    columns = (TextColumn("embedding"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


if __name__ == "__main__":
    sys.exit(main())

"""python -m fastsiam.prepare {demo,pack,scan,ffcv,cifar10}: make data sets that training reads, and check them."""

import argparse
import contextlib
import errno
import os
import sys
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fastsiam.cli import print_error
from fastsiam.config.yaml_file import expand_home
from fastsiam.data import demo_images
from fastsiam.data.sources import scan_manifest
from fastsiam.data.sources.index_cache import cache_folder
from fastsiam.data.sources.open import open_source, open_unscanned
from fastsiam.errors import UserError, printable
from fastsiam.prepare import cifar10, ffcv, pack
from fastsiam.prepare.compressed import open_compressed
from fastsiam.runtime.cores import usable_cores

# Files that a scan lists on the terminal; the manifest has them all.
_SHOWN = 50
# Errors of a disk or of permissions. Any other OSError is a bug and keeps its traceback.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ENOTDIR, errno.EACCES, errno.EPERM}


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0, 2 for a mistake of the user, 130 at Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m fastsiam.prepare", description="Make data sets, and check them.")
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (_add_demo, _add_pack, _add_scan, _add_ffcv, _add_cifar10):
        add(commands)
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except UserError as error:
        return print_error(error)
    except OSError as error:
        if error.errno not in _DISK:
            raise
        return print_error(f"{error.filename or 'OUT'}: {error.strerror}; free it, or write elsewhere", "disk")
    except KeyboardInterrupt:
        resumes = "; the same command resumes it" if arguments.command == "scan" else ""
        print(f"fastsiam: {arguments.command} was stopped{resumes}", file=sys.stderr)
        return 130
    return 0


def _add_demo(commands):
    draw = commands.add_parser("demo", help="draw the quickstart's images, 10 classes of patterns")
    draw.add_argument("folder", type=expand_home, help="new folder for train/ and val/")
    draw.add_argument("--seed", type=int, default=0)
    draw.set_defaults(run=_demo)


def _demo(arguments):
    demo_images.draw_demo(arguments.folder, arguments.seed)
    _print(f"the demo images of seed {arguments.seed} are in {arguments.folder}")


def _add_pack(commands):
    command = commands.add_parser(
        "pack",
        help="images into tar shards (WebDataset's layout), their bytes as they are",
        description="Pack images into tar shards in WebDataset's layout, their bytes as they are; data.train=OUT reads "
        "them. Names, labels and order stay; what a scan of SRC excludes is excluded.",
    )
    text = "a folder of images or of tar shards, which may be compressed, or a text list"
    command.add_argument("source", metavar="SRC", type=os.path.expanduser, help=text)
    command.add_argument("out", metavar="OUT", type=expand_home, help="a new folder")
    command.add_argument("--shard-size", metavar="SIZE", default="1GB", help="of a tar file (%(default)s)")
    command.set_defaults(run=_pack)


def _pack(arguments):
    shard_bytes = pack.parse_size(arguments.shard_size)
    source = open_compressed(arguments.source, "SRC") or open_source(arguments.source, "SRC")
    _print_exclusions(source)
    if text := source.label_text():
        _print(f"labels    {text}")
    with _progress("packing") as progress:
        shards = pack.pack(source, arguments.out, shard_bytes, progress)
    made = "1 shard" if shards == 1 else f"{shards:,} shards"
    _print(f"{arguments.out} holds {made}; data.train={arguments.out} reads them")


def _add_scan(commands):
    verdicts = "\n".join(
        f"  {name:14}{'excluded  ' if verdict.kind else '          '}{verdict.meaning}"
        for name, verdict in scan_manifest.VERDICTS.items()
    )
    command = commands.add_parser(
        "scan",
        help="decode every image once; runs exclude what is bad, equal or empty",
        description="Decode every image and write a manifest, a line a file. Runs find it by themselves, and exclude "
        f"what it says without counting it against data.max_bad_fraction.\n\nverdicts:\n{verdicts}\n\n"
        "After a stop the same command resumes. A later scan reads new, bad and duplicate files only: delete the "
        "manifest to read all of them again.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    text = "a folder of images or tar shards or a text list"
    command.add_argument("source", metavar="SRC", type=os.path.expanduser, help=text)
    command.add_argument("--workers", metavar="N", type=int, default=usable_cores(), help="processes (%(default)s)")
    command.add_argument("--max-pixels", metavar="M", type=int, help="exclude larger images (what Pillow refuses)")
    text = "the manifest, for data.manifest (by default a place where runs find it)"
    command.add_argument("--out", metavar="FILE.tsv", type=expand_home, help=text)
    command.set_defaults(run=_scan)


def _scan(arguments):
    # It imports torch.
    from fastsiam.prepare import scan

    if arguments.workers < 0:
        raise UserError(f"--workers: {arguments.workers} is below 0", "out-of-range")
    source = open_unscanned(arguments.source, "SRC")
    path = arguments.out or scan_manifest.default_path(cache_folder(Path(arguments.source)))
    max_pixels = scan.PIXEL_LIMIT if arguments.max_pixels is None else arguments.max_pixels
    with _progress("scanning") as progress:
        rows = scan.scan(source, path, workers=arguments.workers, max_pixels=max_pixels, progress=progress)
    _print_verdicts(rows)
    _print_exclusions(source)
    _print(f"manifest  {path}" + (f"; data.manifest={path} names it to a run" if arguments.out else ""))


def _print_verdicts(rows):
    counts = Counter(row.verdict for row in rows)
    table = Table("verdict", "images", "in a run", "meaning")
    for name, verdict in scan_manifest.VERDICTS.items():
        if counts[name]:
            table.add_row(name, f"{counts[name]:,}", "excluded" if verdict.kind else "used", verdict.meaning)
    Console().print(table)
    out = [row for row in rows if scan_manifest.VERDICTS[row.verdict].kind]
    for row in out[:_SHOWN]:
        _print(f"{row.verdict}\t{os.fsdecode(row.name)}")
    if len(out) > _SHOWN:
        _print(f"and {len(out) - _SHOWN:,} more in the manifest")


def _add_ffcv(commands):
    command = commands.add_parser("ffcv", help="one .beton, which data.backend=ffcv reads")
    text = "what data.train takes: a folder of images, or a list of files"
    command.add_argument("source", metavar="SRC", type=os.path.expanduser, help=text)
    command.add_argument("out", metavar="OUT.beton", type=expand_home)
    command.add_argument("--max-side", type=int, default=ffcv.MAX_SIDE, help="pixels of the longest side (%(default)s)")
    text = "mixed: half jpg, half raw (%(default)s)"
    command.add_argument("--format", choices=ffcv.FORMATS, default=ffcv.FORMAT, help=text)
    command.add_argument("--quality", type=int, default=ffcv.QUALITY, help="of the JPEGs (%(default)s)")
    command.set_defaults(run=_ffcv)


def _ffcv(arguments):
    source, out = arguments.source, arguments.out
    if ffcv.is_beton(source):
        raise UserError(f"SRC: {source} is a .beton already; give the images that it was written from", "is-beton")
    source = open_source(source, "SRC")
    _print_exclusions(source)
    settings = {"max_side": arguments.max_side, "stored_as": arguments.format, "quality": arguments.quality}
    with _progress("writing") as progress:
        bad = ffcv.write_beton(source, out, **settings, progress=progress)
    for sentence in bad.values():
        _print(f"excluded  {sentence}")
    size = out.stat().st_size / 1e9
    _print(f"{len(source) - len(bad):,} images ({len(bad):,} excluded) are in {out} ({size:.2f} GB)")
    _print(f"train with data.train={out}")


def _add_cifar10(commands):
    command = commands.add_parser(
        "cifar10",
        help="CIFAR-10 as folders of images",
        description=f"Write OUT/train/CLASS/ and OUT/val/CLASS/ from {cifar10.ARCHIVE}, its folder {cifar10.FOLDER} "
        "(as PNG, which loses nothing), or a folder or tar of images {train,test}/CLASS/IMAGE.jpg (their bytes as they "
        "are). Without SRC torchvision downloads the archive.",
    )
    command.add_argument("source", metavar="SRC", type=expand_home, nargs="?")
    text = "a new folder; r18_cifar10_800ep.yaml reads data/cifar10"
    command.add_argument("out", metavar="OUT", type=expand_home, help=text)
    command.set_defaults(run=_cifar10)


def _cifar10(arguments):
    with _progress("writing") as progress:
        counts = cifar10.convert(arguments.source, arguments.out, progress)
    _print(f"{arguments.out} holds {counts['train']:,} images in train and {counts['val']:,} in val")


def _print_exclusions(source):
    for text in source.exclusion_texts():
        _print(f"excluded  {text}")


def _print(text):
    print(printable(text))


@contextlib.contextmanager
def _progress(verb):
    """Shows a bar on the terminal; yields a function of images done and images in all (None: not known)."""
    columns = (TextColumn(verb), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("")
        yield lambda done, total: bar.update(task, completed=done, total=total)


if __name__ == "__main__":
    sys.exit(main())

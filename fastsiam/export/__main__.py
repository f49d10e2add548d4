"""python -m fastsiam.export ENCODER --to FORMAT --out PATH: a trained encoder for another library.

Prints what was written and a line of code that loads it. Exit codes: 0; 2 for a mistake of the user; 130 at Ctrl-C.
"""

import argparse
import importlib.util
import sys
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from fastsiam import cli
from fastsiam.config.yaml_file import expand_home
from fastsiam.errors import MissingLibraryError, UserError


class Format(NamedTuple):
    """What `--to` takes; the module of that name in fastsiam/export writes it."""

    purpose: str
    suffixes: tuple[str, ...] = ()
    """Of a file; the first is the usual one."""
    folder: bool = False
    """It may be a folder."""
    libraries: tuple[str, ...] = ()
    """Modules of the extra of this name that the export imports."""


FORMATS = {
    "torchvision": Format("a state dict in torchvision's names", (".pth", ".pt", ".safetensors")),
    "timm": Format("a state dict in timm's names, or a folder for timm and its hub", (".safetensors", ".pth"), True),
    "onnx": Format("one ONNX file for any batch and size", (".onnx",), libraries=("onnx", "onnxscript")),
    "safetensors": Format("the file of a run, which fastsiam.load_encoder reads", (".safetensors",)),
    "detectron2": Format("a pickle of arrays in detectron2's names", (".pkl",)),
    "huggingface": Format("a folder for ResNetModel and AutoImageProcessor of transformers", folder=True),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastsiam.export",
        description="Write a trained encoder in the format of another library, with how to feed it.",
        epilog="formats:\n" + "\n".join(f"  {name:12} {kind.purpose}" for name, kind in FORMATS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "encoder", metavar="ENCODER", type=expand_home, help="a run folder, encoder.safetensors or checkpoint.pt"
    )
    parser.add_argument("--to", required=True, choices=FORMATS, metavar="FORMAT", help=", ".join(FORMATS))
    parser.add_argument(
        "--out", required=True, type=expand_home, metavar="PATH", help="the file or folder; one that exists is replaced"
    )
    asked = parser.parse_args(argv)

    def work():
        export(asked.encoder, asked.to, asked.out)
        return 0

    return cli.answered(work, gone="another process has gone", stopped="stopped; nothing was written")


def export(path: Path, to: str, out: Path) -> None:
    """Writes the encoder at `path`, whatever load_encoder takes, to `out` and prints how to load it.

    `to`: a key of `FORMATS`. Raises `UserError` for what cannot be read, has no counterpart there or cannot be written.
    """
    check_out(out, to, path)
    _check_libraries(to)
    # torch takes a second to import, which a mistake need not wait for.
    from fastsiam.export.feeding import Feeding, check_finite
    from fastsiam.run.encoder_file import load_encoder

    encoder = load_encoder(path)
    check_finite(encoder, path)
    code = import_module(f"fastsiam.export.{to}").write(encoder, out)
    unknown = Feeding.of(encoder).unknown
    if unknown:
        print(f"note      {path} does not say its {', '.join(unknown)}; neither does the export", file=sys.stderr)
    print(f"export    {out} ({encoder.description['encoder']} for {to}); it is loaded by\n{code}")


def check_out(out: Path, to: str, source: Path) -> None:
    """Raises `UserError` for a path that cannot be written, or that is the encoder itself."""
    kind = FORMATS[to]
    if not out.parent.is_dir():
        raise UserError(f"--out: there is no folder {out.parent}; make it, or choose another", "no-such-folder")
    read = [source, source / "encoder.safetensors", *source.glob("checkpoint*.pt")]
    if out.exists() and any(path.exists() and out.samefile(path) for path in read):
        raise UserError(f"--out: {out} is the encoder that is read; choose another name", "out-is-encoder")
    is_file = out.suffix in kind.suffixes and not out.is_dir()
    is_folder = kind.folder and not out.is_file() and (out.is_dir() or not out.suffix or not kind.suffixes)
    if not (is_file or is_folder):
        names = [*(f"a file that ends in {suffix}" for suffix in kind.suffixes), *(["a folder"] if kind.folder else [])]
        raise UserError(f"--out: {out} is not what {to} takes; give {' or '.join(names)}", "other-suffix")


def _check_libraries(to):
    for name in FORMATS[to].libraries:
        if importlib.util.find_spec(name) is None:
            raise MissingLibraryError(
                f"--to: {to} needs {name}, which is not installed; pip install {' '.join(FORMATS[to].libraries)}, or "
                f"in a clone pip install -e '.[{to}]'",
                f"no-{name}",
                name,
            )


if __name__ == "__main__":
    sys.exit(main())

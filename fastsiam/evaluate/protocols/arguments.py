"""Arguments of evaluations and of fastsiam.embed: how an encoder is computed. Imports no torch."""

import argparse
import contextlib
import re
from collections.abc import Iterator

from fastsiam.config.yaml_file import expand_home
from fastsiam.errors import UserError

# Config keys in the errors of what runs share with evaluations, whose options have the same names.
_KEY = re.compile(r"\b(?:train|data)\.(batch_size|device|precision|backend|workers)\b(=?)")


def add_encoder_arguments(parser: argparse.ArgumentParser, batch_size: int | None = 256, views: bool = True) -> None:
    """ENCODER, and how and where it is computed.

    `batch_size`: the default, None where the protocol chooses. `views`: False for a protocol that does not take centred
    square crops from the loader.
    """
    parser.add_argument(
        "encoder", metavar="ENCODER", type=expand_home, help="a run folder, encoder.safetensors or checkpoint.pt"
    )
    text = "random weights of the same architecture in place of the trained ones: the control"
    parser.add_argument("--untrained", action="store_true", help=text)
    if views:
        _add_view_arguments(parser)
    else:
        parser.set_defaults(size=None, crop_ratio=1.0, max_bad_fraction=0.0)
    parser.add_argument("--workers", type=int, metavar="N", help="threads or processes of the decoder")
    text = f"images in a batch ({batch_size or 'see --preset'})"
    parser.add_argument("--batch-size", type=int, default=batch_size, metavar="B", help=text)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(%(default)s)")
    text = "of the encoder's forward pass (%(default)s: bf16 where the hardware multiplies it)"
    parser.add_argument("--precision", choices=("auto", "bf16", "fp16", "fp32"), default="auto", help=text)
    parser.add_argument("--seed", type=int, default=0, help="of all random choices (%(default)s)")


def _add_view_arguments(parser):
    parser.add_argument("--size", type=int, metavar="S", help="side of a view in pixels (default: the encoder's)")
    text = "side of the centred crop as a share of the short side (default: the encoder's, 0.875 where unknown)"
    parser.add_argument("--crop-ratio", type=float, metavar="R", help=text)
    parser.add_argument("--backend", choices=("auto", "dali", "pil", "ffcv"), default="auto", help="decoder")
    text = "share of the images that may fail to decode (%(default)s)"
    parser.add_argument("--max-bad-fraction", type=float, default=0.001, metavar="SHARE", help=text)


def add_labelled_arguments(parser: argparse.ArgumentParser) -> None:
    """--train and --val, and --out."""
    parser.add_argument("--train", metavar="SRC", required=True, help="labelled training images: folder, shards, list")
    parser.add_argument("--val", metavar="SRC", required=True, help="labelled validation images of the same classes")
    add_out_argument(parser)


def add_out_argument(parser: argparse.ArgumentParser) -> None:
    """--out."""
    text = "folder of the results (default: evaluate/ in the encoder's run folder; none for a lone file)"
    parser.add_argument("--out", metavar="FOLDER", type=expand_home, help=text)
    parser.set_defaults(has_results_folder=True)


def check_numbers(arguments: argparse.Namespace) -> None:
    """Raises `UserError` for a number that is out of range."""
    check_least(arguments, size=1, batch_size=1, workers=0, seed=0)
    if not 0 <= arguments.max_bad_fraction <= 1:
        raise UserError(f"--max-bad-fraction: {arguments.max_bad_fraction:g} is not in [0, 1]", "out-of-range")
    if arguments.crop_ratio is not None and not 0 < arguments.crop_ratio <= 1:
        raise UserError(f"--crop-ratio: {arguments.crop_ratio:g} is not in (0, 1]", "out-of-range")


def check_least(arguments: argparse.Namespace, **least: int) -> None:
    """Raises `UserError` for an option that is given and below its least value."""
    for key, low in least.items():
        value = getattr(arguments, key)
        if value is not None and value < low:
            raise UserError(f"--{key.replace('_', '-')}: {value} is below {low}", "out-of-range")


@contextlib.contextmanager
def keys_as_options() -> Iterator[None]:
    """A `UserError` of the block names options where it named the config keys of a run."""
    try:
        yield
    except UserError as error:
        raise UserError(_KEY.sub(_option, str(error)), error.code) from error


def _option(key):
    return f"--{key[1].replace('_', '-')}" + (" " if key[2] else "")

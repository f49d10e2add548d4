"""python -m fastsiam.evaluate PROTOCOL ENCODER --train SRC --val SRC: measure a trained encoder.

Prints one JSON line on stdout and a table on stderr. Exit codes: 0; 2 for a mistake of the user; 130 at Ctrl-C.
"""

import argparse
import sys
from importlib import import_module

from fastsiam import cli
from fastsiam.errors import UserError
from fastsiam.evaluate.protocols.arguments import keys_as_options

PROTOCOLS = {
    "spectrum": "RankMe, effective rank, decay of the spectrum, uniformity and alignment; needs no labels",
    "knn": "accuracy of a vote of the nearest training images, for several k and temperatures",
    "linear": "accuracy of a linear classifier, trained on features of augmented training images",
    "finetune": "accuracy of an encoder that is fine-tuned with all labels, 10 % or 1 % of them, or those of a list",
    "detect": "average precision of a detector that is trained around the encoder, on COCO's or VOC's format",
}
"""Name of each protocol, which is that of its module in fastsiam/evaluate/protocols, and what it measures."""


def main(argv: list[str] | None = None) -> int:
    width = max(map(len, PROTOCOLS))
    parser = argparse.ArgumentParser(
        prog="python -m fastsiam.evaluate",
        description="Measure a trained encoder.",
        epilog="protocols:\n" + "\n".join(f"  {name:{width}}  {what}" for name, what in PROTOCOLS.items())
        + "\n\nfastsiam evaluate PROTOCOL --help prints its options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("protocol", metavar="PROTOCOL", choices=PROTOCOLS)
    parser.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER)
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        parser.print_help(sys.stderr)
        return 2
    chosen = parser.parse_args(argv)
    try:
        cli.prepare_process()
    except UserError as error:
        return cli.refused(error)
    protocol = import_module(f"fastsiam.evaluate.protocols.{chosen.protocol}")
    below = argparse.ArgumentParser(
        prog=f"python -m fastsiam.evaluate {chosen.protocol}", description=protocol.__doc__.partition("\n\n")[0]
    )
    protocol.add_arguments(below)
    arguments = below.parse_args(chosen.arguments)

    def work():
        with keys_as_options():
            protocol.run(arguments)
        return 0

    stopped = getattr(protocol, "STOPPED", "stopped; the result was not written")
    return cli.answered(work, gone="another process has gone", stopped=stopped, too_large=cli.BATCH_TOO_LARGE)


if __name__ == "__main__":
    sys.exit(main())

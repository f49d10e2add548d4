"""python -m fastsiam.evaluate PROTOCOL ENCODER --train SRC --val SRC: measure a trained encoder.

Prints one JSON line on stdout and a table on stderr. Exit codes: 0; 2 for a mistake of the user; 130 at Ctrl-C.
"""

import argparse
import sys
from importlib import import_module

from fastsiam import cli
from fastsiam.errors import UserError

PROTOCOLS = {}
"""Name of each protocol, which is that of its module in fastsiam/evaluate/protocols, and what it measures."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastsiam.evaluate", description="Measure a trained encoder.")
    parser.add_argument("protocol", metavar="PROTOCOL", choices=PROTOCOLS, help="; ".join(PROTOCOLS))
    parser.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER)
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
        protocol.run(arguments)
        return 0

    return cli.answered(work, gone="another process has gone", stopped="stopped; the result was not written")


if __name__ == "__main__":
    sys.exit(main())

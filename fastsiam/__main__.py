"""fastsiam COMMAND ...: the same as python -m fastsiam.COMMAND ..."""

import sys
from importlib import import_module

COMMANDS = ("train", "plan", "prepare", "report", "doctor")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in COMMANDS:
        asked = f"there is no command {argv[0]}; " if argv and not argv[0].startswith("-") else ""
        print(f"{asked}usage: fastsiam {{{','.join(COMMANDS)}}} ...", file=sys.stderr)
        return 2
    return import_module(f"fastsiam.{argv[0]}").main(argv[1:])


if __name__ == "__main__":
    sys.exit(main())

"""fastsiam config [KEY]: documentation, range and default of a key or a section; without KEY one line for each key."""

import argparse
import shutil
import sys
import textwrap

from fastsiam import cli
from fastsiam.config import reference
from fastsiam.errors import UserError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="fastsiam config", description="Print what the keys of a config mean, their ranges and defaults."
    )
    parser.add_argument("key", metavar="KEY", nargs="?", help="a key or a section, for example train.batch_size")
    arguments = parser.parse_args(argv)
    width = shutil.get_terminal_size((120, 24)).columns
    try:
        print(_details(arguments.key, width) if arguments.key else _overview(width))
    except UserError as error:
        return cli.print_error(error)
    return 0


def _details(name, width):
    texts = []
    for key in reference.find(name):
        default = key.default if key.default in ("required", "by views.recipe") else f"default {key.default}"
        lines = textwrap.wrap(key.documentation, width, initial_indent="    ", subsequent_indent="    ")
        texts.append("\n".join((f"{key.name}: {key.range}; {default}", *lines)))
    return "\n".join(texts)


def _overview(width):
    found = reference.keys().values()
    columns = max(len(key.name) for key in found), max(len(key.default) for key in found)
    lines, section = [], ""
    for key in found:
        if key.name.partition(".")[0] != section and (section or "." in key.name):
            lines.append("")
        section = key.name.partition(".")[0]
        text = f"{key.name:{columns[0]}}  {key.default:{columns[1]}}  {key.documentation}"
        lines.append(_cut(text, width))
    return "\n".join(lines).strip("\n") + "\n\nfastsiam config KEY prints the whole text of a key or a section."


def _cut(text, width):
    return text if len(text) <= width else f"{text[: width - 4].rstrip()} ..."


if __name__ == "__main__":
    sys.exit(main())

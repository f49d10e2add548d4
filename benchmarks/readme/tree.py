"""The README's tree: a phrase for every file, which is the first sentence of its docstring."""

import ast
import re
from pathlib import Path

FOLDERS = ("fastsiam", "kernels", "benchmarks")
# A column for names; phrases are cut to the rest of a line.
NAME, LINE = 34, 120
LEAST = 24


def tree(checkout: Path) -> str:
    """Lines of Python files by folder, then of configs by their first comment."""
    lines = []
    for folder in FOLDERS:
        for path in _files(checkout / folder):
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            if text:
                lines.append(_line(path.relative_to(checkout), text))
    for path in sorted((checkout / "configs").glob("*.yaml")):
        comment = re.match(r"((?:#.*\n)+)", path.read_text(encoding="utf-8"))
        lines.append(_line(path.relative_to(checkout), comment[1].replace("#", "") if comment else ""))
    return "\n".join(lines)


def _files(folder):
    """A folder's own files before those of its folders; what a link leads to has its own place."""
    own = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")
    yield from sorted(folder.glob("__init__.py")) + own
    for inner in sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()):
        yield from _files(inner)


def _line(path, text):
    """The first sentence; where it does not fit, as much of it as ends at a colon, a comma or a bracket."""
    sentence = re.split(r"(?<=[.?!;])\s|\n\n", " ".join(text.split("\n\n")[0].split()))[0].rstrip(".;")
    room = LINE - NAME - 2
    if len(sentence) > room:
        ends = [match.start() for match in re.finditer(r"[:,;] |\s\(", sentence) if LEAST < match.start() <= room]
        sentence = sentence[: ends[-1]] if ends else sentence[: sentence.rindex(" ", 0, room - 3)] + " ..."
    return f"{path.as_posix():<{NAME}}  {sentence}".rstrip()

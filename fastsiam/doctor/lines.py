"""Lines of the doctor's answer, and the formats that they share."""

import re
from typing import Literal, NamedTuple


class Line(NamedTuple):
    """Judgement of one check; `status` and `code` are stable names for scripts."""

    status: Literal["ok", "warning", "error"]
    code: str
    """Kebab case; `ok` where all is well."""
    text: str
    cure: str = ""
    """A command or a setting; empty where all is well."""
    name: str = ""
    """Name of the check, if it is not the one in the table."""


def ok(text: str) -> Line:
    return Line("ok", "ok", text)


def warning(code: str, text: str, cure: str) -> Line:
    return Line("warning", code, text, cure)


def error(code: str, text: str, cure: str) -> Line:
    return Line("error", code, text, cure)


def release(version: str) -> tuple[int, ...]:
    """Returns the numbers that a version begins with: `2.14.1+cu130` is (2, 14, 1)."""
    return tuple(int(number) for number in re.match(r"\d+(?:\.\d+)*", version)[0].split("."))


def size(num_bytes: float) -> str:
    """Returns bytes in three digits and a unit, `2.47 GB`."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.3g} {unit}"
    return f"{num_bytes / 1e3:.0f} kB"

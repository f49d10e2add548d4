"""Errors and warnings that carry a code, the text of names in them, and the exit codes of the commands."""

import re
from enum import IntEnum

_LEADING_KEY = re.compile(r"((?:[a-z_]+\.(?:\d+\.)?)*[a-z_]+|[A-Z]+|--[a-z-]+): ")


class UserError(ValueError):
    """An error that the user can correct. Commands print its sentence and its code, and exit with code 2.

    `code` is a stable name in kebab case, for scripts and searches; `key` is the config key or argument that begins
    the message (`data.train: ...`), or None.
    """

    def __init__(self, message: str, code: str | None = None):
        super().__init__(message)
        self.code = code

    @property
    def key(self) -> str | None:
        found = _LEADING_KEY.match(str(self))
        return found[1] if found else None

    def __reduce__(self):
        return type(self), (str(self), self.code)


class MissingLibraryError(UserError, ImportError):
    """An optional library that a config or a command needs cannot be imported; the message says how to get it.

    `name` is that of the module, as in an ImportError.
    """

    def __init__(self, message: str, code: str | None = None, name: str | None = None):
        super().__init__(message, code)
        self.name = name


class Notice(str):
    """A sentence for the user, mostly a warning, with a stable `code` in kebab case."""

    __slots__ = ("code",)

    def __new__(cls, sentence: str, code: str):
        notice = super().__new__(cls, sentence)
        notice.code = code
        return notice

    def __getnewargs__(self):
        return str(self), self.code


def printable(text: str) -> str:
    """Returns a text with bytes of file names that are not UTF-8 as \\xNN, which every file and terminal takes."""
    return text.encode(errors="surrogateescape").decode(errors="backslashreplace")


class ExitCode(IntEnum):
    """Exit codes of the commands that train."""

    DONE = 0
    ERROR = 1
    USER_ERROR = 2
    COLLAPSED = 3
    NOT_FINITE = 4
    STUCK = 5

"""Mistakes that must be refused: tests compare the code and the key of an error, not its sentence."""

import contextlib
import io
import re
from collections.abc import Iterator

import pytest

from fastsiam.__main__ import main
from fastsiam.config import load_config
from fastsiam.errors import UserError

_LINE = re.compile(r"fastsiam: (?P<sentence>.*?)(?: \[(?P<code>[a-z0-9-]+)\])?$")


def refused(*arguments: object) -> UserError:
    """Runs `fastsiam ARGUMENT ...` in this process, which must exit with 2; returns the error of its last line.

    refused("train", "--config", "quickstart", "data.train=nowhere").code == "no-such-folder"
    """
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        assert main([str(argument) for argument in arguments]) == 2
    return printed_error(errors.getvalue())


def printed_error(stderr: str) -> UserError:
    """The error whose sentence and code a command has printed as the last line of its stderr."""
    found = _LINE.match(stderr.splitlines()[-1])
    assert found, stderr
    return UserError(found["sentence"], found["code"])


def refuses_overrides(name: str, overrides: list[str], key: str | None, code: str) -> None:
    """The config `name` must be refused with these overrides, in one sentence of this code and key."""
    with refuses(code, key) as error:
        load_config(name, overrides)
    assert "\n" not in str(error.value)


@contextlib.contextmanager
def refuses(code: str | None, key: str | None = None) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """The block must raise a `UserError` of this code and, where one is given, of this key."""
    with pytest.raises(UserError) as caught:
        yield caught
    assert caught.value.code == code
    assert key is None or caught.value.key == key

"""Reader of the new lines of metrics.jsonl, and the file that remembers how far it has come."""

import json
import zlib
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from fastsiam.errors import UserError
from fastsiam.runtime.files import json_lines, read_json, replace_file

# Bytes before the offset by which a log is known again: some ten lines, with times in each of them.
_COMPARED = 4096
# What goes to the tracker at once, before the place is written.
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Place:
    """How far a log has been sent, and to where."""

    run_id: str = ""
    """Of the tracker's run; "" before it exists."""
    project: str = ""
    offset: int = 0
    """Bytes of whole lines that were read."""
    checksum: int = 0
    """CRC-32 of the last of them."""
    rows: int = 0
    """Lines that were sent."""
    sent: dict[str, int] = field(default_factory=dict)
    """Largest step that was sent, by kind of line."""
    repeated: dict[str, int] = field(default_factory=dict)
    """Steps up to which lines are not sent again, by kind: a resumption had cut the log back."""


def read_place(path: Path) -> Place:
    """The place that a file holds; a new one where there is no file, or a damaged one."""
    try:
        return Place(**read_json(path))
    except TypeError:
        return Place()


def write_place(path: Path, place: Place) -> None:
    """Raises `UserError` where the disk refuses: the lines would be sent twice."""
    try:
        replace_file(path, json.dumps(asdict(place)).encode())
    except OSError as error:
        raise UserError(
            f"RUN: cannot write {path} ({error.strerror or error}), which remembers what was sent; make the run folder "
            "writable",
            "place-unwritten",
        ) from error


def new_lines(log: Path, place: Place) -> tuple[list[dict], Place]:
    """Whole lines with a step that come after a place, some tens of kB of the log, and the place behind them.

    A resumed run cuts its log back to a checkpoint and writes on from there. The log is then read from its beginning,
    and lines of steps that were sent before are left out, since a tracker takes back nothing.
    """
    try:
        with open(log, "rb") as file:
            if not _goes_on(file, place):
                place = replace(place, offset=0, checksum=0, repeated=dict(place.sent))
            file.seek(place.offset)
            data = b"".join(line for line in file.readlines(_CHUNK) if line.endswith(b"\n"))
            if not data:
                return [], place
            end = place.offset + len(data)
            file.seek(max(0, end - _COMPARED))
            checksum = zlib.crc32(file.read(end - file.tell()))
    except FileNotFoundError:
        return [], place
    stepped = [line for line in json_lines(data) if isinstance(line.get("step"), int)]
    lines = [line for line in stepped if line["step"] > place.repeated.get(str(line.get("kind")), -1)]
    sent = dict(place.sent)
    for line in lines:
        sent[str(line.get("kind"))] = max(line["step"], sent.get(str(line.get("kind")), 0))
    return lines, replace(place, offset=end, checksum=checksum, rows=place.rows + len(lines), sent=sent)


def _goes_on(file, place):
    """False where the log no longer has what was read of it."""
    start = max(0, place.offset - _COMPARED)
    file.seek(start)
    before = file.read(place.offset - start)
    return len(before) == place.offset - start and zlib.crc32(before) == place.checksum

"""Copying of metrics.jsonl into a tracker until the run ends."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fastsiam.config.yaml_file import read
from fastsiam.errors import UserError
from fastsiam.follow.tail import Place, new_lines, read_place, write_place
from fastsiam.follow.trackers import Point, Tracker, open_tracker, texts_of
from fastsiam.run.reading import ending
from fastsiam.run.tensorboard import scalars

# Seconds between two looks at the log.
PAUSE = 5.0
PROJECT = "fastsiam"


def follow(folder: Path, to: str, project: str | None, offline: bool, memory: Path, say: Callable[[str], None]) -> str:
    """Copies the log of a run into a tracker until the run has ended; returns how it has, as `ending` does.

    `memory`: file that remembers what was sent. Raises `UserError` where the tracker cannot be opened.
    """
    place = read_place(memory)
    if place.project and project not in (None, place.project):
        raise UserError(
            f"--project: {folder} goes into {place.project} by {memory.name}; leave --project out, or delete that file "
            "to send the run to another project from its beginning",
            "other-project",
        )
    log = folder / "metrics.jsonl"
    ended = wait_for(folder, lambda: _has_news(log, place), f"lines of {log}", say)
    if ended:
        return ended
    tracker = open_tracker(to, folder, _config(folder), place.project or project or PROJECT, place.run_id, offline)
    ended = None
    try:
        place = replace(place, run_id=tracker.run_id, project=place.project or project or PROJECT)
        write_place(memory, place)
        say(f"follow    {folder} into {to} run {tracker.run_id}: {tracker.where}")
        ended = _copy(folder, log, tracker, place, memory, say)
        return ended
    finally:
        tracker.close(ended)


def wait_for(folder: Path, is_there: Callable[[], bool], what: str, say: Callable[[str], None]) -> str | None:
    """Waits until `is_there()`, and says once for what; returns how the run has ended where it ends before."""
    said = False
    while True:
        # Before the look: what was written until the end is seen.
        ended = ending(folder)
        if is_there():
            return None
        if ended:
            return ended
        if not said:
            say(f"waiting   for {what}")
            said = True
        time.sleep(PAUSE)


def _copy(folder: Path, log: Path, tracker: Tracker, place: Place, memory: Path, say) -> str:
    refused = False
    while True:
        # Before the log is read: what was written until the end is sent.
        ended = ending(folder)
        lines, after = new_lines(log, place)
        try:
            tracker.send(_points(lines, place.rows))
        except UserError as error:
            if not refused:
                say(f"warning: {error} every {PAUSE:g} s")
            refused, ended = True, None
        else:
            refused = False
            if after != place:
                place = after
                write_place(memory, place)
                continue
        if ended:
            return ended
        time.sleep(PAUSE)


def _has_news(log: Path, place: Place) -> bool:
    """True where a line is to be sent; after a resumption it may come behind many that were sent before."""
    while True:
        lines, after = new_lines(log, place)
        if lines or after == place:
            return bool(lines)
        place = after


def _points(lines: list[dict], rows: int) -> list[Point]:
    return [Point(row, line["step"], scalars(line), texts_of(line)) for row, line in enumerate(lines, rows)]


def _config(folder):
    try:
        return read(folder / "config.yaml")
    except (OSError, UserError):
        return {}

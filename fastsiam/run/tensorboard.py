"""TensorBoard's copy of metrics.jsonl: `tensorboard --logdir runs` shows every number of every run.

metrics.jsonl is the truth. Each of its lines gives one event with a scalar `kind/field` for every number in it, at the
line's `step`; strings, nulls and booleans have no scalar. Where the run is (`epoch`, `images_seen`, `train_seconds`,
`wall_seconds`) is told by the lines of kind `train` alone.

TensorBoard keeps scalars as 32-bit floats. Its package is imported when the first event is written.
"""

import io
import os
import socket
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from fastsiam.runtime.files import Appender

_WHERE = ("epoch", "images_seen", "train_seconds", "wall_seconds")
_PATTERN = "events.out.tfevents.*"


def scalars(line: dict) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl by their tag; none where the line has no step."""
    kind = line.get("kind")
    if not isinstance(kind, str) or not isinstance(line.get("step"), int):
        return {}
    left_out = ("kind", "step") if kind == "train" else ("kind", "step", *_WHERE)
    return {
        f"{kind}/{field}": float(value)
        for field, value in line.items()
        if field not in left_out and isinstance(value, int | float) and not isinstance(value, bool)
    }


class EventFiles:
    """The folder `tensorboard/` of a run, written by one process.

    What the disk does not take waits in memory and is tried again with the next line; `warn(sentence)` is told once.
    """

    def __init__(self, folder: Path, warn: Callable[[str], None]):
        self._folder, self._warn = folder, warn
        self._told = False
        self._file: Appender | None = None

    def begin(self, lines: Iterable[dict] = ()) -> None:
        """Take back the points that are there and write those of `lines`, which are the ones that metrics.jsonl has.

        The last of `lines` is taken to have been written now, and the others before it by their `wall_seconds`: the
        time between two starts of a run does not count.
        """
        self._file = None
        lines = list(lines)
        try:
            events = [_first_event(time.time())]
            ran = [line["wall_seconds"] for line in lines if isinstance(line.get("wall_seconds"), int | float)]
            seconds, start = 0.0, time.time() - max(ran, default=0.0)
            for line in lines:
                seconds = line.get("wall_seconds") or seconds
                events.append(_event(line, start + seconds))
        except ImportError as error:
            self._warn(f"no TensorBoard files are written: the package tensorboard cannot be imported ({error})")
            return
        try:
            for old in self._folder.glob(_PATTERN):
                # A TensorBoard that looks on stands still where the file that it reads is gone; from an empty one it
                # goes to the next.
                if old.stat().st_size:
                    os.truncate(old, 0)
                else:
                    old.unlink()
        except OSError as error:
            self._tell(error)
        # TensorBoard reads the files of a folder in the order of their names.
        name = _PATTERN.replace("*", f"{time.time_ns():020d}.{socket.gethostname()}.{os.getpid()}")
        self._file = Appender(self._folder / name)
        self._file.pending.append(b"".join(events))
        self._flush()

    def add(self, line: dict) -> None:
        """Mirror a line that metrics.jsonl has just been given; nothing before `begin`."""
        if self._file is None:
            return
        event = _event(line, time.time())
        if event:
            self._file.pending.append(event)
            self._flush()

    def close(self) -> None:
        """Try what waits a last time."""
        if self._file and self._file.pending:
            self._flush()

    def _flush(self):
        try:
            self._folder.mkdir(exist_ok=True)
        except OSError as error:
            self._tell(error)
            return
        error = self._file.flush()
        if error:
            self._tell(error)

    def _tell(self, error):
        if not self._told:
            # Set first: the warning is a line of metrics.jsonl itself, and comes here again.
            self._told = True
            self._warn(
                f"{self._folder} could not be written ({error.strerror or error}); its points wait in memory, and "
                "metrics.jsonl has them all"
            )


def _first_event(now: float) -> bytes:
    """The version of the format, and the word that makes a TensorBoard that is looking on forget what it has read."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    version = Event(wall_time=now, file_version="brain.Event:2")
    start = Event(wall_time=now, step=0, session_log=SessionLog(status=SessionLog.START))
    return _record(version) + _record(start)


def _event(line: dict, wall_time: float) -> bytes:
    """One record with the scalars of a line; empty where it has none."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars(line).items()]
    return _record(Event(wall_time=wall_time, step=line["step"], summary=Summary(value=values))) if values else b""


def _record(event) -> bytes:
    from tensorboard.summary.writer.record_writer import RecordWriter

    buffer = io.BytesIO()
    RecordWriter(buffer).write(event.SerializeToString())
    return buffer.getvalue()

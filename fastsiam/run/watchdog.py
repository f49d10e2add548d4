"""Watchdog that ends a hanging run and writes where it hangs, so that a scheduler can start it again.

A collective that one process never joins, a stuck file system or a decoder in a deadlock would otherwise hold the GPUs
until somebody looks.
"""

import contextlib
import datetime
import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from fastsiam.errors import ExitCode, Notice

STDERR = 2
# In the stacks that faulthandler writes.
STACK = b"most recent call first"
# The longest time between two looks at the clock, in seconds.
LOOK = 5.0
# What the ending itself (status.json on a file system that may be the one that hangs) gets, in seconds.
ENDING = 30.0


class Watchdog:
    """Ends the process with exit code 5 where no beat has come for `seconds`, inside the context.

    The stacks of all threads go to `folder/stacks-rank{rank}.txt` (added to those of earlier hangs; on stderr where
    that file cannot be written), `end` gets one sentence for the run's status, and stderr gets the same sentence. The
    main thread is stuck then: nothing of it is unwound, and no checkpoint is written.

    A main thread that holds Python's lock in C code keeps every Python thread from running, this one too. For that case
    faulthandler's C thread is always armed for a little later: it writes the stacks and ends the process with code 1,
    and `end` is not called. faulthandler has one such timer per process, and it belongs to this class meanwhile.

    A process that is stopped from outside (SIGSTOP) for longer than `seconds` counts as stuck when it continues.
    """

    def __init__(self, folder: Path, seconds: float, rank: int, end: Callable[[str], None]):
        self.path = folder / f"stacks-rank{rank}.txt"
        self._seconds = seconds
        self._rank = rank
        self._end = end
        self._look = min(seconds / 10, LOOK)
        self._last = time.monotonic()
        self._pauses = 0
        self._left = threading.Event()
        # The timer of faulthandler is armed by the watching thread and taken off by the main thread.
        self._arming = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._file: int | None = None
        self._size_before = 0

    def __enter__(self) -> "Watchdog":
        self._open()
        self.beat()
        self._arm()
        self._thread.start()
        return self

    def __exit__(self, *_):
        with self._arming:
            self._left.set()
            faulthandler.cancel_dump_traceback_later()
        self._thread.join()
        self.leave_nothing()
        if self._file != STDERR:
            os.close(self._file)

    def beat(self) -> None:
        """The run has moved: called after every step and every batch of an evaluation."""
        self._last = time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is watched inside the block, and the clock starts anew after it; blocks may be nested."""
        with self._arming:
            self._pauses += 1
            faulthandler.cancel_dump_traceback_later()
        try:
            yield
        finally:
            self.beat()
            with self._arming:
                self._pauses -= 1
            self._arm()

    def _watch(self):
        while not self._left.wait(self._look):
            self._arm()
            with self._arming:
                watching = not self._pauses and not self._left.is_set()
                is_stuck = watching and time.monotonic() - self._last >= self._seconds
            if is_stuck:
                self._finish()

    def _arm(self):
        """Two looks later than the watching thread: it comes first wherever Python threads run at all."""
        with self._arming:
            if not self._pauses and not self._left.is_set():
                self._dump_later(self._seconds + 2 * self._look)

    def _dump_later(self, seconds):
        faulthandler.dump_traceback_later(min(seconds, threading.TIMEOUT_MAX), exit=True, file=self._file)

    def _finish(self):
        # From here on the C thread watches the ending.
        self._dump_later(ENDING)
        where = self._dump()
        sentence = Notice(
            f"train.watchdog_seconds: no training step finished in {self._seconds:g} s; thread stacks are {where}; "
            "rerun the command to resume from the last checkpoint",
            "stuck",
        )
        # The other ranks wait for this one and are as late: torchrun would end them before their stacks are written.
        time.sleep(2 * self._look)
        try:
            with contextlib.suppress(OSError):
                os.write(STDERR, f"fastsiam: {sentence} [{sentence.code}]\n".encode())
            self._end(sentence)
        except OSError as error:
            os.write(STDERR, f"fastsiam: and its status is not written: {error}\n".encode())
        finally:
            os._exit(int(ExitCode.STUCK))

    def _dump(self):
        """Write the stacks; returns where they are, in words."""
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        line = f"{now}: no step for {self._seconds:g} s on rank {self._rank}\n".encode()
        try:
            os.write(self._file, line)
        except OSError:
            # faulthandler itself says nothing where it cannot write: a full disk shows here.
            self._file = STDERR
        faulthandler.dump_traceback(file=self._file)
        return "on stderr" if self._file == STDERR else f"in {self.path}"

    def _open(self):
        """Open the file now, since nothing can be opened while Python's lock is held, and say whose stacks it holds."""
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        first = (
            f"{now}: rank {self._rank}, process {os.getpid()} on {socket.gethostname()}, is watched: stacks below, if "
            f"there are any, were written when it had come to no step for {self._seconds:g} s\n"
        )
        try:
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            if STACK not in self.path.read_bytes():
                # Of a process that was killed: it did not hang.
                os.ftruncate(self._file, 0)
            self._size_before = os.fstat(self._file).st_size
            os.write(self._file, first.encode())
        except OSError as error:
            self._file = STDERR
            print(f"fastsiam: stacks of a hang would go to stderr: {error}", file=sys.stderr)

    def leave_nothing(self) -> None:
        """A run that did not hang leaves no line behind; may be called from any thread before the process ends."""
        if self._file == STDERR:
            return
        with contextlib.suppress(OSError):
            os.ftruncate(self._file, self._size_before)
            if not self._size_before:
                self.path.unlink()

    def forget_earlier(self) -> None:
        """The run has come to its end: stacks of hangs on the way there go, too, once the context is left."""
        self._size_before = 0


def remove_stacks_of_absent_ranks(folder: Path, world_size: int) -> None:
    """Those of ranks that an earlier start of the run had and this one does not."""
    here = {f"stacks-rank{rank}.txt" for rank in range(world_size)}
    for path in folder.glob("stacks-rank*.txt"):
        if path.name not in here:
            with contextlib.suppress(OSError):
                path.unlink()

"""Signals that ask a run to stop, as a flag that the loop reads between steps; and the second Ctrl-C."""

import io
import os
import signal
import sys
import threading
from collections.abc import Callable

# SIGUSR1 is what SLURM's --signal is usually set to.
_ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# As of a process that SIGINT has killed.
AT_ONCE = 128 + signal.SIGINT


# Of this process; a forked one would write into its parent's.
_pipes: list[int] = []


def _leave_the_parents_pipe():
    if _pipes:
        _pipes.clear()
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_leave_the_parents_pipe)


class StopSignals:
    """SIGTERM, SIGUSR1 and Ctrl-C ask for a checkpoint and the end; a Ctrl-C after one of them ends at once.

    SIGTERM and SIGUSR1 may come twice, from a scheduler and from torchrun. After a Ctrl-C a SIGTERM is the second one:
    that is what torchrun makes of it.

    Python calls a handler when the main thread comes back from C code, which a step, a compilation or a stuck decoder
    keeps for long. So a thread of its own reads the signals from a pipe that C code fills, and ends the process.
    """

    def __init__(self, speaks: bool = True, abandon: Callable[[], None] = lambda: None):
        """`speaks`: says on stderr that the signal was heard. `abandon()` leaves things in order before the end at
        once; it is called from another thread, and nothing of the main one is unwound.
        """
        self.received: int | None = None
        self._speaks, self.abandon = speaks, abandon
        self._before = {}
        self._pipe: tuple[int, int] | None = None

    def __enter__(self):
        if threading.current_thread() is not threading.main_thread():
            # Python delivers signals to the main thread only, and lets only that one ask for them.
            return self
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._wakeup_before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, args=(self._pipe[0],), name="signals", daemon=True)
        self._thread.start()
        _pipes.append(self._pipe[1])
        for number in _ASKING:
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._pipe is not None:
            signal.set_wakeup_fd(self._wakeup_before)
            _pipes.remove(self._pipe[1])
            # The end of the pipe is the end of the thread.
            os.close(self._pipe[1])
            self._thread.join()
            os.close(self._pipe[0])

    def _receive(self, number, _frame):
        if self.received is None:
            self.received = number

    def _listen(self, pipe):
        first = None
        while heard := os.read(pipe, 1):
            number = heard[0]
            if number not in _ASKING:
                continue
            if first is None:
                first = number
                self._say(b"stopping after this step, with a checkpoint; Ctrl-C now ends at once\n")
            elif number == signal.SIGINT or (number == signal.SIGTERM and first == signal.SIGINT):
                try:
                    self.abandon()
                    self._say(b"ended at once; rerun the command to resume from the last checkpoint, if there is one\n")
                finally:
                    os._exit(AT_ONCE)

    def _say(self, sentence):
        if not self._speaks:
            return
        try:
            os.write(sys.stderr.fileno(), sentence)
        except io.UnsupportedOperation:
            # A notebook's stderr is not a file.
            print(sentence.decode(), end="", file=sys.stderr, flush=True)

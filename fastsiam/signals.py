"""Signals that ask a run to stop, as a flag that the loop reads between steps."""

import os
import signal
import sys
import threading

# SIGUSR1 is what SLURM's --signal is usually set to.
_ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopSignals:
    """SIGTERM, SIGUSR1 and Ctrl-C ask for a checkpoint and the end; a Ctrl-C after one of them ends at once.

    SIGTERM and SIGUSR1 may come twice, from a scheduler and from torchrun. After a Ctrl-C a SIGTERM is the second one:
    that is what torchrun makes of it.
    """

    def __init__(self, speaks: bool = True):
        """`speaks`: says on stderr that the signal was heard."""
        self.received: int | None = None
        self._speaks = speaks
        self._before = {}

    def __enter__(self):
        if threading.current_thread() is not threading.main_thread():
            # Python delivers signals to the main thread only, and lets only that one ask for them.
            return self
        for number in _ASKING:
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number, _frame):
        if self.received is not None:
            return
        self.received = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if number == signal.SIGINT:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self._speaks:
            os.write(sys.stderr.fileno(), b"stopping after this step, with a checkpoint; Ctrl-C now ends at once\n")

"""Second processes: one that takes its turns in a comparison, and one for a single call.

They are for what a process has only once: its allocator, thread pools, workers.
"""

import contextlib
import ctypes
import multiprocessing
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

_PR_SET_PDEATHSIG = 1


def apart(function: Callable, *arguments):
    """Calls a module's function in a new process, whose memory, thread pools and workers end with it."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_end_with_parent) as pool:
        return pool.submit(function, *arguments).result()


def _end_with_parent():
    """A benchmark that is killed leaves no process behind that would slow the next start down (Linux, prctl(2))."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Aside:
    """`build(name, *arguments, stack)` is called there for each name that is bound, and gives a function of an index.

    A call costs the time of the function and 0.1 ms for the way there and back. What `build` enters into `stack` is
    left when the context ends. An exception ends the process there, with its traceback on stderr, and is a
    `RuntimeError` here.
    """

    def __init__(self, build: Callable, *arguments):
        context = multiprocessing.get_context("spawn")
        self._here, self._there = context.Pipe()
        self._process = context.Process(target=_serve, args=(self._there, build, arguments), daemon=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._process.pid is None:
            return
        with contextlib.suppress(OSError):
            self._here.send(None)
        self._process.join(30)
        self._process.kill()

    def bind(self, name: str) -> Callable[[int], None]:
        """Builds `name` there; the first call starts the process."""
        if self._process.pid is None:
            self._process.start()
            # Open in one process only, so that its end is seen here.
            self._there.close()
        self._ask(name, None)
        return lambda index: self._ask(name, index)

    def _ask(self, name, index):
        try:
            self._here.send((name, index))
            self._here.recv()
        except (EOFError, OSError):
            self._process.join()
            raise RuntimeError(f"{name}: the process aside has ended with code {self._process.exitcode}") from None


def _serve(pipe, build, arguments):
    built = {}
    with contextlib.ExitStack() as stack:
        while (asked := pipe.recv()) is not None:
            name, index = asked
            if index is None:
                built[name] = build(name, *arguments, stack)
            else:
                built[name](index)
            pipe.send(None)

"""A second process that takes its turns in a comparison: for variants that differ in what a process has only once."""

import contextlib
import multiprocessing
import traceback
from collections.abc import Callable


class Aside:
    """`build(name, *arguments, stack)` is called there for each name that is bound, and gives a function of an index.

    A call costs the time of the function and 0.1 ms for the way there and back. What `build` enters into `stack` is
    left when the context ends. An exception there is raised here as `RuntimeError` with its traceback.
    """

    def __init__(self, build: Callable, *arguments):
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, build, arguments), daemon=True)

    def __enter__(self):
        self._process.start()
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError):
            self._here.send(None)
        self._process.join(30)
        self._process.kill()

    def bind(self, name: str) -> Callable[[int], None]:
        """Builds `name` there."""
        self._ask(name, None)
        return lambda index: self._ask(name, index)

    def _ask(self, name, index):
        self._here.send((name, index))
        try:
            error = self._here.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"{name}: the process aside has ended with code {self._process.exitcode}") from None
        if error:
            raise RuntimeError(f"{name}, in the process aside:\n{error}")


def _serve(pipe, build, arguments):
    built = {}
    with contextlib.ExitStack() as stack:
        while (asked := pipe.recv()) is not None:
            name, index = asked
            try:
                if index is None:
                    built[name] = build(name, *arguments, stack)
                else:
                    built[name](index)
            # Told to the other side, whatever it is.
            except Exception:
                pipe.send(traceback.format_exc())
            else:
                pipe.send(None)

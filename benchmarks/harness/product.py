"""Training of the product, one step a call: `fastsiam.train.train` runs in a thread that pauses between its steps."""

import contextlib
import io
import tempfile
import threading
from collections.abc import Iterator

from fastsiam.config import Config
from fastsiam.runtime.distributed import World
from fastsiam.train import Parts, opened, train

# More epochs than a benchmark takes: the loop must not end by itself.
_EPOCHS = 1_000_000
_DAY = 86_400.0


class ProductRun:
    """Run of a config without evaluation, in a temporary folder; each call takes one step of the product's own loop.

    A call waits for the next batch, schedules, steps, logs and checks. Between calls the loop stands still, and its
    loader prepares what it prepares ahead. The change of threads costs 0.05 ms a call. Errors of the loop are raised by
    the call. Leave the run through `with` or `close`.
    """

    def __init__(self, config: Config, world: World | None = None):
        """Opens the run and returns before its first step; on several ranks all must call.

        `world`: the ranks, which have joined; None: this process alone. Raises `UserError` as `fastsiam.pretrain` does.
        """
        self.parts: Parts | None = None
        self._world = world or World()
        self._folder = tempfile.TemporaryDirectory()
        values = {
            "run.dir": self._world.share(self._folder.name),
            "run.name": "run",
            "data.val": None,
            "train.max_steps": None,
            "train.watchdog_seconds": _DAY,
        }
        if config.budget is None:
            values["train.epochs"] = _EPOCHS
        self.config = config.with_values(values)
        self._go, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._ends = self._owes_step = False
        self._thread = threading.Thread(target=self._run, name="product", daemon=True)
        self._thread.start()
        self._wait_for_pause()

    def __enter__(self) -> "ProductRun":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __call__(self, _index: int = 0) -> None:
        """Takes one step; its device work may still be under way."""
        self._go.release()
        self._wait_for_pause()

    def close(self) -> None:
        self._ends = True
        self._go.release()
        self._thread.join()
        self._folder.cleanup()

    def epoch(self, progress) -> Iterator:
        """Batches of the run's data, as `train` asks for them; pauses before each of them."""
        batches = self.parts.data.epoch(progress)
        while True:
            if not self._owes_step:
                self._paused.release()
                self._go.acquire()
            if self._ends:
                raise _Ended
            # The end of an epoch is part of the call that takes the first step of the next one.
            self._owes_step = (batch := next(batches, None)) is None
            if batch is None:
                return
            yield batch

    def _wait_for_pause(self):
        self._paused.acquire()
        if self._error is not None:
            raise self._error

    def _run(self):
        try:
            with contextlib.ExitStack() as stack:
                # The screen would show the lines of several runs in turn; metrics.jsonl is written as in any run.
                with contextlib.redirect_stdout(io.StringIO()):
                    self.parts, _ = stack.enter_context(opened(self.config, self._world))
                self.parts.run.journal.console.quiet = True
                train(self.config, self, *self.parts[1:])
        except _Ended:
            pass
        except BaseException as error:
            self._error = error
            self._paused.release()


class _Ended(Exception):
    """Raised in the loop when the run is closed."""

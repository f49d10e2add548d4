"""Copy of metrics.jsonl for TensorBoard: `tensorboard --logdir runs` plots every number of every run.

metrics.jsonl is the truth. Each number of a line with a step is a scalar `kind/field`; strings, nulls and booleans are
not. Only lines of kind `train` have scalars for the position of the run (`epoch`, `images_seen`, `train_seconds`,
`wall_seconds`). TensorBoard keeps scalars as 32-bit floats.
"""

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fastsiam.errors import Notice

_POSITION = ("epoch", "images_seen", "train_seconds", "wall_seconds")


def scalars(line: dict) -> dict[str, float]:
    """Returns the numbers of a line of metrics.jsonl by their tag; none where the line has no step."""
    kind = line.get("kind")
    if not isinstance(kind, str) or not isinstance(line.get("step"), int):
        return {}
    excluded = ("kind", "step") if kind == "train" else ("kind", "step", *_POSITION)
    return {
        f"{kind}/{field}": float(value)
        for field, value in line.items()
        if field not in excluded and isinstance(value, int | float) and not isinstance(value, bool)
    }


def _wait_for_a_later_second(folder):
    """TensorBoard reads files in the order of their names: second, host, process and a count, all compared as text.

    Of two starts in one second the later may be read first: count 10 comes before 9 (tensorboard 2.21). A clock that
    was set back by more is not waited for.
    """
    names = (re.match(r"events\.out\.tfevents\.(\d+)\.", path.name) for path in folder.glob("events.out.*"))
    newest = max((int(name[1]) for name in names if name), default=0)
    remaining = newest + 1 - time.time()
    if 0 < remaining <= 1:
        time.sleep(remaining)


class EventFiles:
    """Folder `tensorboard/` of a run, written by one process.

    A disk that refuses a point ends the writing until the next start; `warn` gets one notice.
    """

    def __init__(self, folder: Path, warn: Callable[[Notice], None]):
        self._folder, self._warn = folder, warn
        self._writer = None
        self._purges_from: int | None = None
        """Step from which the next file takes back points; None where no file is to be made."""

    def begin(self, lines: Sequence[dict] = ()) -> None:
        """Starts a file after `lines`, all that metrics.jsonl has; TensorBoard then forgets the points after them.

        That of a new run is made with its first point: the import of TensorBoard, 0.2 s, is not before the first step.
        """
        self.close()
        self._purges_from = max((line["step"] for line in lines if scalars(line)), default=0)
        # Purging goes by whole steps, and a step may have lines before and after a checkpoint.
        again = [line for line in lines if line.get("step") == self._purges_from]
        if lines:
            self._open()
        for line in again:
            self.add(line)

    def add(self, line: dict) -> None:
        """Copies a line that metrics.jsonl has just been given; nothing before `begin`."""
        points = scalars(line)
        if points and self._purges_from is not None:
            self._open()
        if self._writer is None:
            return
        try:
            for tag, value in points.items():
                self._writer.add_scalar(tag, value, line["step"])
            self._writer.flush()
        except OSError as error:
            self._stop(error)

    def _open(self):
        purge_step, self._purges_from = self._purges_from, None
        try:
            from torch.utils.tensorboard import SummaryWriter

            _wait_for_a_later_second(self._folder)
            self._writer = SummaryWriter(str(self._folder), purge_step=purge_step)
        except ImportError as error:
            self._warn(Notice(f"TensorBoard files are not written: {error}; pip install tensorboard", "no-tensorboard"))
        except OSError as error:
            self._stop(error)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _stop(self, error):
        # Set first: the notice is a line of metrics.jsonl itself, and comes here again.
        self._writer = None
        text = f"{self._folder} cannot be written ({error.strerror or error}); metrics.jsonl has all points"
        self._warn(Notice(text, "tensorboard-unwritten"))

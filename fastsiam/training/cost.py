"""What a run has cost so far: seconds of its processes and joules of its GPUs, over all its starts.

Counted from the start of the process, compilation, evaluation and saving included, and so is work that a kill has lost:
a file in the run folder is brought up to date every few seconds. The time between two processes is not counted.
"""

import json
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from fastsiam.config.budget import JOULES, Budget
from fastsiam.run.folder import parse_metrics
from fastsiam.runtime.energy import kilowatt_hours
from fastsiam.runtime.files import replace_file

_IMPORTED = time.monotonic()
HEARTBEAT_SECONDS = 5.0
# Of a budget, which bounds what a kill can hide from it.
HEARTBEAT_SHARE = 0.005


def heartbeat_seconds(budget: Budget) -> float:
    """Between two writes: 5, and less where a kill could hide a noticeable share of a budget."""
    if budget.kind != "seconds":
        return HEARTBEAT_SECONDS
    return min(HEARTBEAT_SECONDS, HEARTBEAT_SHARE * budget.amount)


def process_began() -> float:
    """When this process came to fastsiam, by `time.monotonic`; importing torch comes after it.

    The kernel's own starttime (proc(5)) is that of a shell which has become this process by exec, and of what it did
    before: in `install && python -m fastsiam.train` bash does so, and the installation would count.
    """
    return _IMPORTED


class Spent:
    """Counts on while it is open; the first rank has one with a file, the others one without."""

    def __init__(
        self,
        folder: Path | None,
        warn: Callable[[str], None] = warnings.warn,
        *,
        began: float | None = None,
        every: float = HEARTBEAT_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`folder`: the run's, None for a rank that writes nothing. `warn(sentence)` is told where its file is damaged.
        `began`: when this process began to spend, by `clock`; None: now. `every`: seconds between two writes.
        """
        self._path = None if folder is None else folder / "spent.json"
        self._every, self._clock = every, clock
        self._began = clock() if began is None else began
        self.seconds_before, self.joules_before = _read(self._path, warn)
        self._joules: float | None = None
        self._left = threading.Event()
        self._thread: threading.Thread | None = None
        self.error: OSError | None = None
        """Why the file could not be written the last time."""

    def begin(self) -> None:
        """The run folder is there: keep its file up to date from now on."""
        if self._path is not None:
            self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
            self._thread.start()

    def close(self) -> None:
        if self._thread is not None:
            self._left.set()
            self._thread.join()
            self._thread = None

    @property
    def seconds(self) -> float:
        return self.seconds_before + self._clock() - self._began

    @property
    def joules(self) -> float | None:
        """As of the last `set_joules`; None where it is not known for the whole run."""
        return None if self._joules is None or self.joules_before is None else self.joules_before + self._joules

    def set_joules(self, joules: float | None) -> None:
        """What the GPUs of all ranks have used since the start of this process; None where that is not known."""
        self._joules = joules

    def joules_per_image(self, images: int) -> float | None:
        """Of the whole run, evaluation and lost work included."""
        return None if self.joules is None or not images else self.joules / images

    def fields(self, joules_per_image: float | None) -> dict[str, float | None]:
        """What metrics.jsonl says of it."""
        return {
            "spent_seconds": self.seconds,
            "joules_per_image": joules_per_image,
            "kwh": None if self.joules is None else kilowatt_hours(self.joules),
        }

    def write(self) -> None:
        text = json.dumps({"seconds": self.seconds, "joules": self.joules})
        try:
            replace_file(self._path, text.encode())
            self.error = None
        except OSError as error:
            self.error = error

    def _beat(self):
        self.write()
        while not self._left.wait(self._every):
            self.write()
        self.write()


def _read(path, warn):
    """Seconds and joules that earlier starts have written down."""
    if path is None or not path.exists():
        return 0.0, 0.0
    try:
        found = json.loads(path.read_text(encoding="ascii"))
        return float(found["seconds"]), None if found["joules"] is None else float(found["joules"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        warn(f"{path} cannot be read ({error}); what the run has spent is taken from the last line of metrics.jsonl")
        return _as_logged(path.with_name("metrics.jsonl"))


def _as_logged(path):
    """Seconds and joules of the last line of metrics.jsonl that tells them."""
    lines = parse_metrics(path.read_bytes()) if path.exists() else []
    told = next((line for line in reversed(lines) if "spent_seconds" in line), {})
    kwh = told.get("kwh")
    return told.get("spent_seconds", 0.0), None if kwh is None else kwh * JOULES["kWh"]

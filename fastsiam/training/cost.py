"""Cost of a run: seconds of its processes and joules of its GPUs, over all its starts.

Counted from the start of the process, compilation, evaluation and saving included. The time between two processes is
not counted.
"""

import json
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from fastsiam.config.budget import JOULES, Budget
from fastsiam.errors import Notice
from fastsiam.runtime.energy import EnergyMeter, kilowatt_hours
from fastsiam.runtime.files import json_lines, replace_file

_IMPORTED = time.monotonic()
HEARTBEAT_SECONDS = 5.0
# Of a budget, which bounds what a kill can hide from it.
HEARTBEAT_SHARE = 0.005


def heartbeat_seconds(budget: Budget) -> float | None:
    """Seconds between two writes of spent.json, so that a kill hides no noticeable share of a budget.

    None for a budget of epochs or images, to which the cost does not matter: the file is written at the end only.
    """
    if budget.counts_steps:
        return None
    return min(HEARTBEAT_SECONDS, HEARTBEAT_SHARE * budget.amount) if budget.kind == "seconds" else HEARTBEAT_SECONDS


def process_began() -> float:
    """Time at which this process imported fastsiam, by `time.monotonic`; importing torch comes after it.

    The kernel's own starttime (proc(5)) is that of a shell which has become this process by exec, and of what it did
    before: in `install && python -m fastsiam.train` bash does so, and the installation would count.
    """
    return _IMPORTED


class CostMeter:
    """Counts seconds and joules; the first rank has one with a file, the others one without."""

    def __init__(
        self,
        folder: Path | None = None,
        energy: EnergyMeter | None = None,
        *,
        warn: Callable[[str], None] = warnings.warn,
        collect: Callable[[float | None], list] = lambda joules: [joules],
        began: float | None = None,
        every: float | None = HEARTBEAT_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`folder`: the run's, None for a rank that writes nothing. `energy`: meter of this rank's GPU; `collect` gives
        the joules of all ranks. `warn(notice)` is called for a damaged file. `began`: when this process began to
        spend, by `clock`; None: now. `every`: seconds between two writes, None for one at the end.
        """
        self.opened = time.perf_counter()
        self._path = None if folder is None else folder / "spent.json"
        self.energy = energy or EnergyMeter(None, "not available", warn)
        self._collect, self._every, self._clock = collect, every, clock
        self._began = clock() if began is None else began
        self.seconds_before, self.joules_before = _read(self._path, warn)
        self._joules: float | None = None
        self._left = threading.Event()
        self._thread: threading.Thread | None = None
        self.error: OSError | None = None
        """Why the file could not be written the last time."""

    def __enter__(self) -> "CostMeter":
        """Keep the file up to date; the run folder must exist."""
        if self._path is None:
            return self
        self.write()
        if self._every is not None:
            self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._left.set()
        if self._thread is not None:
            self._thread.join()
        if self._path is not None:
            self.write()

    @property
    def seconds(self) -> float:
        return self.seconds_before + self._clock() - self._began

    @property
    def joules(self) -> float | None:
        """As of the last `read_energy`; None where it is not known for the whole run."""
        return None if self._joules is None or self.joules_before is None else self.joules_before + self._joules

    def read_energy(self) -> None:
        """Add up the joules of the GPUs of all ranks; all ranks must call."""
        joules = self._collect(self.energy.joules())
        self._joules = None if None in joules else sum(joules)

    def set_energy(self, joules: float | None) -> None:
        """Take `joules` for those of the whole run, until the next reading."""
        self._joules = None if None in (joules, self.joules_before) else joules - self.joules_before

    @property
    def lost_energy(self) -> bool:
        """True once the GPU of a rank has stopped answering, as of the last `read_energy`."""
        return self._joules is None

    def joules_per_image(self, images: int) -> float | None:
        """Joules per image of the whole run, evaluation and lost work included."""
        return None if self.joules is None or not images else self.joules / images

    def fields(self, joules_per_image: float | None) -> dict[str, float | None]:
        """Fields of lines of metrics.jsonl."""
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
        while not self._left.wait(self._every):
            self.write()


def _read(path, warn):
    """Seconds and joules of earlier starts.

    The last line of metrics.jsonl may be newer than the file, which a killed run without a heartbeat has not written.
    """
    if path is None:
        return 0.0, 0.0
    logged = _as_logged(path.with_name("metrics.jsonl"))
    if not path.exists():
        return logged or (0.0, 0.0)
    try:
        found = json.loads(path.read_text(encoding="ascii"))
        written = float(found["seconds"]), None if found["joules"] is None else float(found["joules"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        warn(Notice(f"cannot read {path} ({error}); the cost so far is that of the last log line", "damaged-cost"))
        return logged or (0.0, None)
    return logged if logged and logged[0] > written[0] else written


def _as_logged(path):
    """Seconds and joules of the last line of metrics.jsonl that holds them; None without one."""
    try:
        lines = json_lines(path.read_bytes())
    except OSError:
        return None
    last = next((line for line in reversed(lines) if "spent_seconds" in line), None)
    if last is None:
        return None
    kwh = last.get("kwh")
    return last["spent_seconds"], None if kwh is None else kwh * JOULES["kWh"]

"""One run of a sweep as a process of its own: started, watched, asked to stop, and read when it has ended."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from fastsiam.errors import ExitCode
from fastsiam.report.read_run import Run, open_run
from fastsiam.run.folder import read_status
from fastsiam.runtime.files import json_lines, replace_file
from fastsiam.sweep.ledger import Ended
from fastsiam.sweep.plan import Plan, Variant, config_path

TRAINER = (sys.executable, "-m", "fastsiam.train")
_STATUSES = {
    ExitCode.DONE: "done",
    ExitCode.USER_ERROR: "refused",
    ExitCode.COLLAPSED: "collapsed",
    ExitCode.NOT_FINITE: "not finite",
    ExitCode.STUCK: "stuck",
}
_SET_PDEATHSIG = 1
# Bytes of the end of a file that hold its last lines.
_TAIL = 16_384


class Child:
    """A process that trains one variant to the end of a round."""

    def __init__(
        self,
        plan: Plan,
        variant: Variant,
        number: int,
        environment: Mapping[str, str],
        overrides: Sequence[str],
        trainer: Sequence[str] = TRAINER,
    ):
        """`number`: of the round. `trainer`: the command, to which `--config FILE key=value ...` is added."""
        self.variant, self.number, self._plan = variant, number, plan
        self.folder = plan.folder / variant.name
        self.log = plan.folder / "logs" / f"{variant.name}.log"
        config = config_path(plan, variant)
        for path in (self.log, config):
            path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(config, plan.config_of(variant).to_yaml().encode())
        stop = [f"train.max_share={plan.rounds[number].share}"] if len(plan.rounds) > 1 else []
        self._begins = self.log.stat().st_size if self.log.exists() else 0
        parent = os.getpid()
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                [*trainer, "--config", str(config), *stop, *overrides],
                env=dict(environment), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                # A Ctrl-C of the terminal reaches the sweep alone, which passes it on once.
                start_new_session=True, preexec_fn=lambda: _end_with(parent),
            )  # fmt: skip

    def stop(self, number: int) -> None:
        """Passes a signal on; the first asks the run to save and to end, a Ctrl-C after it ends it at once."""
        if self._process.poll() is None:
            self._process.send_signal(number)

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def was_stopped(self) -> bool:
        """True where a signal has ended the run, with a checkpoint or before it had anything to save."""
        code = self._process.returncode
        asked = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
        return -code in asked or code - 128 in asked

    @property
    def progress(self) -> float:
        """Share of this round that is done, by the run's log."""
        lines = json_lines(_tail(self.folder / "metrics.jsonl"))
        found = next((line["progress"] for line in reversed(lines) if line.get("kind") == "train"), 0.0)
        end, stretch = self._plan.rounds[self.number].share, self._plan.stretch(self.number)
        return min(max((found - (end - stretch)) / stretch, 0.0), 1.0)

    def ended(self) -> Ended:
        """Returns how the run has ended, with its numbers."""
        code, variant = self._process.returncode, self.variant
        status = _STATUSES.get(code, "crashed")
        numbers = {}
        if status not in ("refused", "crashed") and (self.folder / "config.yaml").exists():
            numbers = numbers_of(open_run(self.folder, variant.name), status == "done")
        reason = read_status(self.folder).get("reason") if status in ("collapsed", "not finite", "stuck") else None
        said = "" if status == "done" else reason or self._last_words()
        return Ended(variant.name, variant.label, variant.seed, self.number, status, code, said, **numbers)

    def _last_words(self):
        """The sentence of the error; of a traceback its last line."""
        code = self._process.returncode
        with open(self.log, "rb") as file:
            file.seek(self._begins)
            lines = file.read().decode(errors="replace").splitlines()
        sentences = [line for line in lines if line.startswith("fastsiam: ")] or [
            line for line in lines if line.strip()
        ]
        said = sentences[-1].removeprefix("fastsiam: ").strip() if sentences else "it printed nothing"
        if code < 0:
            name = signal.Signals(-code).name
            of_memory = ", as the kernel does where memory is short" if name == "SIGKILL" else ""
            said = f"killed by {name}{of_memory}; its last line: {said}"
        return said


def numbers_of(run: Run, is_done: bool) -> dict:
    """Returns the numbers of a run folder as fields of `Ended`; kNN and RankMe only of a run that is done."""
    images, seconds = run.last("images_seen"), run.last("train_seconds")
    step = run.status.get("step")
    # Those of the end, and not earlier ones where features are not finite.
    at_end = [line for line in run.lines if line.get("step") == step and "control" not in line] if is_done else []
    return {
        **{name: next((line[name] for line in at_end if name in line), None) for name in ("knn_top1", "rankme")},
        "loss": run.last("loss", "train"),
        "std_ratio": run.last("std_ratio", "collapse", "end"),
        "images_per_second": images / seconds if images and seconds else None,
        "seconds": run.last("spent_seconds"),
        "step": step,
    }


def is_held(folder: Path) -> bool:
    """True while a process trains in a run folder, such as one that a killed sweep has left and that still saves."""
    if not (folder / "lock").exists():
        return False
    try:
        with FileLock(folder / "lock").acquire(blocking=False):
            return False
    except Timeout:
        return True


_libc = ctypes.CDLL(None)


def _end_with(parent):
    """In the child, before it becomes the trainer: it saves and ends where the sweep is killed (prctl(2))."""
    _libc.prctl(_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(128 + signal.SIGTERM)


def _tail(path):
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
            return file.read()
    except OSError:
        return b""

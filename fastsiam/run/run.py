"""An open run: its folder, log, checkpoints, clocks and watchdog."""

import contextlib
import functools
import os
import socket
from collections.abc import Callable, Iterator
from typing import NamedTuple

from fastsiam.config import Config
from fastsiam.errors import ExitCode, Notice, UserError
from fastsiam.optim.build import large_batch_warning
from fastsiam.run import resume
from fastsiam.run.checkpoint import Checkpoints
from fastsiam.run.console import described, opening_lines
from fastsiam.run.evaluation_schedule import EvaluationSchedule
from fastsiam.run.start import Start
from fastsiam.run.stop_signals import StopSignals
from fastsiam.run.train_log import TrainLog
from fastsiam.run.watchdog import Watchdog
from fastsiam.runtime.distributed import is_lost_peer
from fastsiam.training.data_wait import data_wait_on
from fastsiam.training.step import Reading, TrainingStep
from fastsiam.training.timing import Stopwatch


class Asked(NamedTuple):
    """Requests of any rank, known to all ranks after a step."""

    signal: int | None
    """Number of the signal that asks for the end."""
    save: bool
    """A checkpoint is due."""
    show: bool
    """A line on the screen is due."""


class Run:
    """Writes what a run leaves behind. One for each rank, which call the same methods in the same order."""

    def __init__(self, config: Config, start: Start, stack: contextlib.ExitStack, signals: StopSignals):
        """Takes parts that are open already; see `open`."""
        self.config, self.signals, self.on_close = config, signals, stack.callback
        runtime, data, progress, folder, self._saved, journal, weights = start
        self._weight_lines = weights.lines() if weights else []
        self.runtime, self.data, self.progress, self.folder, self.journal = runtime, data, progress, folder, journal
        path, world = folder.path, runtime.world
        self.clock = Stopwatch(progress.state, data_wait_on(runtime.device), progress.cost.opened)
        self.log = TrainLog(data, progress, self.clock, journal)
        self.watchdog = stack.enter_context(Watchdog(path, config.train.watchdog_seconds, world.rank, self.fail))
        self.checkpoints = Checkpoints(path, config.checkpoint, progress, world.is_first, journal.warn)
        self.signal: int | None = None
        self.reason: str | None = None
        """Why the run has failed."""

    @classmethod
    @contextlib.contextmanager
    def open(cls, config: Config, start: Start) -> Iterator["Run"]:
        """Enter the run folder, and leave it in order, whatever ends the block; all ranks must call.

        SIGTERM, SIGUSR1 and Ctrl-C are noted for `ask_ranks` meanwhile. Raises `UserError` where the folder cannot be
        entered.
        """
        world, folder, journal = start.runtime.world, start.folder, start.journal
        with contextlib.ExitStack() as stack:
            signals = stack.enter_context(StopSignals(world.is_first))
            stack.callback(folder.close)
            stack.callback(journal.close)
            with world.together():
                if world.is_first:
                    folder.open(described(start.runtime, start.data, start.progress.cost))
            # Read first: entered, it writes spent.json, where earlier starts have their energy.
            start.progress.read_energy()
            stack.enter_context(start.progress.cost)
            run = cls(config, start, stack, signals)
            signals.abandon = run.abandon
            try:
                run.set_status("running", pid=os.getpid(), host=socket.gethostname())
                journal.attach(folder.write, run._where)
                yield run
            except BaseException as error:
                _note(run, error)
                raise

    def begin(self, step: TrainingStep, evaluation: EvaluationSchedule) -> None:
        """Print the first lines, then restore the checkpoint of an earlier start, or begin a new run."""
        config, data, world, journal = self.config, self.data, self.runtime.world, self.journal
        saved = self._saved
        lines = opening_lines(config, self.runtime, data, f"run folder {self.folder.path}")
        for line in (*lines, *self._weight_lines):
            journal.say(line)
        elsewhere = None
        if not saved and world.is_first:
            elsewhere = resume.same_run_elsewhere(config, self.folder, data.identity)
        for warning in filter(None, (elsewhere, large_batch_warning(config))):
            journal.warn(warning)
        with world.together():
            if saved:
                resume.restore(saved, self.folder, world, step, evaluation.guard, evaluation.linear)
                _report_resumption(self, saved)
            elif world.is_first:
                self.folder.write_header()
        if not self.progress.budget.counts_steps:
            # Here the first kNN may come in mid-epoch.
            evaluation.measure_controls()
        self.progress.agree()
        journal.begin_progress("decoding the first batch (on the first run numba compiles for about 15 s)")

    def finished_step(self, step: TrainingStep) -> None:
        """After each step: the watchdog, the clock, and a line for what was compiled."""
        self.watchdog.beat()
        self.clock.split("step")
        if step.compiled is not None and (news := step.compiled.take_news()):
            self.journal.write("compile", **news)

    def ask_ranks(self) -> Asked:
        """One exchange between the ranks after a step: their requests, and the progress by time or energy."""
        asked = (0, 0)
        if self.runtime.world.is_first:
            asked = int(self.checkpoints.is_due()), int(self.journal.progress_is_due())
        received = self.signals.received or 0
        signal, save, show, measured = self.runtime.world.largest(received, *asked, self.progress.measure())
        self.progress.update(measured)
        self.signal = signal or None
        return Asked(self.signal, bool(save), bool(show))

    def must_read(self, asked: Asked) -> bool:
        """True where the numbers of this step are logged, shown or saved."""
        return self._log_is_due or any(asked)

    def read(self, step: TrainingStep, evaluation: EvaluationSchedule) -> Reading:
        """Read the last steps back from the device, which waits for it; shares bad files between the ranks."""
        reading = step.read()
        # The device has finished the steps before: the time belongs to them.
        self.clock.split("step")
        if reading.is_nonfinite:
            self.reason = _write_bad_batch(self, reading)
        evaluation.write_pictures()
        self.data.bad_files.exchange()
        return reading

    def log_step(self, reading: Reading, rate: float, asked: Asked, evaluation: EvaluationSchedule) -> None:
        """Write and show the numbers of a step where that is due; `rate`: its learning rate."""
        if self._log_is_due:
            self.log.write(reading, rate)
            evaluation.log_linear()
        if asked.show or self.progress.is_over:
            self.log.show(reading, evaluation.measures, evaluation.linear)

    def save_on_the_way(self, step: TrainingStep, evaluation: EvaluationSchedule) -> None:
        self.checkpoints.save_on_the_way(self.contents(step, evaluation))

    def save_before_evaluation(self, step: TrainingStep, evaluation: EvaluationSchedule) -> None:
        """Save at the end of an epoch that an evaluation follows, and of the run, where the last checkpoint is old.

        A kill would lose spent time or energy, with which the steps could not be trained again.
        """
        contents = self.contents(step, evaluation)
        if self.progress.is_over and not self.progress.budget.counts_steps:
            self.checkpoints.save_unless_recent(contents, seconds=0)
        elif self.progress.is_over or evaluation.follows(self.progress.state.epoch + 1):
            self.checkpoints.save_unless_recent(contents)

    def evaluate_epoch(self, evaluation: EvaluationSchedule) -> None:
        """Measure kNN and the spectrum between two epochs, where they are due."""
        if evaluation.follows(self.progress.state.epoch):
            # Decoders and their buffers would otherwise lie beside those of the evaluation.
            self.data.close()
            self._evaluate(evaluation)

    def evaluate_early(self, step: TrainingStep, evaluation: EvaluationSchedule) -> None:
        """Measure kNN, or the spectrum, in mid-epoch, where a budget of time or energy must know its cost."""
        if evaluation.is_wanted_early:
            # However recent the last: what a checkpoint costs must be known too, and there may have been none.
            self.checkpoints.save_unless_recent(self.contents(step, evaluation), seconds=0)
            self._evaluate(evaluation)

    def abandon(self) -> None:
        """Leave in order what can be left while the main thread is stuck, at a second Ctrl-C."""
        self.watchdog.leave_nothing()
        # One that has ended is writing its report.
        if self.folder.status().get("status") == "running":
            text = "ended at once by a second Ctrl-C; rerun the command to resume from the last checkpoint"
            self.fail(Notice(text, "second-interrupt"))
        self.journal.give_back_cursor()

    @property
    def _log_is_due(self):
        return self.progress.is_over or self.progress.state.step % self.config.train.log_every_steps == 0

    def contents(self, step, evaluation) -> Callable[[], dict]:
        self.clock.update_state()
        return functools.partial(
            resume.contents,
            self.config,
            self.data,
            self.progress,
            self.folder,
            step,
            evaluation.guard,
            evaluation.linear,
        )

    def _where(self):
        self.clock.update_state()
        return self.progress.state.where()

    def _evaluate(self, evaluation):
        self.journal.doing("measuring kNN" if evaluation.has_knn else "measuring the spectrum")
        evaluation.measure_features()
        self.progress.agree()
        self.data.bad_files.exchange()

    def set_status(self, status, **details):
        if self.runtime.world.is_first:
            self.folder.set_status(status, **details)

    def fail(self, reason, **details):
        """Any rank may write it, for the first may be the one that has gone."""
        code = {"code": reason.code} if isinstance(reason, Notice) else {}
        self.folder.set_status("failed", step=self.progress.state.step, reason=reason, **code, **details)


def _report_resumption(run: Run, saved: dict) -> None:
    journal, state, runtime = run.journal, run.progress.state, run.runtime
    journal.write("resume", world_size=runtime.world.size)
    journal.say(f"resume    at step {state.step:,}, epoch {state.epoch + 1}, image {state.cursor:,}")
    computation = resume.changed_computation(saved["computation"], resume.computation(runtime))
    for warning in filter(None, (computation, resume.changed_budget(saved["budget"], run.config))):
        journal.warn(warning)
    # It holds the weights a second time.
    saved.clear()


def _write_bad_batch(run: Run, reading: Reading) -> str:
    """Write the files of the first step whose loss was not finite, of the ranks where it was not; returns why."""
    names_by_rank = run.runtime.world.collect(run.data.names(reading.bad_images))
    path = run.folder.path / "nonfinite.txt"
    if run.runtime.world.is_first:
        run.folder.write_batch(path, reading.first_bad_step, names_by_rank)
    return (
        f"the loss of step {reading.first_bad_step:,} is not finite; {path} names the images of that step, and the "
        "checkpoint before it stays; lower optimizer.base_lr, add optimizer.warmup, or set train.precision=fp32"
    )


def _note(run: Run, error: BaseException) -> None:
    """Write the reason for the end to status.json."""
    # A rank that leaves because of another's mistake has nothing to add.
    if isinstance(error, SystemExit):
        return
    if is_lost_peer(error):
        if run.folder.status().get("status") == "running":
            # The process that has gone knows better why, where it could still write it.
            run.fail(Notice("another process of the run has gone", "lost-rank"))
        return
    details = {"code": error.code} if isinstance(error, UserError) else {}
    # The same command fails again, unless the disk that refused has space by then.
    if type(error) is UserError:
        details["exit_code"] = int(ExitCode.USER_ERROR)
    run.fail(f"{type(error).__name__}: {error}", **details)

"""One run put together from its config: everything is checked before anything is written."""

import contextlib
import functools
import os
from pathlib import Path

import numpy as np
import torch

from fastsiam.config import Config
from fastsiam.config.views import specs_of_run, view_specs
from fastsiam.data.backends.choose import choose_backend
from fastsiam.data.backends.store_size import with_its_store
from fastsiam.data.build import build_loader, with_its_cores
from fastsiam.data.sources.open import open_sources
from fastsiam.errors import UserError
from fastsiam.evaluate.gallery import Pictures
from fastsiam.evaluate.online import Monitor
from fastsiam.methods import build_method
from fastsiam.optim.build import build_optimizer, large_batch_warning, set_learning_rate
from fastsiam.run import checkpoint
from fastsiam.run.bad_files import BadFiles
from fastsiam.run.console import closing_lines, described, finished, session_lines
from fastsiam.run.encoder_file import describe_encoder, save_encoder
from fastsiam.run.evaluation_schedule import Checkup
from fastsiam.run.folder import EXIT_CODES, Result, RunFolder, run_path
from fastsiam.run.metrics import Journal
from fastsiam.run.run_state import checkpoint_contents, restore, same_run_elsewhere
from fastsiam.run.saver import Saver
from fastsiam.run.train_log import TrainLog
from fastsiam.run.watchdog import Watchdog, remove_stacks_of_absent_ranks
from fastsiam.run.write_report import write_own_report
from fastsiam.runtime.distributed import World, is_lost_peer
from fastsiam.runtime.energy import EnergyMeter
from fastsiam.runtime.rank_check import check_alike, facts_of_config, facts_of_images, with_levels
from fastsiam.runtime.runtime import Runtime
from fastsiam.training.cost import Spent, heartbeat_seconds
from fastsiam.training.data_wait import data_wait_on
from fastsiam.training.nonfinite import Soundness
from fastsiam.training.progress import Pace
from fastsiam.training.state import State, Stopwatch
from fastsiam.training.step import TrainingStep


class Session:
    """Builds in `__init__` (raising `UserError`), writes from `start` on, says goodbye in `end`.

    One for each rank, which call the same methods in the same order; the first one speaks and writes.
    """

    def __init__(self, config: Config, world: World = World(), began: float | None = None):  # noqa: B008
        """`began`: when this process began to spend, by `time.monotonic`; None: now."""
        self.config, self.world = config, world
        self._stack = contextlib.ExitStack()
        self._started = False
        self.watchdog: Watchdog | None = None
        check_alike(world, facts_of_config(config))
        self._loading = with_its_cores(config, world)
        with world.together():
            path = Path(world.once(f"folder of {config.run.name}", str(run_path(config)))) if world.is_first else None
        self.folder = RunFolder(config, world.share(path), lambda sentence: self.journal.warn(sentence))
        self._early: list[str] = []
        with world.together():
            saved = checkpoint.of_run(self.folder, self._early.append) if world.is_first else None
        self._saved = world.share(saved)
        with world.together():
            self._choose()
        self.state = State(**self._saved["state"]) if self._saved else State()
        self.clock = Stopwatch(self.state, data_wait_on(self.device))
        every = heartbeat_seconds(config.to_spend)
        self.spent = Spent(self.folder.path if world.is_first else None, self._early.append, began=began, every=every)
        self.journal = Journal(self.folder, world, self.state, self.clock)
        with world.together(), world.leader_first():
            self.source, self.val = open_sources(config, self.journal.warn, self.journal.say)
            self._loading = with_its_store(self._loading, self.source, self.journal.say)
        self.source, self.val = with_levels(world, self.folder.path if self._saved else None, self.source, self.val)
        chosen = {**self.runtime.names, "data.backend": self.backend_name}
        check_alike(world, {**chosen, **facts_of_images(self.source, self.val)})
        self._files = BadFiles(config, self.folder.path, self.journal, world)
        self.skips = [
            self._files.skip_list(self.source, "skip", config.data.train),
            self._files.skip_list(self.val, "skip_val", config.data.val),
        ]
        self.energy = self._stack.enter_context(EnergyMeter.of(self.device, self.journal.warn))
        with world.together():
            self._open_loader()
            steps, before = self.loader.steps_per_epoch, (self._saved or {}).get("budget")
            self.pace = Pace(config, self.state, self.spent, self.energy, steps, world, before)

    def _choose(self):
        """What config and checkpoint lead to on this machine."""
        config, world = self.config, self.world
        before = self._saved["computation"] if self._saved else {}
        self.runtime = self._stack.enter_context(Runtime.of(config.train, world, before))
        self.device, self.dtype, self.compiles = self.runtime.device, self.runtime.dtype, self.runtime.compiles
        self.backend_name, self.backend_reason = choose_backend(config.data.backend, config.data.train)

    def _open_loader(self):
        config, world = self.config, self.world
        if self.val is not None:
            choose_backend(config.data.backend, self.val.root)
        self.loader = build_loader(
            self._loading,
            self.source,
            skip=self.skips[0],
            device=self.device,
            dtype=self.dtype,
            rank=world.rank,
            world_size=world.size,
            say=self.journal.say,
        )
        self.identity = checkpoint.identity(self.source, specs_of_run(config.views), self.backend_name)
        if self._saved:
            checkpoint.check_identity(self._saved["identity"], self.identity, self.folder.path)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _traceback):
        # A rank that leaves because of another's mistake has nothing to say.
        if self._started and error is not None and not isinstance(error, SystemExit):
            if not is_lost_peer(error):
                self._failed(f"{kind.__name__}: {error}", **({"exit_code": 2} if kind is UserError else {}))
            elif self.folder.status().get("status") == "running":
                # Who went knows better why, where it could still say so.
                self._failed("another process of the run has gone")
        self.close()

    def close(self) -> None:
        self.journal.close()
        if self.source is not None:
            self.loader.backend.close()
        self._stack.close()
        self.folder.close()

    def finished_result(self) -> Result | None:
        """What an earlier start of this run came to, if there is nothing left to do."""
        return self.world.share(finished(self) if self.world.is_first else None)

    def check_start(self) -> None:
        """Raise the `UserError` that `start` would raise; writes nothing."""
        with self.world.together():
            build_optimizer(build_method(self.config, self.world.size).to(self.device), self.config)
            if self.world.is_first:
                self.folder.check_start()

    def start(self) -> None:
        """Build model and optimizer, enter the run folder, restore or measure the controls."""
        config, world, journal = self.config, self.world, self.journal
        torch.manual_seed(config.train.seed)
        self.method = build_method(config, world.size).to(self.device)
        if config.train.channels_last:
            self.method.to(memory_format=torch.channels_last)
        with world.together():
            optimizer = build_optimizer(self.method, config)
            if world.is_first:
                self.folder.open(described(self))
        self._started = True
        self.pace.read_energy()
        self.spent.begin()
        self._stack.callback(self.spent.close)
        journal.set_status("running", pid=os.getpid())
        self.watchdog = self._stack.enter_context(
            Watchdog(self.folder.path, config.train.watchdog_seconds, world.rank, self._failed)
        )
        paused = self.watchdog.paused if self.compiles else None
        self._step = TrainingStep(self.method, optimizer, config, self.device, self.dtype, world, compiling=paused)
        self._step.rehearse_growth(self.dtype)
        self.monitor = None
        if self.source is not None:
            with world.together(), self.watchdog.paused():
                self.monitor = Monitor(
                    self._loading,
                    self.source,
                    self.val,
                    self.device,
                    self.dtype,
                    self.runtime.autocast,
                    self.skips,
                    world,
                    self.watchdog.beat,
                    journal.say,
                )
            self._stack.callback(self.monitor.close)
        spec = view_specs(config.views)[0]
        self.pictures = Pictures(self.folder.path, self.source, self.val, spec, journal.warn, world.is_first)
        steps = self.loader.steps_per_epoch
        self.checkup = Checkup(config, self.method, self.monitor, steps, journal, world, self.pace, self.pictures)
        self._announce()
        with world.together():
            if self._saved:
                restore(self, self._step, self._saved)
            elif world.is_first:
                self.folder.write_header()
        self._saved = None
        if self.state.step == 0 and config.evaluate.controls and self.checkup.has_knn:
            self.checkup.controls(self.loader)
        self.pace.agree()
        journal.begin_progress("decoding the first batch")
        contents = functools.partial(checkpoint_contents, self, self._step)
        self.saver = Saver(self.folder.path, config.checkpoint, contents, journal, self.pace, world)
        self.soundness = Soundness(self._step, self.source, self.folder, world)
        self.log = TrainLog(self, self._loading)

    def set_learning_rate(self) -> float:
        state = self.state
        return set_learning_rate(self._step.optimizer, self.config, state.progress, state.epoch_progress)

    def step(self, views: torch.Tensor, indices: np.ndarray | None = None) -> dict:
        """One training step on views [V*N, 3, S, S] of the images `indices`; no value is read back from the device."""
        number = self.state.step + 1
        if indices is not None:
            self.soundness.remember(number, indices)
            self.pictures.remember(number, views, indices)
        if self.soundness.reading is None:
            self.journal.doing("compiling the first step" if self.compiles else "the first step")
        out = self._step(views, number)
        self.watchdog.beat()
        if self._step.compiled is not None and (news := self._step.compiled.take_news()):
            self.journal.write("compile", **news)
        return out

    def agree(self, received: int | None) -> tuple[int | None, bool, bool]:
        """After a step: the signal that some rank has received; whether the first one's clock asks for a save, and for
        a line on the screen.
        """
        asked = (self.saver.is_due(), self.journal.progress_is_due()) if self.world.is_first else (False, False)
        number, saving, showing = self.pace.agree(received or 0, *map(int, asked))
        return number or None, bool(saving), bool(showing)

    def numbers_are_sound(self, loss: torch.Tensor) -> bool:
        """Look at the device: False where the loss of a step since the last look was not finite."""
        sound = self.soundness.look(loss)
        # The look waits for the device to finish the steps before it: that time belongs to them.
        self.clock.split("step")
        self.pictures.write_pairs()
        self._files.exchange()
        return sound

    def evaluation_is_next(self) -> bool:
        """Whether kNN follows this step, mostly the last of its epoch."""
        state, ends = self.state, self.state.cursor >= self.loader.steps_per_epoch * self.loader.batch_size
        return (ends and self.checkup.follows(state.epoch + 1)) or self.checkup.is_wanted_early()

    def save_before_evaluation(self) -> None:
        """At the end of an epoch that kNN follows, and of the run, where the last checkpoint is old.

        What a kill would lose then is spent: a budget of time or energy could not train those steps again.
        """
        if self.pace.is_over and not self.pace.budget.counts_steps:
            self.saver.save_unless_recent(seconds=0)
        elif self.checkup.follows(self.state.epoch + 1) or self.pace.is_over:
            self.saver.save_unless_recent()

    def evaluate_if_due(self) -> None:
        """Between two epochs."""
        if self.checkup.follows(self.state.epoch):
            # Decoders and their buffers would otherwise lie beside those of the evaluation.
            self.loader.close()
            self._evaluate()

    def evaluate_early(self) -> None:
        """In mid-epoch, where a budget of time or energy must know what its last evaluation will cost."""
        if self.checkup.is_wanted_early():
            self.saver.save_unless_recent()
            self._evaluate()

    def end(self, status: str, received: int | None = None) -> Result:
        """Last evaluation, last checkpoint, the closing lines."""
        state, path, journal = self.state, self.folder.path, self.journal
        knn = None
        if status == "done":
            self.save_before_evaluation()
            knn = self.checkup.final()
            self._files.finish()
        with self.world.together():
            if status != "failed":
                self.saver.save()
            if status == "done" and self.world.is_first:
                description = describe_encoder(self.config, state.step, self.folder.commit)
                save_encoder(self.method.encoder, description, path / "encoder.safetensors")
        details = {"step": state.step} | ({"knn_top1": knn} if knn is not None else {})
        if self.checkup.measures:
            details |= self.checkup.measures.fields()
        if reason := self.soundness.reason or self.checkup.reason:
            details |= {"reason": reason} if status in ("collapsed", "failed") else {}
        self.pace.read_energy()
        details |= self.spent.fields(self.spent.joules_per_image(state.images_seen))
        journal.write("end", status=status, **details)
        if status in EXIT_CODES:
            details["exit_code"] = EXIT_CODES[status]
        journal.set_status(status, **details)
        if status == "done":
            self.watchdog.forget_earlier()
            if self.world.is_first:
                remove_stacks_of_absent_ranks(path, self.world.size)
        journal.close()
        for line, style in closing_lines(status, self, knn):
            journal.say(line, style)
        # Who has asked a run to stop does not wait for a page.
        if status != "preempted" and self.world.is_first:
            journal.say(*write_own_report(path))
        return Result(status, str(path), state.step, knn, received if status == "preempted" else None)

    @property
    def loader_text(self) -> str:
        return self.loader.backend.description if self.source is not None else "synthetic: one fixed batch"

    def _evaluate(self):
        self.journal.doing("measuring kNN")
        self.checkup.knn()
        self.pace.agree()
        self._files.exchange()

    def _announce(self):
        config, journal = self.config, self.journal
        for sentence in self._early:
            journal.warn(sentence)
        for line in session_lines(self):
            journal.say(line)
        elsewhere = same_run_elsewhere(self) if self._saved is None and self.world.is_first else None
        for warning in filter(None, (elsewhere, large_batch_warning(config))):
            journal.warn(warning)

    def abandon(self) -> None:
        """A second Ctrl-C: what can be left in order while the main thread is anywhere, even stuck."""
        if self.watchdog is not None:
            self.watchdog.leave_nothing()
        # One that has ended is writing its report.
        if self._started and self.folder.status().get("status") == "running":
            self._failed("ended at once by a second Ctrl-C; the same command goes on from the last checkpoint, if any")
        self.journal.give_back_cursor()

    def _failed(self, reason, **details):
        """Any rank may have to say so, for the first may be the one that has gone."""
        self.folder.set_status("failed", step=self.state.step, reason=reason, **details)

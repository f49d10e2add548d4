"""One run put together from its config: everything is checked before anything is written."""

import math
import os
import time
from dataclasses import asdict

import torch
from rich.console import Console

import fastsiam
from fastsiam import checkpoint, collapse, host_memory, optim
from fastsiam.announce import closing_lines, knn_text, opening_lines, progress_text, schedule_line
from fastsiam.config import Config, UserError
from fastsiam.data.backends import build_loader, choose_backend
from fastsiam.data.skip import SkipFile, SkipList
from fastsiam.data.sources import open_sources
from fastsiam.data.views import view_specs
from fastsiam.device import (
    autocast,
    choose_compile,
    choose_device,
    choose_precision,
    environment,
    out_of_memory_advice,
)
from fastsiam.encoder import save_encoder
from fastsiam.evaluation.monitor import Monitor
from fastsiam.loader_advice import LoaderWatch, describe
from fastsiam.methods import build_method
from fastsiam.record import ProgressLine, Result, RunFolder
from fastsiam.state import State, Stopwatch


class Session:
    """Builds in `__init__` (raising `UserError`), writes from `start` on, says goodbye in `end`."""

    def __init__(self, config: Config):
        self.config = config
        self.console = Console()
        self.warnings: list[str] = []
        self.progress = self.monitor = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(f"fastsiam.train runs as one process, but WORLD_SIZE is {os.environ['WORLD_SIZE']}")
        self.folder = RunFolder(config, self.warn)
        self.folder.check_config()
        self.backend_name, _ = choose_backend(config.data.backend, config.data.train)
        self.device = choose_device(config.train.device)
        self.dtype = choose_precision(config.train.precision, self.device)
        self.precision = autocast(self.device, self.dtype)
        self.compiles = choose_compile(config.train.compile, self.device)
        self.source, self.val = open_sources(config, self.warn, self.say)
        if self.val is not None:
            choose_backend(config.data.backend, self.val.root)
        self.skips = [self._skip_list(source, name) for source, name in ((self.source, "skip"), (self.val, "skip_val"))]
        self.loader = build_loader(config, self.source, skip=self.skips[0], device=self.device, dtype=self.dtype)
        steps = config.train.epochs * self.loader.steps_per_epoch
        self.last_step = min(steps, config.train.max_steps or steps)
        self._saved = checkpoint.load_newest(self.folder.path, self.warn)
        self.identity = checkpoint.identity(self.source, view_specs(config.views), self.backend_name)
        if self._saved:
            checkpoint.check_identity(self._saved["identity"], self.identity, self.folder.path)
        self.state = State(**self._saved["state"]) if self._saved else State()
        self.clock = Stopwatch()
        self._began = time.perf_counter()
        self._wall_before, self._train_before = self.state.wall_seconds, self.state.train_seconds
        self.reason: str | None = None
        self._last_knn: tuple[int, float] | None = None
        self.measures: collapse.Measures | None = None
        self._measured_at: int | None = None
        self._started = False

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _traceback):
        if self._started and error is not None:
            self.folder.set_status("failed", step=self.state.step, reason=f"{kind.__name__}: {error}")
        self.close()

    def close(self) -> None:
        if self.progress:
            self.progress.close()
        if self.monitor:
            self.monitor.close()
        if self.source is not None:
            self.loader.backend.close()
        self.folder.close()
        if self.device.type == "cpu":
            host_memory.give_back_freed()

    def warn(self, sentence: str) -> None:
        """Said now, and in metrics.jsonl, once there is one."""
        self.say(f"warning: {sentence}", "yellow")
        if self.progress is None:
            self.warnings.append(sentence)
        else:
            self._write("warning", message=sentence)

    def finished_result(self) -> Result | None:
        """What an earlier start of this run came to, if there is nothing left to do."""
        status = self.folder.status()
        ended = status.get("status")
        if ended == "done" and self.state.step >= self.last_step:
            knn = status.get("knn_top1")
            self.say(f"{self.folder.path} is finished: step {self.state.step:,}" + knn_text(knn))
            self.say("run.fresh=true starts over in a new folder")
            return Result("done", str(self.folder.path), self.state.step, knn)
        if ended == "collapsed" and self.config.collapse.action == "stop":
            self.say(f"{self.folder.path} has collapsed: {status.get('reason')}", "red")
            return Result("collapsed", str(self.folder.path), self.state.step)
        return None

    def start(self) -> None:
        """Build model and optimizer, enter the run folder, restore or measure the controls."""
        config = self.config
        if self.device.type == "cpu":
            host_memory.keep_freed()
        torch.manual_seed(config.train.seed)
        self.method = build_method(config).to(self.device)
        if config.train.channels_last:
            self.method.to(memory_format=torch.channels_last)
        self.forward = torch.compile(self.method, fullgraph=True) if self.compiles else self.method
        self.optimizer = optim.build_optimizer(self.method, config)
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True
        self.guard = collapse.CollapseGuard(self.loader.steps_per_epoch)
        self.folder.open(environment() | {"fastsiam": fastsiam.__version__, "loader": self.loader_text})
        self._started = True
        self.folder.set_status("running", pid=os.getpid())
        if self.source is not None:
            self.monitor = Monitor(
                config, self.source, self.val, self.device, self.dtype, self.precision, skips=self.skips
            )
        counts = len(self.source or ()), len(self.val or ())
        left_out = [source.left_out for source in (self.source, self.val) if source is not None]
        for line in opening_lines(config, *counts, self.loader_text, f"run folder {self.folder.path}", left_out):
            self.say(line)
        self.say(schedule_line(config, self.loader.steps_per_epoch))
        if self._saved:
            self._restore(self._saved)
        else:
            self.folder.write_header()
        self._saved = None
        if self.state.step == 0 and config.evaluate.controls and self.monitor and self.monitor.has_knn:
            self._measure_controls()
        self.progress = ProgressLine(self.console, self.last_step, self.state.step)
        for sentence in self.warnings:
            self._write("warning", message=sentence)
        self._saved_at = time.perf_counter()
        self._logged = (self.state.step, dict(self.clock.totals))
        self._watch = LoaderWatch(lambda: describe(config, self.source, self.backend_name, self.device))

    def set_learning_rate(self, progress: float) -> float:
        return optim.set_learning_rate(self.optimizer, self.config, progress)

    def step(self, views: torch.Tensor) -> dict:
        """One training step on views [2N, 3, S, S]; no value is read back from the device."""
        try:
            return self._step(views)
        except torch.OutOfMemoryError:
            pass
        # Outside the handler: the traceback would hold the activations of the step that did not fit.
        raise UserError(out_of_memory_advice(self.config.train.batch_size, lambda size: self._step_fits(views, size)))

    def log(self, loss: torch.Tensor, rate: float) -> None:
        """A `train` line in metrics.jsonl and the progress line; reads the loss, the only sync of the loop."""
        state, batch_size, totals = self.state, self.config.train.batch_size, self.clock.totals
        loss = loss.item()
        # The read waits for the device to finish the steps before it: that time belongs to them.
        self.clock.split("step")
        last_step, last_totals = self._logged
        waited = totals["wait"] - last_totals["wait"]
        stepped = totals["step"] - last_totals["step"]
        images_per_second = (state.step - last_step) * batch_size / max(waited + stepped, 1e-9)
        wait_fraction = waited / max(waited + stepped, 1e-9)
        self._logged = (state.step, dict(totals))
        self._write("train", loss=loss, lr=rate, images_per_second=images_per_second, data_wait_fraction=wait_fraction)
        if not math.isfinite(loss):
            self.warn(f"the loss of step {state.step:,} is {loss}")
        advice = self._watch.add(waited, stepped)
        if advice:
            self.warn(advice)
        self.progress.show(state.step, progress_text(self, loss, images_per_second, wait_fraction))

    def judge_collapse(self) -> bool:
        """Measure z on the probe images; True where the run must stop."""
        if self.monitor is None:
            return False
        self._measure_collapse()
        if not self.guard.judge(self.state.step, self.measures) or self.config.collapse.action == "off":
            return False
        self.reason = f"at step {self.state.step:,}: z has collapsed ({self.measures})"
        if self.config.collapse.action == "stop":
            return True
        if self.guard.first_alarm:
            self.warn(f"{self.reason}; {collapse.ADVICE}")
        return False

    def evaluate_if_due(self) -> None:
        every = self.config.evaluate.knn_every_epochs
        if every and self.state.epoch % every == 0 and self.monitor and self.monitor.has_knn:
            self._knn()

    def save_if_due(self) -> None:
        if time.perf_counter() - self._saved_at >= self.config.checkpoint.every_seconds:
            try:
                self.save()
            except checkpoint.SaveError as error:
                self.warn(f"at step {self.state.step:,}: {error}")

    def save(self) -> None:
        self._update_seconds()
        # First, so that a disk that is full is asked once in every_seconds and not after each step.
        self._saved_at = time.perf_counter()
        checkpoint.save(
            self.folder.path,
            {
                "state": asdict(self.state),
                "method": self.method.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "collapsed_in_a_row": self.guard.collapsed_in_a_row,
                "random": torch.get_rng_state(),
                "threads": torch.get_num_threads(),
                "identity": self.identity,
                "metrics": self.folder.metrics_state(),
            },
            self.config.checkpoint.keep,
        )

    def end(self, status: str, received: int | None = None) -> Result:
        """Last evaluation, last checkpoint, the closing lines."""
        state, path = self.state, self.folder.path
        knn = None
        if status == "done":
            if self.monitor:
                if self._measured_at != state.step:
                    self._measure_collapse()
                if self.monitor.has_knn:
                    knn = self._last_knn[1] if self._last_knn and self._last_knn[0] == state.step else self._knn()
            save_encoder(self.method.encoder, self.config.model, path / "encoder.safetensors")
        self.save()
        details = {"step": state.step} | ({"knn_top1": knn} if knn is not None else {})
        if self.measures:
            details |= self.measures.fields()
        if self.reason and status == "collapsed":
            details["reason"] = self.reason
        self._write("end", status=status, **details)
        self.folder.set_status(status, **details)
        self.progress.close()
        for line, style in closing_lines(status, self, knn):
            self.say(line, style)
        return Result(status, str(path), state.step, knn, received if status == "preempted" else None)

    def say(self, text: str, style: str | None = None) -> None:
        self.console.print(text, style=style, highlight=False, soft_wrap=True)

    def _step(self, views):
        self.optimizer.zero_grad(set_to_none=True)
        with self.precision():
            out = self.forward(views)
        out["loss"].backward()
        self.optimizer.step()
        return out

    def _step_fits(self, views, batch_size):
        self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        try:
            self._step(views[: 2 * batch_size])
        except torch.OutOfMemoryError:
            return False
        return True

    def _skip_list(self, source, name):
        """Files that cannot be decoded are told, written to metrics.jsonl, and known to the run when it resumes."""
        if source is None:
            return None
        file = SkipFile(self.folder.path / f"{name}.tsv", source)

        def report(index, reason, count):
            file.add(index, reason)
            self.folder.write({"kind": "bad_file", "step": self.state.step, "message": reason, "bad_files": count})
            self.say(f"bad file  {reason}; another image takes its place ({count} of {len(source):,})", "yellow")

        location = self.config.data.train if name == "skip" else self.config.data.val
        return SkipList(len(source), self.config.data.max_bad_fraction, file.known(), report, location)

    @property
    def loader_text(self) -> str:
        return self.loader.backend.description if self.source is not None else "synthetic: one fixed batch"

    def _measure_collapse(self):
        self.measures, self._measured_at = self.monitor.collapse(self.method), self.state.step
        self._write("collapse", **self.measures.fields())

    def _knn(self) -> float:
        # Decoders and their buffers would otherwise lie beside those of the evaluation.
        self.loader.backend.close()
        top1 = self.monitor.knn(self.method)
        self._last_knn = (self.state.step, top1)
        self._write("knn", knn_top1=top1)
        if self.state.step < self.last_step:
            self.say(f"kNN       {top1:.2f} % at step {self.state.step:,}")
        return top1

    def _measure_controls(self):
        self.state.untrained_knn = self.monitor.untrained(self.method, self.loader)
        self.state.raw_pixels_knn = self.monitor.raw_pixels()
        self.folder.write(
            {
                "kind": "knn",
                "step": 0,
                "knn_top1": self.state.untrained_knn,
                "control": "untrained",
                "raw_pixels_knn_top1": self.state.raw_pixels_knn,
            }
        )
        self.say(
            f"before    kNN {self.state.untrained_knn:.2f} % with random weights (batch-norm statistics filled), "
            f"{self.state.raw_pixels_knn:.2f} % on raw pixels"
        )

    def _write(self, kind: str, **fields) -> None:
        self._update_seconds()
        state = self.state
        self.folder.write(
            {
                "kind": kind,
                "step": state.step,
                "epoch": state.epoch,
                "images_seen": state.images_seen,
                "train_seconds": state.train_seconds,
                "wall_seconds": state.wall_seconds,
                **fields,
            }
        )

    def _update_seconds(self):
        now = time.perf_counter()
        self.state.wall_seconds = self._wall_before + now - self._began
        totals = self.clock.totals
        self.state.train_seconds = self._train_before + totals["wait"] + totals["step"]

    def _restore(self, saved):
        self.method.load_state_dict(saved["method"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.guard.collapsed_in_a_row = saved["collapsed_in_a_row"]
        torch.set_rng_state(saved["random"])
        self.folder.restore_metrics(saved["metrics"])
        self._write("resume")
        self.say(f"resume    at step {self.state.step:,}, epoch {self.state.epoch + 1}, image {self.state.cursor:,}")
        if saved["threads"] != torch.get_num_threads():
            self.warn(
                f"the checkpoint was written with {saved['threads']} CPU threads and now there are "
                f"{torch.get_num_threads()}: the last bits may differ"
            )

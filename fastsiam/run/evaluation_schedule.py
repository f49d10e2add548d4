"""Schedule of the evaluations of a run: kNN and the features' spectrum after its epochs, collapse measures at their
steps; logs the numbers.
"""

import copy
from pathlib import Path

import numpy as np
import torch

from fastsiam.config import Config
from fastsiam.errors import Notice
from fastsiam.evaluate import collapse
from fastsiam.evaluate.gallery import Pictures
from fastsiam.evaluate.online import OnlineEvaluation
from fastsiam.evaluate.online_linear import NAME, OnlineLinear
from fastsiam.optim.build import scale_at
from fastsiam.run.metrics import Journal
from fastsiam.run.training_data import TrainingData
from fastsiam.run.watchdog import Watchdog
from fastsiam.training.progress import Progress


class EvaluationSchedule:
    """Measures a method when it is due and keeps the last numbers. All ranks call its methods at the same steps."""

    def __init__(
        self,
        config: Config,
        method: torch.nn.Module,
        data: TrainingData,
        progress: Progress,
        journal: Journal,
        folder: Path,
        watchdog: Watchdog,
        encoder: torch.nn.Module,
    ):
        """`folder`: the run's, for pictures. `watchdog`: beaten at every batch. `encoder`: what kNN is measured on."""
        runtime = data.runtime
        self._config, self._method, self._encoder, self._loader = config, method, encoder, data.loader
        self._journal, self._world, self._progress = journal, runtime.world, progress
        self.guard = collapse.CollapseGuard(data.steps_per_epoch, collapse.limits_of(config))
        self.measures: collapse.Measures | None = None
        self.collapsed: str | None = None
        """Sentence on the collapse of the run, if it counts as collapsed."""
        self._measured_at: int | None = None
        self._spectrum_at: int | None = None
        spec = config.view_groups[0].spec
        self._pictures = Pictures(folder, data.source, data.val, spec, journal.warn, runtime.world.is_first)
        self._online = None
        if data.source is not None:
            with runtime.world.together(), watchdog.paused():
                self._online = OnlineEvaluation(
                    data.config, data.source, data.val, data.skips, runtime, watchdog.beat, journal.say
                )
        self.linear: OnlineLinear | None = None
        """Of evaluate.online_linear."""
        if config.evaluate.online_linear:
            self.linear = OnlineLinear(
                method.encoder.num_features, len(data.source.classes), config.train.seed, runtime
            )
        # Measured before the first kNN and not before the first step, which would wait for it: 4 s of the quickstart's
        # 8, minutes with ImageNet.
        measures_controls = self.has_knn and config.evaluate.controls and progress.state.untrained_knn is None
        if config.model.weights is not None and progress.state.step:
            # A run resumed before its first kNN: it has not read the weights that it began with.
            measures_controls = False
        self._untrained = copy.deepcopy(method).cpu() if measures_controls else None

    def close(self) -> None:
        """Free the decoders."""
        if self._online is not None:
            self._online.close()

    @property
    def has_knn(self) -> bool:
        return self._online is not None and self._online.has_knn

    @property
    def is_due(self) -> bool:
        """True at a step after which something is measured: collapse, or features, mostly at the end of an epoch."""
        ends = self._progress.epoch_is_over and self.follows(self._progress.state.epoch + 1)
        return self._collapse_is_due or ends or self.is_wanted_early

    @property
    def is_wanted_early(self) -> bool:
        """True where a budget of time or energy must know now what its last kNN, or spectrum, will cost."""
        return self._online is not None and self._progress.evaluation_is_wanted()

    def follows(self, epochs: int) -> bool:
        """True where kNN, or the spectrum alone without labelled images, comes after so many finished epochs."""
        every = self._config.evaluate.knn_every_epochs
        return bool(every) and epochs % every == 0 and self._online is not None and self._progress.leaves_room()

    def remember(self, views: torch.Tensor, indices: np.ndarray) -> None:
        """Keep views of the first step for the report; nothing is read back from the device."""
        self._pictures.remember(self._progress.state.step + 1, views, indices)

    def learn(self, features: torch.Tensor, labels: torch.Tensor) -> None:
        """A step of the online linear classifier, where there is one; nothing is read back from the device."""
        if self.linear is not None:
            self.linear.step(features, labels, scale_at(self._progress.value, "cosine", 0.0))

    def log_linear(self) -> None:
        """Write what the online linear classifier has done since the last time; waits for the device."""
        if self.linear is not None:
            reading = self.linear.read()
            self._journal.write("online_linear", loss=reading.loss, train_top1=reading.top1)

    def write_pictures(self) -> None:
        """Write the views kept by `remember`."""
        self._pictures.write_pairs()

    def measure_controls(self) -> None:
        """Measure kNN of raw pixels and of the encoder as it starts, once and where the config asks for it.

        Not in mid-epoch: it takes batches from the loader.
        """
        if self._untrained is None:
            return
        state, device = self._progress.state, next(self._method.parameters()).device
        self._loader.close()
        begins, given = self._untrained.to(device), self._config.model.weights
        # Weights that are given bring the statistics of their batch norms.
        state.untrained_knn = (
            self._online.knn(begins.encoder) if given else self._online.untrained(begins, self._loader)
        )
        state.raw_pixels_knn = self._online.raw_pixels()
        self._untrained = begins = None
        self._loader.close()
        raw = {"raw_pixels_knn_top1": state.raw_pixels_knn}
        control = "start" if given else "untrained"
        what = f"the weights of {given}" if given else "random weights (batch-norm statistics filled)"
        self._journal.write_at_step("knn", step=0, knn_top1=state.untrained_knn, control=control, **raw)
        self._journal.say(
            f"before    kNN {state.untrained_knn:.2f} % with {what}, {state.raw_pixels_knn:.2f} % on raw pixels"
        )

    def measure_collapse(self) -> bool:
        """Measure and judge where that is due; returns True where the run must stop."""
        step, action = self._progress.state.step, self._config.collapse.action
        if not self._collapse_is_due:
            return False
        self._measure()
        if not self.guard.judge(step, self.measures) or action == "off":
            return False
        self.collapsed = f"at step {step:,}: z has collapsed ({self.measures})"
        if action == "warn" and self.guard.first_alarm:
            self._journal.warn(Notice(f"{self.collapsed}; {collapse.advice(self._config)}", "collapsed"))
        return action == "stop"

    def measure_features(self, last: bool = False) -> float | None:
        """Measure kNN and the spectrum, unless that was done at this very step.

        Returns kNN top-1 in percent; None without labelled images, where the spectrum is measured alone.
        """
        state = self._progress.state
        if not self.has_knn:
            if self._spectrum_at != state.step:
                with self._progress.evaluating():
                    found = self._online.spectrum(self._encoder)
                self._note_spectrum(found, last)
            return None
        if state.knn_step != state.step:
            self.measure_controls()
            with self._progress.evaluating():
                state.knn = self._online.knn(self._encoder, self._pictures, state.step, self.linear)
            state.knn_step = state.step
            self._journal.write("knn", knn_top1=state.knn)
            if self.linear is not None:
                self._journal.write("online_linear", val_top1=self.linear.val_top1)
            if not last:
                linear = "" if self.linear is None else f", {NAME} {self.linear.val_top1:.2f} %"
                self._journal.say(f"kNN       {state.knn:.2f} % at step {state.step:,}{linear}")
            self._note_spectrum(self._online.spectrum_of_knn, last)
        return state.knn

    def _note_spectrum(self, found, last):
        self._spectrum_at = step = self._progress.state.step
        if found is None:
            return
        measures, images = found
        # A number a field, as TensorBoard takes them; alignment needs two views.
        numbers = {name: getattr(measures, name) for name in ("rankme", "effective_rank", "alpha", "uniformity")}
        self._journal.write("spectrum", **numbers, images=images)
        self._journal.say(
            f"spectrum  {measures} of {images:,} training images" + ("" if last else f" at step {step:,}")
        )

    def measure_last(self) -> float | None:
        """Measure at the end of the run; returns kNN, None without labelled images."""
        if self._online is None:
            return None
        if self._measured_at != self._progress.state.step:
            self._measure()
        return self.measure_features(last=True)

    @property
    def _collapse_is_due(self):
        return self._online is not None and self.guard.due(self._progress.state.step)

    def _measure(self):
        """On the first rank alone: 256 images."""
        self.measures = self._world.share(self._online.collapse(self._method) if self._world.is_first else None)
        self._measured_at = self._progress.state.step
        self._journal.write("collapse", **self.measures.fields())

"""Log of the training steps: a line of metrics.jsonl every so many, a line on the screen every few seconds."""

import torch

from fastsiam.data.bottleneck import LoaderWatch, describe
from fastsiam.errors import Notice
from fastsiam.evaluate.collapse import Measures
from fastsiam.evaluate.online_linear import OnlineLinear
from fastsiam.run.metrics import Journal
from fastsiam.run.training_data import TrainingData
from fastsiam.training.progress import Progress
from fastsiam.training.step import Reading
from fastsiam.training.timing import Lap, Laps, Stopwatch


class TrainLog:
    """Logs readings of the training step; all ranks call the same methods at the same steps."""

    def __init__(self, data: TrainingData, progress: Progress, clock: Stopwatch, journal: Journal):
        self._data, self._progress, self._clock, self._journal = data, progress, clock, journal
        self._written, self._shown = (Laps(progress.state, clock, progress.cost) for _ in range(2))
        self._watch = LoaderWatch(lambda: describe(data.config, data.source, data.backend, data.runtime.device))
        self._has_begun = False
        self._sizes: tuple[int, ...] | None = None
        """Of the views that a line of the log has told of."""

    def timed(self, batches):
        """The batches, with the time for each counted as waiting; starting the backend is not waiting for data."""
        self._clock.split("other")
        for batch in batches:
            self._clock.split("other" if batch.cold else "wait")
            if batch.cold:
                self._watch.begin()
            self._write_sizes()
            if not self._has_begun:
                self._has_begun = True
                compiles = self._data.runtime.compiles
                self._journal.doing("compiling the first step" if compiles else "the first step")
            yield batch
            self._clock.split("other")

    def write(self, reading: Reading, rate: float) -> None:
        """A line of metrics.jsonl; `rate`: the learning rate of the step."""
        journal, cost, lap = self._journal, self._progress.cost, self._next(self._written)
        journal.write("train", lr=rate, **self._fields(reading, lap))
        if advice := self._watch.add(lap.waited, lap.stepped):
            journal.warn(advice)
        if error := cost.error:
            text = f"cannot update spent.json ({error}); a kill now would lose the cost since the last write"
            journal.warn_once(Notice(text, "cost-unwritten"))

    def show(self, reading: Reading, measures: Measures | None, linear: OnlineLinear | None) -> None:
        """The line on the screen, with the last collapse `measures` and the last accuracy of `linear`."""
        lap = self._next(self._shown)
        self._journal.progress(self._progress.share_done, self._text(reading, lap, measures, linear))

    def _next(self, laps):
        self._progress.read_energy()
        return laps.next()

    def _write_sizes(self):
        """Where the clock says when views grow, no later reader could tell at which step they did."""
        sizes = self._data.sizes
        if self._data.config.grows_in_mid_epoch and sizes != self._sizes:
            self._sizes = sizes
            self._journal.write("views", sizes=sizes)

    def _view_size(self):
        return {"view_size": self._data.sizes[0]} if len(self._data.config.view_stages) > 1 else {}

    def _fields(self, reading, lap: Lap) -> dict:
        fields = {"loss": reading.loss, **reading.scalars, "images_per_second": lap.images_per_second}
        if self._data.runtime.dtype == torch.float16:
            fields["skipped_steps"] = reading.skipped_steps
        fields |= {"data_wait_fraction": lap.wait_fraction, "progress": self._progress.value, **self._view_size()}
        return fields | self._progress.cost.fields(lap.joules_per_image)

    def _text(self, reading, lap, measures, linear):
        measured, loss, method = "", reading.loss, self._data.config.method
        is_cosine = method.name.startswith("simsiam") and getattr(method, "similarity", "cosine") == "cosine"
        cosine = f" (cosine {-loss:.3f})" if is_cosine else ""
        if measures:
            measured = (
                f"std_ratio {measures.std_ratio:.2f} rank {measures.effective_rank:.0f} "
                f"|cos| {measures.mean_abs_cos:.2f}  "
            )
        if linear and linear.last:
            measured += f"online linear {linear.last.top1:.1f} %  "
        size = "".join(f"{side} px  " for side in self._view_size().values())
        return (
            f"{_where(self._progress)}  {size}loss {loss:+.3f}{cosine}  {measured}"
            f"{lap.images_per_second:,.0f} img/s  wait {100 * lap.wait_fraction:.0f} %"
            + (f"  {lap.joules_per_image:.3g} J/image" if lap.joules_per_image is not None else "")
            + (f"  {reading.skipped_steps} steps skipped (fp16)" if reading.skipped_steps else "")
        )


def _where(progress):
    state, budget = progress.state, progress.budget
    of = f"/{progress.last_step}" if progress.last_step else ""
    if budget.kind == "epochs":
        epochs = int(budget.amount)
        return f"epoch {min(state.epoch + 1, epochs)}/{epochs}  step {state.step}{of}"
    return f"epoch {state.epoch + 1}  step {state.step}{of}  {100 * progress.value:.1f} % of {budget.text}"

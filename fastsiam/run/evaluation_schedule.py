"""How a run is doing: kNN at its epochs, collapse measures at their steps, and what is said and written of them."""

from fastsiam.config import Config
from fastsiam.evaluate import collapse
from fastsiam.evaluate.gallery import Pictures
from fastsiam.evaluate.online import Monitor
from fastsiam.run.metrics import Journal
from fastsiam.runtime.distributed import World
from fastsiam.training.progress import Pace


class Checkup:
    """Measures of one method, the last ones kept. All ranks call the same methods at the same steps."""

    def __init__(
        self,
        config: Config,
        method,
        monitor: Monitor | None,
        steps_per_epoch: int,
        journal: Journal,
        world: World,
        pace: Pace,
        pictures: Pictures | None = None,
    ):
        """`monitor`: None where there are no images to measure on. `pictures` are shown the features of every kNN."""
        self._config, self._method, self._monitor = config, method, monitor
        self._journal, self._world, self._pace = journal, world, pace
        self._pictures = pictures
        self.guard = collapse.CollapseGuard(steps_per_epoch)
        self.measures: collapse.Measures | None = None
        self.reason: str | None = None
        """Why the run counts as collapsed."""
        self._measured_at: int | None = None
        self._last_knn: tuple[int, float] | None = None

    @property
    def has_knn(self) -> bool:
        return self._monitor is not None and self._monitor.has_knn

    def is_due(self) -> bool:
        """Whether collapse is measured at this step."""
        return self._monitor is not None and self.guard.due(self._journal.state.step)

    def follows(self, epochs: int) -> bool:
        """Whether kNN comes after so many finished epochs."""
        every = self._config.evaluate.knn_every_epochs
        return bool(every) and epochs % every == 0 and self.has_knn and self._pace.leaves_room()

    def is_wanted_early(self) -> bool:
        """Whether a budget must know now what its last kNN will cost."""
        return self.has_knn and self._pace.evaluation_is_wanted()

    def controls(self, loader) -> None:
        """kNN before training, of raw pixels and of the untrained encoder, into the state."""
        state = self._journal.state
        state.untrained_knn = self._monitor.untrained(self._method, loader)
        state.raw_pixels_knn = self._monitor.raw_pixels()
        self._journal.write_plain(
            {
                "kind": "knn",
                "step": 0,
                "knn_top1": state.untrained_knn,
                "control": "untrained",
                "raw_pixels_knn_top1": state.raw_pixels_knn,
            }
        )
        self._journal.say(
            f"before    kNN {state.untrained_knn:.2f} % with random weights (batch-norm statistics filled), "
            f"{state.raw_pixels_knn:.2f} % on raw pixels"
        )

    def has_collapsed(self) -> bool:
        """Where a measure is due: take it and judge; True where the run must stop."""
        step, action = self._journal.state.step, self._config.collapse.action
        if not self.is_due():
            return False
        self._measure()
        if not self.guard.judge(step, self.measures) or action == "off":
            return False
        self.reason = f"at step {step:,}: z has collapsed ({self.measures})"
        if action == "stop":
            return True
        if self.guard.first_alarm:
            self._journal.warn(f"{self.reason}; {collapse.ADVICE}")
        return False

    def knn(self, last: bool = False) -> float:
        """kNN now, unless it was taken at this very step."""
        step = self._journal.state.step
        if self._last_knn is None or self._last_knn[0] != step:
            with self._pace.evaluating():
                top1 = self._monitor.knn(self._method, self._pictures, step)
            self._last_knn = (step, top1)
            self._journal.write("knn", knn_top1=top1)
            if not last:
                self._journal.say(f"kNN       {top1:.2f} % at step {step:,}")
        return self._last_knn[1]

    def final(self) -> float | None:
        """The measures of the end; returns kNN, None without labelled images."""
        if self._monitor is None:
            return None
        if self._measured_at != self._journal.state.step:
            self._measure()
        return self.knn(last=True) if self.has_knn else None

    def _measure(self):
        """By the first rank alone: 256 images."""
        self.measures = self._world.share(self._monitor.collapse(self._method) if self._world.is_first else None)
        self._measured_at = self._journal.state.step
        self._journal.write("collapse", **self.measures.fields())

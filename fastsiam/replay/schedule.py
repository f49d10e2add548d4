"""Position of each step of a run in its data and its budget, from steps per epoch, config and metrics.jsonl."""

import bisect
from collections.abc import Sequence

import numpy as np

from fastsiam.config import Config


class Schedule:
    """Epoch, cursor, progress and view sizes of the steps of a run, which count from 1.

    Order and epoch of a step are functions of its number. Where the budget counts steps, so are progress, learning rate
    and view sizes, between two starts of the run: before a resumption the budget may have been another one. Progress by
    time or energy is known where a line or a checkpoint holds it, and interpolated elsewhere.
    """

    def __init__(self, config: Config, steps_per_epoch: int, lines: Sequence[dict], states: Sequence[dict] = ()):
        """`lines`: of metrics.jsonl. `states`: `State` of each checkpoint as a dict."""
        lines = [line for line in lines if isinstance(line.get("step"), int)]
        self.config, self.steps_per_epoch, self.states = config, steps_per_epoch, states
        self.train = {line["step"]: line for line in lines if line.get("kind") == "train"}
        self.reached = max([0, *(line["step"] for line in lines), *(state["step"] for state in states)])
        """The last step that a line or a checkpoint knows of."""
        self._starts = sorted({0, *(line["step"] for line in lines if line.get("kind") == "resume")})
        """Steps that were finished when a process began or resumed the run."""
        self._totals = [self._total_of(start) for start in range(len(self._starts))]
        self._logged_sizes = {
            (self.place(step)[0], self._start(step)): line["view_size"]
            for step, line in self.train.items()
            if "view_size" in line
        }
        self._begun_sizes = {line["step"]: tuple(line["sizes"]) for line in lines if line.get("kind") == "views"}
        """By the number of steps that were finished when views of these sizes began."""
        known = {0: self._progress_of_starting()} | {state["step"]: state["progress"] for state in states}
        known |= {step: line["progress"] for step, line in self.train.items() if "progress" in line}
        self._known_progress = sorted(known), [known[step] for step in sorted(known)]

    @property
    def counts_steps(self) -> bool:
        return self.config.to_spend.counts_steps

    @property
    def last_step(self) -> int | None:
        """Last step of the whole schedule; None where time or energy ends it."""
        last = self.config.train.last_step(self._planned())
        return None if last is None else max(last, self.reached)

    def place(self, step: int) -> tuple[int, int]:
        """Epoch of a step, from 0, and the images of that epoch that came before it."""
        return (step - 1) // self.steps_per_epoch, (step - 1) % self.steps_per_epoch * self.config.train.batch_size

    def progress_before(self, step: int) -> float:
        """Share of the budget that was used when a step began."""
        return self._progress_at(step - 1, self._start(step))

    def epoch_progress(self, step: int) -> float:
        """Progress when the epoch of a step began."""
        epoch, _ = self.place(step)
        if not self.counts_steps:
            for state in self.states:
                if state["epoch"] == epoch:
                    return state["epoch_progress"]
        return self._progress_at(epoch * self.steps_per_epoch, self._start(step))

    def logged_rate(self, step: int) -> float | None:
        """Scheduled learning rate of a step, where metrics.jsonl has it."""
        return self.train.get(step, {}).get("lr")

    def sizes(self, step: int) -> tuple[int, ...]:
        """Sides in pixels of the groups' views in a step."""
        if (begun := self._last_begun(step)) is not None:
            return self._begun_sizes[begun]
        stages, epoch = self.config.view_stages, self.place(step)[0]
        found = self.config.sizes_at(epoch, self.epoch_progress(step))
        logged = self._logged_sizes.get((epoch, self._start(step)), found[0])
        if found[0] == logged:
            return found
        return next((sizes for sizes in stages if sizes[0] == logged), found)

    def sizes_are_known(self, step: int) -> bool:
        """False where the sizes follow from a progress that is not known exactly, and no line holds them."""
        epoch, start = self.place(step)[0], self._start(step)
        same = len(self.config.view_stages) == 1 or epoch == 0
        logged = self._last_begun(step) is not None or (epoch, start) in self._logged_sizes
        return same or self._totals[start] is not None or logged

    def unknown_rates(self, first: int, last: int) -> int:
        """Number of the steps from `first` to `last` whose learning rates are not known exactly."""
        steps = range(first, last + 1)
        return sum(self._totals[self._start(step)] is None and self.logged_rate(step) is None for step in steps)

    def _last_begun(self, step):
        """Of the sizes of a step; None for a run whose log does not tell."""
        return max((begun for begun in self._begun_sizes if begun < step), default=None)

    def _start(self, step):
        """Number of the start of the run that made a step, from 0."""
        return bisect.bisect_left(self._starts, step) - 1

    def _progress_of_starting(self):
        """Share of the budget that was used before the first step, by the first line of the log."""
        first = next(iter(self.train.values()), {})
        if not first.get("spent_seconds"):
            return 0.0
        return first.get("progress", 0.0) * max(0.0, 1 - first["train_seconds"] / first["spent_seconds"])

    def _progress_at(self, finished, start):
        if not self.counts_steps:
            return float(np.interp(finished, *self._known_progress))
        return finished / (self._totals[start] or self._planned())

    def _total_of(self, start):
        """Steps of the whole schedule as a start of the run had it; None where that is not known."""
        if not self.counts_steps:
            return None
        first, last = self._starts[start], (*self._starts[start + 1 :], None)[0]
        for step, line in self.train.items():
            if first < step and (last is None or step <= last) and line.get("progress"):
                return round(step / line["progress"])
        return self._planned() if last is None else None

    def _planned(self):
        """Steps of the whole schedule by the config of the last start; None where time or energy ends it."""
        return self.config.to_spend.steps(self.steps_per_epoch, self.config.train.batch_size)

"""What a run will take, from measured costs: seconds, energy, money; and the epochs that a budget buys.

Pure functions.
"""

from dataclasses import asdict, dataclass

from fastsiam.config import Config
from fastsiam.config.budget import Budget
from fastsiam.evaluate.collapse import MEASURE_EVERY_STEPS
from fastsiam.evaluate.online import FILL_STEPS
from fastsiam.plan.results import Measured
from fastsiam.training.progress import EVALUATED_BY, LAST_SAVES

# Before training: kNN of the untrained encoder and of raw pixels.
CONTROLS = 2


@dataclass(frozen=True)
class Costs:
    """Seconds for each part of a run."""

    image: float
    """Of training, loader and step beside each other."""
    start: float = 0.0
    compile: float = 0.0
    knn: float | None = None
    """None where there is no kNN."""
    collapse: float = 0.0
    save: float = 0.0
    watts: float | None = None
    """Of all GPUs, in training; taken for the rest of the run, too."""

    @classmethod
    def of(cls, measured: Measured) -> "Costs":
        joules, rate = measured.end_to_end.joules_per_image, measured.end_to_end.rate.median
        return cls(
            image=1 / rate,
            start=measured.start_seconds,
            compile=measured.compile_seconds,
            knn=measured.knn_seconds,
            collapse=measured.collapse_seconds,
            save=measured.saving.seconds or 0.0,
            watts=None if joules is None else joules * rate,
        )


@dataclass(frozen=True)
class Schedule:
    """What a config asks for, in steps."""

    images: int
    batch_size: int
    knn_every_epochs: int | None = None
    controls: bool = False
    save_every_seconds: float = 300.0
    max_steps: int | None = None

    @classmethod
    def of(cls, config: Config, images: int) -> "Schedule":
        return cls(
            images,
            config.train.batch_size,
            config.evaluate.knn_every_epochs,
            config.evaluate.controls,
            config.checkpoint.every_seconds,
            config.train.max_steps,
        )

    @property
    def steps_per_epoch(self) -> int:
        """The last, incomplete batch is dropped."""
        return self.images // self.batch_size

    @property
    def images_per_epoch(self) -> int:
        return self.steps_per_epoch * self.batch_size


@dataclass(frozen=True)
class Run:
    """A run of so many steps, and where its seconds go."""

    steps: int
    epochs: float
    start: float
    compile: float
    train: float
    knn: float
    collapse: float
    saves: float
    knn_times: int
    collapse_times: int
    save_times: int
    total: float
    watts: float | None

    @property
    def joules(self) -> float | None:
        return None if self.watts is None else self.watts * self.total

    def cost(self, price_per_hour: float | None) -> float | None:
        """In the currency of the price."""
        return None if price_per_hour is None else self.total / 3600 * price_per_hour

    def fields(self) -> dict:
        return {key: value for key, value in asdict(self).items() if key != "watts"}


def run_of(schedule: Schedule, costs: Costs, steps: int, *, early: bool = False) -> Run:
    """What `steps` steps take. `early`: the run makes one kNN to learn what its last will cost."""
    times = 0 if costs.knn is None else _knn_times(schedule, steps, early)
    fills = FILL_STEPS if schedule.controls and costs.knn is not None else 0
    train = (steps + fills) * schedule.batch_size * costs.image
    every = _collapse_every(schedule)
    collapse_times = steps // every + (steps % every > 0)
    save_times = int(train // schedule.save_every_seconds) + LAST_SAVES
    knn, collapse, saves = times * (costs.knn or 0.0), collapse_times * costs.collapse, save_times * costs.save
    return Run(
        steps=steps,
        epochs=steps / schedule.steps_per_epoch,
        start=costs.start,
        compile=costs.compile,
        train=train,
        knn=knn,
        collapse=collapse,
        saves=saves,
        knn_times=times,
        collapse_times=collapse_times,
        save_times=save_times,
        total=costs.start + costs.compile + train + knn + collapse + saves,
        watts=costs.watts,
    )


def run_of_budget(schedule: Schedule, costs: Costs, budget: Budget) -> Run | None:
    """The longest run that a budget pays for, train.max_steps aside; None where energy is asked for and not measured.

    Zero steps where it does not pay for one.
    """
    if budget.kind == "epochs":
        return run_of(schedule, costs, int(budget.amount) * schedule.steps_per_epoch)
    if budget.kind == "images":
        return run_of(schedule, costs, int(budget.amount) // schedule.batch_size)
    if budget.kind == "joules" and costs.watts is None:
        return None
    seconds = budget.amount if budget.kind == "seconds" else budget.amount / costs.watts
    low, high = 0, int(seconds / (schedule.batch_size * costs.image)) + 1
    while high - low > 1:
        middle = (low + high) // 2
        if run_of(schedule, costs, middle, early=True).total <= seconds:
            low = middle
        else:
            high = middle
    return run_of(schedule, costs, low, early=True)


def run_of_config(schedule: Schedule, costs: Costs, budget: Budget) -> Run | None:
    """The run of a config's own epochs or budget, as long as train.max_steps lets it be."""
    run = run_of_budget(schedule, costs, budget)
    if run is None or schedule.max_steps is None or schedule.max_steps >= run.steps:
        return run
    return run_of(schedule, costs, schedule.max_steps, early=not budget.counts_steps)


def _knn_times(schedule, steps, early):
    every = (schedule.knn_every_epochs or 0) * schedule.steps_per_epoch
    regular = steps // every if every else 0
    last = 0 if every and regular and steps == regular * every else 1
    first_is_late = not every or every > EVALUATED_BY * steps
    return regular + last + (early and first_is_late) + (CONTROLS if schedule.controls else 0)


def _collapse_every(schedule):
    least, most = MEASURE_EVERY_STEPS
    return min(max(schedule.steps_per_epoch, least), most)

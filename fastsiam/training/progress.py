"""Progress of a run in [0, 1]: the share of its budget used so far. Every schedule is a function of it.

Epochs and images come to the same steps on every machine. Time and energy are read by the first rank; the cost of the
last evaluation and of the checkpoints around it is kept in reserve, so that the cosine ends when just that is left.
"""

import contextlib
from collections.abc import Iterator

from fastsiam.config import Config
from fastsiam.errors import UserError
from fastsiam.runtime.distributed import World
from fastsiam.training.cost import CostMeter
from fastsiam.training.state import State

# Share of the budget by which a first evaluation is made, to know the cost of the last one.
EVALUATED_BY = 0.1
# One before the last evaluation, which may be long, and one after it.
LAST_SAVES = 2
_PARTS = 10**9


class Progress:
    """Progress of a run, the same on all its ranks."""

    def __init__(
        self,
        config: Config,
        steps_per_epoch: int,
        cost: CostMeter,
        world: World,
        state: State | None = None,
        amount_before: float | None = None,
    ):
        """`state`: that of a checkpoint; None: a new one. `amount_before`: the amount of the budget in that
        checkpoint, which may be smaller.

        Raises `UserError` for a budget smaller than a step, and for one of energy where it cannot be measured.
        """
        self.budget = config.to_spend
        self.state = state or State()
        self.steps_per_epoch, self.batch_size = steps_per_epoch, config.train.batch_size
        self.cost, self._world = cost, world
        self._train = config.train
        self.total_steps = self.budget.steps(steps_per_epoch, self.batch_size)
        """Of the whole schedule, where it is known before the end."""
        self._check_budget()
        self._follow_budget(amount_before)

    @property
    def value(self) -> float:
        return self.state.progress

    @property
    def last_step(self) -> int | None:
        """None where the run ends by time or energy."""
        return self._train.last_step(self.total_steps)

    @property
    def is_over(self) -> bool:
        state = self.state
        return state.progress >= self._train.max_share or (self.last_step is not None and state.step >= self.last_step)

    @property
    def epoch_is_over(self) -> bool:
        return self.state.cursor >= self.steps_per_epoch * self.batch_size

    @property
    def share_done(self) -> float:
        """As `value`, unless train.max_share or train.max_steps ends the run before."""
        state = self.state
        return max(state.progress / self._train.max_share, state.step / self.last_step if self.last_step else 0.0)

    def advance(self) -> None:
        """Count a finished step; `update` follows."""
        self.state.advance(self.batch_size)

    def update(self, measured: int) -> None:
        """Bring `value` up to date, which never decreases; `measured`: the largest `measure` of all ranks."""
        state = self.state
        if self.total_steps is not None:
            state.progress = state.step / self.total_steps
        else:
            state.progress = max(state.progress, measured / _PARTS)

    def measure(self) -> int:
        """Progress in whole parts, by the first rank's clock and the energy of all; all ranks must call."""
        if self.total_steps is not None:
            return 0
        if self.budget.kind == "joules":
            self.read_energy()
        if not self._world.is_first:
            return 0
        reserve = (self.state.evaluation_cost or 0.0) + LAST_SAVES * (self.state.save_cost or 0.0)
        room = self.budget.amount - reserve
        share = self.amount_spent / room if room > 0 else 1.0
        return round(min(share, 1.0) * _PARTS)

    def agree(self) -> None:
        """Bring `value` up to date outside a step; all ranks must call."""
        self.update(*self._world.largest(self.measure()))

    def read_energy(self) -> None:
        """Add up the joules of all ranks; raises `UserError` where a budget of energy can no longer be measured."""
        known = self.cost.joules
        self.cost.read_energy()
        if self.cost.lost_energy and self.budget.kind == "joules":
            # For the rerun, to which spent.json tells it.
            self.cost.set_energy(known)
            raise UserError(
                f"budget: {self.budget.text}, but NVML no longer reads the energy of a GPU; rerun the command to "
                "resume from the last checkpoint once it does",
                "energy-lost",
            )

    @property
    def amount_spent(self) -> float:
        """In the unit of the budget."""
        state = self.state
        amounts = {
            "epochs": state.progress * self.budget.amount,
            "images": state.images_seen,
            "seconds": self.cost.seconds,
            "joules": self.cost.joules or 0.0,
        }
        return amounts[self.budget.kind]

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Measure the cost of the evaluation inside, where the budget has a use for it; all ranks must enter."""
        if self.total_steps is not None:
            yield
            return
        self.read_energy()
        before = self.amount_spent
        yield
        self.read_energy()
        self.state.evaluation_cost = self._world.share(self.amount_spent - before)

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Measure the cost of the checkpoint written inside. The first rank enters alone, where the energy of all
        cannot be read: it is taken at the mean power of the run.
        """
        before = self.cost.seconds
        rate = (self.cost.joules or 0.0) / before if self.budget.kind == "joules" else 1.0
        yield
        self.state.save_cost = (self.cost.seconds - before) * rate

    def evaluation_is_wanted(self) -> bool:
        """True once the cost of an evaluation must be known."""
        state = self.state
        return self.total_steps is None and state.evaluation_cost is None and state.progress >= EVALUATED_BY

    def leaves_room(self) -> bool:
        """True while the budget allows one more evaluation before the last."""
        state = self.state
        if self.total_steps is not None or state.evaluation_cost is None:
            return True
        return (1 - state.progress) * self.budget.amount > state.evaluation_cost

    def _check_budget(self):
        budget = self.budget
        if budget.kind == "images" and not self.total_steps:
            raise UserError(f"budget: {budget.text} is less than one batch of {self.batch_size}", "budget-too-small")
        if budget.kind == "joules" and self.cost.energy.joules() is None:
            raise UserError(
                f"budget: {budget.text} needs the energy counter of a GPU (NVML), which is "
                f"{self.cost.energy.description}; give hours instead, budget=2h",
                "no-energy-counter",
            )
        if budget.kind == "joules" and self.cost.joules_before is None:
            raise UserError(
                f"budget: cannot resume {budget.text}, because spent.json is damaged or has no energy reading; "
                "run.fresh=true starts over in a new folder",
                "energy-unknown",
            )

    def _follow_budget(self, amount_before):
        """Make the progress of a checkpoint that of this budget."""
        state = self.state
        if self.total_steps is not None:
            state.progress = state.step / self.total_steps
            state.epoch_progress = (state.step - state.cursor // self.batch_size) / self.total_steps
        elif amount_before is not None and amount_before != self.budget.amount:
            state.progress *= amount_before / self.budget.amount
            state.epoch_progress *= amount_before / self.budget.amount

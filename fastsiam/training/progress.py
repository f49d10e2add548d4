"""How far a run is: progress in [0, 1], the share of its budget that is spent; every schedule is a function of it.

Epochs and images come to the same steps on every machine. Time and energy are read by the first rank, and what the last
evaluation and the checkpoints around it cost is kept back, so that the cosine ends when there is just that left.
"""

import contextlib
from collections.abc import Iterator

from fastsiam.config import Config
from fastsiam.errors import UserError
from fastsiam.runtime.distributed import World
from fastsiam.runtime.energy import EnergyMeter
from fastsiam.training.cost import Spent
from fastsiam.training.state import State

# Where no evaluation has come by then, one is made, to know what the last will cost.
EVALUATED_BY = 0.1
# One before the last evaluation, which may be long, and one after it.
LAST_SAVES = 2
_PARTS = 10**9


class Pace:
    """Progress of a run, the same on all its ranks."""

    def __init__(
        self,
        config: Config,
        state: State,
        spent: Spent,
        energy: EnergyMeter,
        steps_per_epoch: int,
        world: World,
        amount_before: float | None = None,
    ):
        """Raises `UserError` for a budget that buys no step, and for one of energy where it cannot be measured.

        `amount_before`: the amount of the budget in the checkpoint that `state` comes from, which may be smaller.
        """
        self.budget = config.to_spend
        self._state, self._spent, self._energy, self._world = state, spent, energy, world
        self._max_steps = config.train.max_steps
        self._save_cost = 0.0
        self.total_steps: int | None = None
        """Of the whole schedule, where it is known before the end."""
        if self.budget.kind == "epochs":
            self.total_steps = config.train.epochs * steps_per_epoch
        elif self.budget.kind == "images":
            self.total_steps = int(self.budget.amount) // config.train.batch_size
            if not self.total_steps:
                raise UserError(f"budget: {self.budget.text} is less than one batch of {config.train.batch_size}")
        elif self.budget.kind == "joules" and energy.joules() is None:
            raise UserError(
                f"budget: {self.budget.text} needs the energy counter of a GPU (NVML), which is {energy.description}; "
                "give hours instead, budget=2h"
            )
        elif self.budget.kind == "joules" and spent.joules_before is None:
            raise UserError(
                f"budget: {self.budget.text}, but what this run has used before is not known (spent.json in its folder "
                "is damaged or tells no joules); run.fresh=true starts over in a new folder"
            )
        self._follow_budget(config.train.batch_size, amount_before)

    @property
    def last_step(self) -> int | None:
        """None where only the budget tells."""
        known = [steps for steps in (self.total_steps, self._max_steps) if steps]
        return min(known, default=None)

    @property
    def is_over(self) -> bool:
        state = self._state
        return state.progress >= 1 or (self.last_step is not None and state.step >= self.last_step)

    @property
    def share_done(self) -> float:
        """Of what this run will do: as progress, unless train.max_steps ends it before."""
        state = self._state
        return max(state.progress, state.step / self.last_step if self.last_step else 0.0)

    def agree(self, *values: int) -> list[int]:
        """Bring progress up to date, which never goes back; of each of `values` the largest over all ranks."""
        state = self._state
        if self.total_steps is not None:
            state.progress = state.step / self.total_steps
            return self._world.largest(*values)
        *values, parts = self._world.largest(*values, self._measured())
        state.progress = max(state.progress, parts / _PARTS)
        return values

    def read_energy(self) -> None:
        """Add up what the GPUs of all ranks have used; all ranks must ask."""
        joules = self._world.collect(self._energy.joules())
        lost = None in joules
        if lost and self.budget.kind == "joules":
            raise UserError(
                f"budget: {self.budget.text}, but NVML no longer tells the energy of a GPU; the same command goes on "
                "from the last checkpoint once it does"
            )
        self._spent.set_joules(None if lost else sum(joules))

    @property
    def amount_spent(self) -> float:
        """In the unit of the budget; of seconds and joules the first rank's."""
        if self.budget.kind == "joules":
            return self._spent.joules or 0.0
        if self.budget.kind == "seconds":
            return self._spent.seconds
        return self._state.images_seen if self.budget.kind == "images" else self._state.progress * self.budget.amount

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """What passes inside is what the last evaluation will cost; all ranks come here together."""
        if self.total_steps is not None:
            yield
            return
        self.read_energy()
        before = self.amount_spent
        yield
        self.read_energy()
        self._state.evaluation_cost = self._world.share(self.amount_spent - before)

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """What passes inside is what a checkpoint costs. The first rank comes here alone, where no energy can be read
        of all: it is taken at the mean power of the run.
        """
        before = self._spent.seconds
        rate = (self._spent.joules or 0.0) / before if self.budget.kind == "joules" else 1.0
        yield
        self._save_cost = (self._spent.seconds - before) * rate

    def evaluation_is_wanted(self) -> bool:
        """Whether what an evaluation costs must be known now."""
        state = self._state
        return self.total_steps is None and state.evaluation_cost is None and state.progress >= EVALUATED_BY

    def leaves_room(self) -> bool:
        """For one more evaluation before the last."""
        state = self._state
        if self.total_steps is not None or state.evaluation_cost is None:
            return True
        return (1 - state.progress) * self.budget.amount > state.evaluation_cost

    def _follow_budget(self, batch_size, amount_before):
        """Make the progress of a checkpoint that of this budget."""
        state = self._state
        if self.total_steps is not None:
            state.progress = state.step / self.total_steps
            state.epoch_progress = (state.step - state.cursor // batch_size) / self.total_steps
        elif amount_before is not None and amount_before != self.budget.amount:
            state.progress *= amount_before / self.budget.amount
            state.epoch_progress *= amount_before / self.budget.amount

    def _measured(self):
        """Progress in whole parts, by the first rank's clock and the energy of all."""
        if self.budget.kind == "joules":
            self.read_energy()
        if not self._world.is_first:
            return 0
        reserve = (self._state.evaluation_cost or 0.0) + LAST_SAVES * self._save_cost
        room = self.budget.amount - reserve
        share = self.amount_spent / room if room > 0 else 1.0
        return round(min(share, 1.0) * _PARTS)

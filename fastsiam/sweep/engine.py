"""Trains the variants of a plan side by side, round by round, and goes on where an earlier start has stopped.

Another command that compares runs needs `plan_of`, `train_all` and `conclude`:

    plan = plan_of([Variant("stop-gradient", config, seed=0), ...], folder)
    with opened(plan) as ledger:
        signal = train_all(plan, ledger, console)
    conclude(plan, ledger, console, title)
"""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence

from filelock import FileLock, Timeout
from rich.console import Console

from fastsiam.errors import ExitCode, UserError
from fastsiam.run.progress_line import ProgressLine, duration
from fastsiam.sweep import scores, slots
from fastsiam.sweep.child import TRAINER, Child, is_held
from fastsiam.sweep.ledger import Ended, Ledger
from fastsiam.sweep.plan import Plan

# Seconds between two looks at the processes.
_EVERY = 0.2


@contextlib.contextmanager
def opened(plan: Plan) -> Iterator[Ledger]:
    """The ledger of a sweep, which no other process may have open; raises `UserError` where one has.

    The folder is made here, after all checks.
    """
    Ledger(plan.folder).check(plan)
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(plan.folder / "lock")
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(
            f"run.name: another process trains the sweep in {plan.folder}; wait for it, or give run.name=NEW",
            "sweep-locked",
        ) from None
    except OSError as error:
        raise UserError(
            f"run.dir: cannot write {plan.folder} ({error.strerror or error}); choose another run.dir",
            "run-folder-unwritable",
        ) from error
    with lock:
        ledger = Ledger(plan.folder)
        ledger.begin(plan)
        yield ledger


def train_all(
    plan: Plan,
    ledger: Ledger,
    console: Console,
    *,
    devices: Sequence[str] = (),
    trainer: Sequence[str] = TRAINER,
) -> int | None:
    """Trains what has not ended yet; returns the signal that stopped it, None where all rounds are over.

    `devices`: GPUs, of which each run gets one in turn. A run that fails does not stop the others. SIGINT, SIGTERM and
    SIGUSR1 are passed on to the runs, which save; a second SIGINT ends them at once.
    """
    with _signals() as received:
        work = _Work(plan, ledger, console, list(devices), trainer, received)
        try:
            for number in range(len(plan.rounds)):
                if not work.train(number):
                    break
        finally:
            work.close()
    return received[0] if received else None


class _Work:
    """Runs that wait, train and have ended."""

    def __init__(self, plan, ledger, console, devices, trainer, received):
        self._plan, self._ledger, self._say = plan, ledger, _printer(console)
        self._devices, self._trainer, self._received = devices, trainer, received
        self._line = ProgressLine(console, "starting")
        self._running: dict[int, Child] = {}
        self._given_up: set[str] = set()
        """Runs that failed in this start; the next one tries them again."""
        self._passed_on = 0

    def close(self) -> None:
        """Ends what still trains, where an error has ended the sweep."""
        self._line.close()
        for child in self._running.values():
            child.stop(signal.SIGTERM)

    def train(self, number: int) -> bool:
        """Trains one round to its end; returns False where a signal came before."""
        plan, ledger = self._plan, self._ledger
        part = set(scores.taking_part(plan, ledger, number))
        there = [variant for variant in plan.variants if variant.label in part]
        waiting = [one for one in there if not ledger.is_final(one.name, number) and one.name not in self._given_up]
        if len(plan.rounds) > 1 and waiting:
            share = 100 * plan.rounds[number].share
            self._say(
                f"round     {number + 1} of {len(plan.rounds)}: {len(part)} settings to {share:g} % of the schedule"
            )
        held: set[str] = set()
        while (waiting and not self._received) or self._running:
            self._pass_signals_on()
            self._start(waiting, number, held)
            for slot, child in list(self._running.items()):
                if child.has_ended():
                    del self._running[slot]
                    self._note(child, len(there) - len(waiting) - len(self._running), len(there))
            self._show(number, there, waiting)
            time.sleep(_EVERY)
        return not self._received

    def _start(self, waiting, number, held):
        free = [slot for slot in range(self._plan.at_once) if slot not in self._running]
        for variant in list(waiting):
            if not free or self._received:
                return
            if is_held(self._plan.folder / variant.name):
                if variant.name not in held:
                    held.add(variant.name)
                    self._say(f"waiting   another process still trains {variant.name}")
                continue
            slot = free.pop(0)
            environment = slots.environment_of(slot, self._plan.at_once, self._devices)
            overrides = slots.overrides_of(variant.config, self._plan.at_once)
            self._running[slot] = Child(self._plan, variant, number, environment, overrides, self._trainer)
            waiting.remove(variant)

    def _pass_signals_on(self):
        for number in self._received[self._passed_on :]:
            if not self._passed_on:
                self._say(
                    f"stopping  the runs that train ({len(self._running)}) save and end; Ctrl-C now ends them at once"
                )
            for child in self._running.values():
                child.stop(number)
            self._passed_on += 1

    def _note(self, child, so_far, of):
        if self._received and child.was_stopped:
            return
        ended = child.ended()
        if ended.status != "done":
            self._given_up.add(ended.name)
        self._ledger.add(ended)
        self._say(f"{f'{so_far}/{of}':9} {ended.name}  {_summary(ended)}")

    def _show(self, number, there, waiting):
        if not self._running or not self._line.is_due():
            return
        plan = self._plan
        works = [plan.rounds[index].settings * plan.stretch(index) for index in range(len(plan.rounds))]
        shares = {child.variant.name: child.progress for child in self._running.values()}
        done = (len(there) - len(waiting) - len(shares) + sum(shares.values())) / len(there)
        names = ", ".join(f"{name} {100 * share:.0f} %" for name, share in list(shares.items())[:3])
        more = f" and {len(shares) - 3} more" if len(shares) > 3 else ""
        self._line.show(
            (sum(works[:number]) + done * works[number]) / sum(works),
            f"{len(there) - len(waiting) - len(shares)}/{len(there)} runs done, training {names}{more}",
        )


def exit_code(plan: Plan, ledger: Ledger, stopped: int | None) -> int:
    """Returns 128 + the signal that stopped the sweep; 0 where all runs have ended, a collapse among them.

    Otherwise the code of the first run that could not be trained (2, 5, or 1 for a crash), or that of the first run
    where none has a result.
    """
    if stopped is not None:
        return 128 + stopped
    ends = [end for end in (ledger.last(variant.name) for variant in plan.variants) if end is not None]
    failed = [end for end in ends if end.status in ("refused", "stuck", "crashed")]
    if not failed and any(end.status == "done" for end in ends):
        return int(ExitCode.DONE)
    code = (failed or ends)[0].exit_code if ends else int(ExitCode.ERROR)
    return code if code in (2, 3, 4, 5) else int(ExitCode.ERROR)


def _summary(ended: Ended) -> str:
    if ended.status != "done":
        return f"{ended.status}: {ended.said}"
    measure = "rankme" if ended.knn_top1 is None else "knn_top1"
    score = scores.described(scores.measured([getattr(ended, measure)]), measure)
    loss = "" if ended.loss is None else f"  loss {ended.loss:+.3f}"
    rate = "" if ended.images_per_second is None else f"  {ended.images_per_second:,.0f} img/s"
    return f"{score}{loss}{rate}" + ("" if ended.seconds is None else f"  {duration(ended.seconds)}")


def _printer(console: Console) -> Callable[[str], None]:
    return lambda text: console.print(text, highlight=False, soft_wrap=True, markup=False)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals that have come, in their order; nothing else happens at one of them inside of the block."""
    received: list[int] = []
    asking = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, lambda came, _frame: received.append(came)) for number in asking}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

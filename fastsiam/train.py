"""python -m fastsiam.train --config NAME [key.sub=value ...] [--dry-run]: pretrain an encoder.

The only file that knows the order of things: build, resume, loop, log, evaluate, save. Its module level imports no
torch, so that a mistake in a config is answered in a moment. Exit codes: 0 done, 2 the user's mistake, 3 collapsed,
130 and 143 stopped by Ctrl-C and SIGTERM with a checkpoint.
"""

import argparse
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING

from fastsiam.config import Config, UserError, load_config

if TYPE_CHECKING:
    from fastsiam.record import Result
    from fastsiam.session import Session


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastsiam.train", description="Pretrain an encoder.")
    parser.add_argument("--config", required=True, help="a YAML file, or the name of one in configs/")
    parser.add_argument("--dry-run", action="store_true", help="show what would run, and exit")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="for example train.epochs=10")
    arguments = parser.parse_intermixed_args(argv)
    # OpenMP threads that spin at barriers starve the decoder's on small machines: with both cores of a 2-core CPU
    # busy, a step of the quickstart takes 1.3 to 3.1 s spinning and 0.4 to 0.5 s sleeping.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        config = load_config(arguments.config, arguments.overrides)
        if arguments.dry_run:
            from fastsiam.announce import dry_run

            dry_run(config)
            return 0
        return pretrain(config).exit_code
    except (UserError, ImportError) as error:
        if isinstance(error, ModuleNotFoundError):
            raise
        print(f"fastsiam: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastsiam: stopped before the first step", file=sys.stderr)
        return 128 + signal.SIGINT


def pretrain(config: Config) -> "Result":
    """Train the method of `config` to its end, or from where its run folder stopped.

    Raises `UserError` for what the user can put right; nothing has been written then. Stops in good order, with a
    checkpoint, on SIGTERM and Ctrl-C.
    """
    from fastsiam.session import Session

    with Session(config) as session:
        finished = session.finished_result()
        if finished is not None:
            return finished
        with StopSignals() as stop:
            session.start()
            return session.end(train(session, stop), stop.received)


def train(session: "Session", stop: "StopSignals") -> str:
    """The loop over epochs and steps; returns the status that the run ends with."""
    state, config, clock = session.state, session.config, session.clock
    batch_size, total_steps = config.train.batch_size, config.train.epochs * session.loader.steps_per_epoch
    while state.step < session.last_step:
        batches = session.loader.epoch(state.epoch, state.cursor)
        clock.split("other")
        while (batch := next(batches, None)) is not None:
            clock.split("wait")
            rate = session.set_learning_rate(state.step / total_steps)
            out = session.step(batch.views)
            session.method.after_step((state.step + 1) / total_steps)
            state.advance(batch_size)
            clock.split("step")
            if state.step % config.train.log_every_steps == 0 or state.step == session.last_step:
                session.log(out["loss"], rate)
            if session.guard.due(state.step) and session.judge_collapse():
                return "collapsed"
            if stop.received:
                return "preempted"
            session.save_if_due()
            if state.step == session.last_step and state.cursor < session.loader.steps_per_epoch * batch_size:
                return "done"
            clock.split("other")
        state.next_epoch()
        session.evaluate_if_due()
    return "done"


class StopSignals:
    """SIGTERM and Ctrl-C as a flag that the loop reads between steps; a second one ends the process at once."""

    def __init__(self):
        self.received: int | None = None
        self._before = {}

    def __enter__(self):
        if threading.current_thread() is not threading.main_thread():
            # Python delivers signals to the main thread only, and lets only that one ask for them.
            return self
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number, _frame):
        self.received = number
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)
        os.write(sys.stderr.fileno(), b"stopping after this step, with a checkpoint; a second signal ends at once\n")


if __name__ == "__main__":
    sys.exit(main())

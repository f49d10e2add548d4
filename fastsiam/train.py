"""python -m fastsiam.train --config NAME [key.sub=value ...] [--dry-run]: pretrain an encoder.

The only file that knows the order of things: build, resume, loop, log, evaluate, save. Its module level imports no
torch, so that a mistake in a config is answered in a moment. Exit codes: 0 done, 1 another process has gone, 2 the
user's mistake, 3 collapsed, 4 the loss is no longer finite, 5 no step for too long, 130, 138 and 143 stopped by Ctrl-C,
SIGUSR1 and SIGTERM with a checkpoint. Under torchrun such a stop is 0, for any other code would have it start the
processes again.
"""

import argparse
import sys
from typing import TYPE_CHECKING

from fastsiam import cli
from fastsiam.config import Config, load_config
from fastsiam.config.views import size_at
from fastsiam.errors import UserError
from fastsiam.run.stop_signals import StopSignals
from fastsiam.training.cost import process_began

if TYPE_CHECKING:
    from fastsiam.run.folder import Result
    from fastsiam.run.session import Session


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastsiam.train", description="Pretrain an encoder.")
    parser.add_argument("--config", required=True, help="a YAML file, or the name of one in configs/")
    parser.add_argument("--dry-run", action="store_true", help="show what would run, and exit")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="for example train.epochs=10")
    arguments = parser.parse_intermixed_args(argv)
    try:
        cli.prepare_process()
        config = load_config(arguments.config, arguments.overrides)
    except UserError as error:
        return cli.refused(error)
    return cli.answered(
        lambda: _dry_run(config) if arguments.dry_run else _train(config),
        gone="another process of the run has gone; nothing was saved after it",
        stopped="stopped before the first step",
    )


def _dry_run(config):
    from fastsiam.run.dry_run import dry_run

    dry_run(config)
    return 0


def _train(config):
    result = pretrain(config, began=process_began())
    from fastsiam.runtime.distributed import under_torchrun

    return 0 if result.status == "preempted" and under_torchrun() else result.exit_code


def pretrain(config: Config, *, began: float | None = None) -> "Result":
    """Train the method of `config` to its end, or from where its run folder stopped.

    `began`: when this process began to spend what the run has, by `time.monotonic`; None: now. Under torchrun this
    process is one rank of several. Raises `UserError` for what the user can put right; where that shows before
    training, nothing has been written. Stops in good order, with a checkpoint, on SIGTERM, SIGUSR1 and Ctrl-C.
    """
    from fastsiam.run.session import Session
    from fastsiam.runtime.distributed import World

    world = World.of_environment()
    with world.joined(config.train.device), Session(config, world, began) as session:
        finished = session.finished_result()
        if finished is not None:
            return finished
        with StopSignals(world.is_first, session.abandon) as stop:
            session.start()
            status, received = train(session, stop)
            return session.end(status, received)


def train(session: "Session", stop: StopSignals) -> tuple[str, int | None]:
    """The loop over epochs and steps; returns the status that the run ends with, and the signal that ended it."""
    state, config, clock = session.state, session.config, session.clock
    batch_size = config.train.batch_size
    while not session.pace.is_over:
        size = size_at(config.views.sizes, state.epoch, state.epoch_progress)
        batches = session.loader.epoch(state.epoch, state.cursor, size)
        clock.split("other")
        while (batch := next(batches, None)) is not None:
            # Starting the backend is no waiting for data: nothing that reads or decodes faster would shorten it.
            clock.split("other" if batch.cold else "wait")
            if batch.cold:
                session.log.loader_watch.begin()
            rate = session.set_learning_rate()
            out = session.step(batch.views, batch.indices)
            state.advance(batch_size)
            clock.split("step")
            received, saving, showing = session.agree(stop.received)
            session.method.after_step(state.progress)
            last = session.pace.is_over
            logging = last or state.step % config.train.log_every_steps == 0
            telling = logging or showing or saving or received
            looking = telling or session.checkup.is_due() or session.evaluation_is_next()
            if looking and not session.numbers_are_sound(out["loss"]):
                return "failed", None
            if logging:
                session.log.write(rate)
            if showing or last:
                session.log.show()
            if session.checkup.has_collapsed():
                return "collapsed", None
            if received:
                return "preempted", received
            if saving:
                session.saver.save_on_the_way()
            session.evaluate_early()
            if session.pace.is_over and state.cursor < session.loader.steps_per_epoch * batch_size:
                return "done", None
            clock.split("other")
        session.save_before_evaluation()
        state.next_epoch()
        session.evaluate_if_due()
    if not state.step:
        spent = f"{session.spent.seconds:,.0f} s were over"
        session.journal.warn(
            f"budget: {session.pace.budget.text} was spent before the first step ({spent}): the weights are untrained"
        )
    return "done", None


if __name__ == "__main__":
    sys.exit(main())

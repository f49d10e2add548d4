"""python -m fastsiam.train --config NAME [key.sub=value ...] [--dry-run]: pretrain an encoder.

The order of things, and no more: build, resume, train, log, evaluate, save. The module level imports no torch, so that
a mistake in a config is answered in a moment. Exit codes: those of `ExitCode`; 130, 138 and 143 for a run stopped by
Ctrl-C, SIGUSR1 and SIGTERM with a checkpoint. Under torchrun such a stop is 0, for any other code would have it start
the processes again.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from fastsiam import cli
from fastsiam.config import Config, load_config
from fastsiam.errors import UserError
from fastsiam.runtime.collection import collection_paused
from fastsiam.training.cost import process_began

if TYPE_CHECKING:
    from fastsiam.run.evaluation_schedule import EvaluationSchedule
    from fastsiam.run.folder import Result
    from fastsiam.run.run import Run
    from fastsiam.run.training_data import TrainingData
    from fastsiam.runtime.distributed import World
    from fastsiam.training.progress import Progress
    from fastsiam.training.step import TrainingStep


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
        too_large=cli.STEP_TOO_LARGE,
    )


def _dry_run(config):
    from fastsiam.run.dry_run import dry_run

    dry_run(config)
    return 0


def _train(config):
    result = pretrain(config, began=process_began())
    from fastsiam.runtime.distributed import under_torchrun

    return 0 if result.status == "preempted" and under_torchrun() else result.exit_code


class Parts(NamedTuple):
    """A run that is ready to train, or one that has ended before."""

    data: "TrainingData"
    step: "TrainingStep"
    progress: "Progress"
    evaluation: "EvaluationSchedule"
    run: "Run"


def pretrain(config: Config, *, began: float | None = None) -> "Result":
    """Train the method of `config` to the end of its budget, or resume where its run folder stopped.

    `began`: when this process began to spend time of the budget, by `time.monotonic`; None: now. Under torchrun this
    process is one rank of several. Raises `UserError` for what the user can put right; where that shows before
    training, nothing has been written. Stops in good order, with a checkpoint, on SIGTERM, SIGUSR1 and Ctrl-C.
    """
    with collection_paused():
        from fastsiam.run.finish import finish
        from fastsiam.runtime.distributed import World

    world = World.of_environment()
    with world.joined(config.train.device), opened(config, world, began) as (parts, earlier):
        if earlier is not None:
            return earlier
        status = train(config, *parts)
        return finish(parts.run, status, parts.step, parts.evaluation)


@contextlib.contextmanager
def opened(
    config: Config, world: "World | None" = None, began: float | None = None
) -> Iterator[tuple[Parts | None, "Result | None"]]:
    """The parts of a run, ready for `train`; or, where an earlier start has finished it, its result.

    `world`: the ranks, which have joined; None for this process alone.
    """
    import torch

    from fastsiam.methods import build_method
    from fastsiam.optim.build import build_optimizer
    from fastsiam.run.evaluation_schedule import EvaluationSchedule
    from fastsiam.run.resume import finished
    from fastsiam.run.run import Run
    from fastsiam.run.start import started
    from fastsiam.runtime.distributed import World
    from fastsiam.training.step import TrainingStep

    world = world or World()
    with started(config, world, began) as start:
        runtime, data, progress, folder, _, journal, weights = start
        result = world.share(finished(config, folder, progress, journal) if world.is_first else None)
        if result is not None:
            yield None, result
            return
        torch.manual_seed(config.train.seed)
        method = build_method(config, world.size, world.rank)
        if weights is not None:
            weights.load_into(method.encoder)
            method.after_loading()
        method.to(runtime.device)
        if config.train.channels_last:
            method.to(memory_format=torch.channels_last)
        with world.together():
            optimizer = build_optimizer(method, config)
        with Run.open(config, start) as run:
            step = TrainingStep(method, optimizer, config, runtime, run.watchdog.paused)
            step.rehearse_growth()
            evaluation = EvaluationSchedule(
                config, method, data, progress, journal, folder.path, run.watchdog, step.encoder
            )
            run.on_close(evaluation.close)
            run.begin(step, evaluation)
            yield Parts(data, step, progress, evaluation, run), None


def train(
    config: Config,
    data: "TrainingData",
    step: "TrainingStep",
    progress: "Progress",
    evaluation: "EvaluationSchedule",
    run: "Run",
) -> str:
    """Train until the budget is spent; returns the status with which the run ends."""
    from fastsiam.optim.build import set_learning_rate

    state = progress.state
    while not progress.is_over:
        for batch in run.log.timed(data.epoch(progress)):
            rate = set_learning_rate(step.optimizer, config, state.progress, state.epoch_progress)
            evaluation.remember(batch.views, batch.indices)
            # Nothing is read back from the device.
            out = step(batch.views, state.step + 1, batch.indices, state.progress)
            run.finished_step(step)
            evaluation.learn(out["features"], batch.labels)
            progress.advance()
            asked = run.ask_ranks()  # one exchange; brings progress up to date
            if run.must_read(asked) or evaluation.is_due:
                reading = run.read(step, evaluation)  # waits for the device
                if reading.is_nonfinite:
                    return "failed"
                run.log_step(reading, rate, asked, evaluation)
            if evaluation.measure_collapse():
                return "collapsed"
            if asked.signal:
                return "preempted"
            if asked.save:
                run.save_on_the_way(step, evaluation)
            run.evaluate_early(step, evaluation)
            if progress.is_over and not progress.epoch_is_over:
                return "done"
        run.save_before_evaluation(step, evaluation)
        state.next_epoch()
        run.evaluate_epoch(evaluation)
    return "done"


if __name__ == "__main__":
    sys.exit(main())

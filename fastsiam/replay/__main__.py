"""python -m fastsiam.replay RUN --step N [--out FOLDER] [--images K] [--data PATH] [--from-start]: one step again.

Writes the views of the step's batch as a picture; with a checkpoint before the step it trains on in memory and prints
the step's loss and gradients. Nothing of the run is changed, and it may be running. Exit codes: 0, 2 the user's
mistake, 130 Ctrl-C.
"""

import argparse
import sys
from pathlib import Path

from fastsiam import cli
from fastsiam.config.yaml_file import expand_home
from fastsiam.errors import UserError
from fastsiam.replay.recorded import Recorded, read_recorded
from fastsiam.replay.schedule import Schedule
from fastsiam.run.reading import ending


def main(argv: list[str] | None = None) -> int:
    """Replays a step; returns the exit code. torch is imported once the run, its images and the step are checked."""
    arguments = _parser().parse_args(argv)
    notes = []
    try:
        cli.prepare_process()
        _check_counts(arguments.step, arguments.images)
        recorded = read_recorded(arguments.run, arguments.data, notes.append)
        _check_step(recorded, arguments.step)
    except UserError as error:
        return cli.print_error(error)
    for note in notes:
        print(f"note      {note}")
    out = arguments.out or arguments.run / "replay" / f"step-{arguments.step}"
    return cli.answered(
        lambda: _replay(recorded, arguments, out),
        gone="another process has gone",
        stopped=f"stopped; pictures that were written are in {out}, and the run is as it was",
    )


def _replay(recorded: Recorded, arguments: argparse.Namespace, out: Path) -> int:
    from fastsiam.replay.replay import Asked, replay

    asked = Asked(arguments.step, out, arguments.images, arguments.from_start)
    replay(recorded, asked, lambda line: print(line, flush=True))
    return 0


def _check_counts(step: int, images: int) -> None:
    if step < 1:
        raise UserError(f"--step: {step} is before the first step; steps count from 1", "no-such-step")
    if images < 1:
        raise UserError(f"--images: {images} is not above 0; give the number of rows of the picture", "no-images")


def _check_step(recorded: Recorded, step: int) -> None:
    """Raises `UserError` for a step beyond the end of the run."""
    schedule = Schedule(recorded.config, recorded.steps_per_epoch, recorded.lines)
    last, run = schedule.last_step, recorded.path
    if last is not None and step > last:
        raise UserError(f"--step: {step} is beyond the end of {run}; its last step is {last}", "no-such-step")
    reached = max(schedule.reached, recorded.status_step())
    # Steps since the last line are not counted anywhere.
    unseen = recorded.config.train.log_every_steps if ending(recorded.path) in (None, "killed") else 0
    if last is None and step > reached + unseen:
        raise UserError(
            f"--step: {step} is beyond the end of {run}, which has come to step {reached}; its budget is "
            f"{recorded.config.to_spend.text}, and no later step is known",
            "no-such-step",
        )


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m fastsiam.replay",
        description="Rebuild the batch of any step of a run; with a checkpoint before it also its loss and gradients. "
        "Changes nothing of the run, which may be running.",
    )
    parser.add_argument("run", metavar="RUN", type=expand_home, help="a run folder, for example runs/quickstart")
    parser.add_argument("--step", metavar="N", type=int, required=True, help="which step; the first is 1")
    parser.add_argument("--out", metavar="FOLDER", type=expand_home, help="default: RUN/replay/step-N")
    parser.add_argument("--images", metavar="K", type=int, default=16, help="rows of the picture (%(default)s)")
    parser.add_argument("--data", metavar="PATH", help="where the training images lie now, if they have moved")
    parser.add_argument(
        "--from-start",
        action="store_true",
        help="where no checkpoint is before the step, train to it from the initial weights",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""python -m fastsiam.follow RUN --to wandb|mlflow [--project P] [--offline]: copies a run into an experiment tracker.

Reads metrics.jsonl while it grows; the run knows nothing of it. Goes on where it was when it is started again. Exit
codes: 0 the run has ended, 2 the user's mistake, 130 Ctrl-C or SIGTERM.
"""

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from fastsiam.cli import answered
from fastsiam.config.yaml_file import expand_home
from fastsiam.errors import UserError
from fastsiam.follow.follow import PROJECT, follow, wait_for
from fastsiam.run.reading import check_may_begin, has_begun


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    return answered(
        lambda: _follow(arguments),
        gone="another process has gone",
        stopped="stopped; the same command goes on from here",
    )


def _follow(arguments):
    folder, to = arguments.run, arguments.to
    check_may_begin(folder)
    say = lambda line: print(line, flush=True)  # noqa: E731
    with _sigterm_as_ctrl_c():
        # A run refuses a folder in which something lies before it.
        ended = wait_for(folder, lambda: has_begun(folder), f"the run in {folder} to begin", say)
        if ended is None:
            memory = folder / f"follow-{to}{'-offline' if arguments.offline else ''}.json"
            with _alone(memory.with_suffix(".lock"), folder, to):
                ended = follow(folder, to, arguments.project, arguments.offline, memory, say)
    later = "; the same command goes on when it is resumed" if ended in ("preempted", "killed", "failed") else ""
    print(f"followed  {folder} to its end: {ended}{later}")
    return 0


@contextlib.contextmanager
def _alone(path: Path, folder: Path, to: str) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(
            f"RUN: another process follows {folder} into {to}; end it first, or leave it to it", "followed"
        ) from None
    except OSError as error:
        raise UserError(
            f"RUN: cannot write into {folder} ({error.strerror or error}), where what was sent is remembered; make it "
            "writable",
            "place-unwritten",
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Schedulers end a process with SIGTERM; what was read is sent first."""

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m fastsiam.follow",
        description="Copy the numbers of a run into Weights & Biases or MLflow while it trains, or after it.",
    )
    parser.add_argument("run", metavar="RUN", type=expand_home, help="a run folder, for example runs/quickstart")
    parser.add_argument("--to", required=True, choices=("wandb", "mlflow"), help="the tracker")
    parser.add_argument("--project", help=f"project of wandb, experiment of MLflow (default: {PROJECT})")
    parser.add_argument("--offline", action="store_true", help="write into RUN/wandb or RUN/mlruns, use no network")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""python -m fastsiam.plan --config NAME [--budget 8h] [--json] [key.sub=value ...]: predicts a run, and its limit.

Trains for about a minute on the real data, on a throw-away model. Writes nothing but the caches that any start writes.
Exit codes: 0, 1 another process has gone, 2 the user's mistake, 130 Ctrl-C.
"""

import argparse
import sys

from fastsiam import cli
from fastsiam.config import Config, load_config
from fastsiam.config.budget import Budget, parse_budget
from fastsiam.errors import UserError
from fastsiam.training.cost import process_began


def main(argv: list[str] | None = None) -> int:
    """Prints a plan; returns the exit code. torch is imported once the command line and the config are checked."""
    arguments = _parser().parse_intermixed_args(argv)
    try:
        cli.prepare_process()
        config = load_config(arguments.config, arguments.overrides)
        budget = None if arguments.budget is None else _budget(arguments.budget, config)
        if not arguments.minutes > 0:
            raise UserError(f"--minutes: {arguments.minutes:g} is not more than 0; give a minute or more", "no-minutes")
    except UserError as error:
        return cli.refused(error)
    return cli.answered(
        lambda: _print_plan(config, budget, arguments.minutes, arguments.json),
        gone="another process has gone; nothing is predicted",
        stopped="stopped while measuring; nothing is predicted",
        too_large=cli.STEP_TOO_LARGE,
    )


def _print_plan(config: Config, budget: Budget | None, minutes: float, as_json: bool) -> int:
    from fastsiam.plan.measure import measure
    from fastsiam.plan.predict import plan_of
    from fastsiam.plan.text import text_of
    from fastsiam.runtime.distributed import World

    world = World.of_environment()
    with world.joined(config.train.device):
        measured, loading = measure(config, world, minutes, process_began())
    if world.is_first:
        plan = plan_of(config, budget, measured, loading)
        print(plan.to_json() if as_json else text_of(plan, config))
    return 0


def _budget(text: str, config: Config) -> Budget:
    try:
        return parse_budget(text, config.budget_price_per_hour)
    except UserError as error:
        raise UserError(f"--{error}" if error.key == "budget" else str(error), error.code) from error


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m fastsiam.plan", description="Predict time, energy and cost of a run, and what limits it."
    )
    parser.add_argument("--config", required=True, help="a YAML file, or the name of one in configs/")
    parser.add_argument("--budget", help="what else to spend: 8h, 10M images, 0.8kWh, 15USD")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, numbers not rounded")
    parser.add_argument("--minutes", type=float, default=1.0, help="for measuring, compilation apart (%(default)g)")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="for example train.batch_size=256")
    return parser


if __name__ == "__main__":
    sys.exit(main())

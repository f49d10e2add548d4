"""python -m fastsiam.plan --config NAME [--budget 8h] [--json] [key.sub=value ...]: what a run will take, and why.

Trains for about a minute on the real data, on a throw-away model, and writes nothing but what any start keeps in its
cache: no run folder. Its module level imports no torch. Exit codes: 0, 1 another process has gone, 2 the user's
mistake, 130 Ctrl-C.
"""

import argparse
import sys

from fastsiam import cli
from fastsiam.config import Config, load_config
from fastsiam.config.budget import Budget, parse_budget
from fastsiam.errors import UserError
from fastsiam.training.cost import process_began

MINUTES = 1.0


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_intermixed_args(argv)
    try:
        cli.prepare_process()
        config = load_config(arguments.config, arguments.overrides)
        budget = _budget(arguments.budget, config)
        if not arguments.minutes > 0:
            raise UserError(f"--minutes: {arguments.minutes:g} must be more than 0")
    except UserError as error:
        return cli.refused(error)

    def print_plan():
        answer = plan(config, budget, arguments.minutes, as_json=arguments.json)
        if answer is not None:
            print(answer)
        return 0

    return cli.answered(
        print_plan,
        gone="another process has gone; nothing is predicted",
        stopped="stopped while measuring; nothing is predicted",
    )


def plan(config: Config, budget: Budget | None, minutes: float = MINUTES, *, as_json: bool = False) -> str | None:
    """Measure for about `minutes`; the answer for people or as JSON, None on the ranks that do not speak.

    `budget`: what to spend beside what the config says. Raises the `UserError` that the run would raise.
    """
    from fastsiam.plan.measure import measure
    from fastsiam.plan.predict import plan_of
    from fastsiam.plan.text import text_of
    from fastsiam.runtime.distributed import World

    world = World.of_environment()
    with world.joined(config.train.device):
        measured, loading = measure(config, world, minutes, process_began())
    if not world.is_first:
        return None
    made = plan_of(config, budget, measured, loading)
    return made.to_json() if as_json else text_of(made, config)


def _budget(text: str | None, config: Config) -> Budget | None:
    if text is None:
        return None
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
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for measuring, compilation apart (%(default)g)")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="for example train.batch_size=256")
    return parser


if __name__ == "__main__":
    sys.exit(main())

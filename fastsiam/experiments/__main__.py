"""python -m fastsiam.experiments NAME [--config BASE] [--seeds N] [--budget T]: an experiment of the SimSiam paper.

Exit codes: those of fastsiam.sweep.
"""

import argparse
import sys
from pathlib import Path

from fastsiam.cli import answered
from fastsiam.config import load_config
from fastsiam.config.budget import parse_budget
from fastsiam.errors import UserError
from fastsiam.experiments.base import Base, base_of
from fastsiam.experiments.conclude import conclude
from fastsiam.experiments.experiments import EXPERIMENTS, Case, Experiment, experiment_named
from fastsiam.run.progress_line import duration
from fastsiam.sweep import slots
from fastsiam.sweep.conduct import check_budget, conduct, digest_of
from fastsiam.sweep.ledger import Ledger
from fastsiam.sweep.plan import Plan, Variant, folder_name, plan_of
from fastsiam.sweep.start import check_one_process

_BASE, _SEEDS = "quickstart", 3
_HELP = """\
Each experiment trains variants of the base config and puts their kNN accuracy beside the paper's numbers. The same
command goes on with an experiment that was stopped. key=value changes the base: run.dir=FOLDER and run.name=NAME say
where the experiment lies, data.train=PATH data.val=PATH name other images.
"""


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_intermixed_args(argv)
    return answered(
        lambda: _list(arguments.seeds) if arguments.list else _experiment(arguments),
        gone="another process has gone",
        stopped="stopped before the first run",
    )


def _list(seeds) -> int:
    base = base_of(load_config(_BASE))
    for found in EXPERIMENTS.values():
        variants = len(found.cases(base))
        print(f"{found.name:17} {found.source:12} {variants * seeds:2} runs: {variants} variants, {_many(seeds)}")
        print(f"{'':17} {found.shows}")
    return 0


def _experiment(arguments) -> int:
    check_one_process("fastsiam experiments")
    if arguments.name is None:
        raise UserError(f"NAME: give an experiment, one of {', '.join(EXPERIMENTS)}, or --list", "no-experiment")
    experiment = experiment_named(arguments.name)
    _check_numbers(arguments)
    base = base_of(_base_config(arguments))
    cases = experiment.cases(base)
    plan, devices = _plan(arguments, experiment, base, cases)
    return conduct(
        plan,
        opening_lines(experiment, base, cases, plan, devices),
        devices=devices,
        dry_run=arguments.dry_run,
        conclude=lambda ledger, console: conclude(experiment, cases, plan, ledger, console),
    )


def _base_config(arguments):
    check_budget(arguments.budget, {override.partition("=")[0] for override in arguments.overrides})
    config = load_config(arguments.config, arguments.overrides)
    if config.run.fresh:
        raise UserError(
            "run.fresh: an experiment goes on where it stopped; give run.name=NEW for another one", "sweep-fresh"
        )
    return config


def _plan(arguments, experiment: Experiment, base: Base, cases: list[Case]) -> tuple[Plan, list[str]]:
    first = base.config.train.seed
    variants = [
        Variant(case.label, base.config.with_values({**case.values, "train.seed": seed}), seed, {"variant": case.title})
        for seed in range(first, first + arguments.seeds)
        for case in cases
    ]
    devices = [] if base.config.train.device == "cpu" else slots.gpus()
    at_once = arguments.at_once or len(devices) or 1
    folder = Path(base.config.run.dir) / _name(arguments, experiment, base)
    known = Ledger(folder).plan
    each = known.get("each") if known.get("budget") == arguments.budget else None
    return plan_of(variants, folder, budget=arguments.budget, at_once=at_once, each=each), devices


def _name(arguments, experiment: Experiment, base: Base) -> str:
    """run.name where it is given, else experiment, config, and a hash of what is asked. More seeds without a budget are
    the same experiment.
    """
    if any(override.startswith("run.name=") for override in arguments.overrides):
        return base.config.run.name
    digest = digest_of(arguments.overrides, arguments.budget, arguments.seeds if arguments.budget else None)
    return f"{experiment.name}-{folder_name(Path(arguments.config).stem)}-{digest}"


def opening_lines(experiment: Experiment, base: Base, cases: list[Case], plan: Plan, devices: list[str]) -> list[str]:
    """Returns what an experiment will do: its variants, how many runs, how long each, where."""
    seeds = len(plan.variants) // len(cases)
    lines = [f"paper     {experiment.title}, {experiment.source}: {experiment.shows}"]
    lines += [f"variant   {case.title} (the paper: {case.paper})" for case in cases]
    lines.append(f"runs      {len(plan.variants)}: {len(cases)} variants, {_many(seeds)}")
    where = f"GPUs {', '.join(devices)}" if devices else "CPU"
    lines.append(f"at once   {plan.at_once} on {where}")
    if plan.each is None:
        lines.append(f"length    {base.config.to_spend.text} each; --budget T sets that of the whole experiment")
    else:
        whole = parse_budget(plan.budget, base.config.budget_price_per_hour)
        in_all = f"about {duration(whole.amount)} in all" if whole.is_time else f"{plan.budget} in all"
        lines.append(f"length    {in_all}, {plan.each} each")
    lines.append(f"folder    {plan.folder}")
    return lines


def _check_numbers(arguments):
    for option in ("seeds", "at_once"):
        given = getattr(arguments, option)
        if given is not None and given < 1:
            raise UserError(f"--{option.replace('_', '-')}: {given} is less than 1; give 1 or more", "out-of-range")


def _many(seeds):
    return f"{seeds} seed{'s' * (seeds != 1)}"


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m fastsiam.experiments",
        description="Run an experiment of the SimSiam paper: its variants, beside its numbers.",
        epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="of an experiment, see --list")
    parser.add_argument("--list", action="store_true", help="name the experiments with table, runs and what they show")
    parser.add_argument("--config", default=_BASE, help=f"base: a config whose method is simsiam (default: {_BASE})")
    parser.add_argument("--budget", help="of the whole experiment, in place of the base's epochs: 20min, 2M images")
    parser.add_argument("--seeds", type=int, default=_SEEDS, help=f"runs of each variant (default: {_SEEDS})")
    parser.add_argument("--at-once", type=int, help="runs side by side; default: one on each GPU, 1 without")
    parser.add_argument("--dry-run", action="store_true", help="print variants, runs and time; train nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes the base, as for fastsiam train")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""python -m fastsiam.sweep --config NAME key=a,b,c train.seed=0..2 [--budget T] [--halving]: many runs, one table.

Exit codes: 0 all runs have ended, 2 the user's mistake with nothing written; 1, 2 or 5 of a run that could not be
trained; 3 or 4 where every run has collapsed or failed; 130, 138, 143 stopped by Ctrl-C, SIGUSR1, SIGTERM.
"""

import argparse
import shlex
import sys
from pathlib import Path

from fastsiam.cli import answered
from fastsiam.config import Config, load_config
from fastsiam.config.budget import parse_budget
from fastsiam.errors import UserError
from fastsiam.run.progress_line import duration
from fastsiam.sweep import grid as grids
from fastsiam.sweep import slots
from fastsiam.sweep.conduct import check_budget, conduct, digest_of
from fastsiam.sweep.grid import Grid
from fastsiam.sweep.ledger import Ledger
from fastsiam.sweep.outcome import conclude
from fastsiam.sweep.plan import SEED, Plan, folder_name, plan_of
from fastsiam.sweep.start import check_one_process

_HELP = """\
KEY=a,b,c     several values of a key; commas inside of [], {} and quotes do not separate
KEY=0..2      the integers 0, 1 and 2, for keys that take integers alone; views.size=128..224 and
              data.deep_pixels=LOW..HIGH stay one value, for there .. is part of the value
KEY=value     one value, as for fastsiam train; run.dir=FOLDER and run.name=NAME say where the sweep lies

Several keys give all combinations. Runs that differ in train.seed alone are one setting, judged by its mean. Without
data.val settings are compared by RankMe, which needs no labels. The same command goes on with a sweep that was stopped.
"""


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_intermixed_args(argv)
    return answered(
        lambda: _sweep(arguments),
        gone="another process has gone",
        stopped="stopped before the first run",
    )


def _sweep(arguments) -> int:
    check_one_process("fastsiam sweep")
    grid = grids.parse(arguments.overrides)
    _check_lengths(arguments, grid)
    base = load_config(arguments.config, grid.overrides)
    if base.run.fresh:
        raise UserError("run.fresh: a sweep goes on where it stopped; give run.name=NEW for another one", "sweep-fresh")
    variants = grids.variants_of(arguments.config, grid)
    folder = Path(base.run.dir) / _name(arguments, grid, base)
    devices = [] if all(variant.config.train.device == "cpu" for variant in variants) else slots.gpus()
    at_once = arguments.at_once or len(devices) or 1
    options = {"budget": arguments.budget, "halving": arguments.halving}
    # On another number of GPUs the runs keep the budgets that they have begun with.
    known = Ledger(folder).plan
    each = known.get("each") if known.get("budget") == arguments.budget else None
    plan = plan_of(variants, folder, **options, at_once=at_once, each=each)
    title, go_on = f"{Path(arguments.config).stem}: {_keys(grid)}", _next(arguments, grid, plan)
    return conduct(
        plan,
        opening_lines(plan, grid, devices),
        devices=devices,
        dry_run=arguments.dry_run,
        conclude=lambda ledger, console: conclude(plan, ledger, console, title, go_on),
    )


def opening_lines(plan: Plan, grid: Grid, devices: list[str]) -> list[str]:
    """Returns what a sweep will do: how many runs, how long each and in all, where."""
    seeds = len({variant.seed for variant in plan.variants})
    runs, settings = len(plan.variants), len(plan.labels)
    lines = [f"sweep     {_many(runs, 'run')}: {_keys(grid)} ({_many(settings, 'setting')}, {_many(seeds, 'seed')})"]
    where = f"GPUs {', '.join(devices)}" if devices else "CPU"
    lines.append(f"at once   {plan.at_once} on {where}")
    for number, part in enumerate(plan.rounds if len(plan.rounds) > 1 else ()):
        goes_on = "the better half goes on" if number + 1 < len(plan.rounds) else "the end"
        lines.append(
            f"round {number + 1}   {part.settings} settings to {100 * part.share:g} % of the schedule; {goes_on}"
        )
    if plan.each is None:
        own = {variant.config.to_spend.text for variant in plan.variants}
        length = own.pop() if len(own) == 1 else "as long as their configs say"
        lines.append(f"length    {length} each; fastsiam plan measures how long that takes, --budget T sets it")
    else:
        whole = parse_budget(plan.budget, plan.variants[0].config.budget_price_per_hour)
        in_all = f"about {duration(whole.amount)} in all" if whole.is_time else f"{plan.budget} in all"
        lines.append(f"length    {in_all}, {plan.each} for a run that trains to its end")
    what = "kNN on data.val, or RankMe where a run has none" if plan.measure == "knn_top1" else "RankMe, without labels"
    lines.append(f"measure   {what}")
    lines.append(f"folder    {plan.folder}")
    return lines


def _check_lengths(arguments, grid):
    given = [override.partition("=")[0] for override in grid.overrides] + list(grid.values)
    check_budget(arguments.budget, given)
    if arguments.at_once is not None and arguments.at_once < 1:
        raise UserError(f"--at-once: {arguments.at_once} is less than one run; give 1 or more", "bad-at-once")
    if not grid.values:
        raise UserError(
            "KEY=VALUES: no key has several values; give one, for example optimizer.base_lr=0.02,0.05 or "
            "train.seed=0..2, or use fastsiam train",
            "nothing-to-compare",
        )


def _name(arguments, grid: Grid, base: Config) -> str:
    """Name of the sweep's folder: run.name where it is given, else config, keys, and a hash of all that is asked."""
    stem = Path(arguments.config).stem
    if any(override.startswith("run.name=") for override in grid.overrides):
        return base.run.name
    digest = digest_of(grid.overrides, sorted(grid.values.items()), arguments.budget, arguments.halving)
    return f"{folder_name(stem)}-{'-'.join(grid.short.values())[:60]}-{digest}"


def _next(arguments, grid: Grid, plan: Plan):
    """The command that trains the winner to its whole length or, where it is trained so far, evaluates it."""

    def command(best, measure):
        variant = best.runs[0][0]
        if plan.budget is None and measure == "knn_top1":
            run, data = shlex.quote(str(plan.folder / variant.name)), variant.config.data
            sources = f"--train {shlex.quote(data.train)} --val {shlex.quote(data.val)}"
            return f"python -m fastsiam.evaluate linear {run} {sources}"
        chosen = [f"{key}={best.values[short]}" for key, short in grid.short.items() if key != SEED]
        kept = [override for override in grid.overrides if not override.startswith("run.name=")]
        typed = " ".join(shlex.quote(text) for text in (*kept, *chosen))
        return f"python -m fastsiam.train --config {shlex.quote(arguments.config)} {typed}".strip()

    return command


def _many(count, noun):
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _keys(grid):
    return ", ".join(f"{len(texts)} of {key}" for key, texts in grid.values.items())


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m fastsiam.sweep",
        description="Train a config with several values of some keys, and compare the runs in one table and one page.",
        epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="a YAML file, or the name of one in configs/")
    parser.add_argument(
        "--budget",
        help="of the whole sweep: 20min and 2h on the wall, or 10M images, 0.8kWh, 15USD of all runs together; it "
        "takes the place of the config's epochs. Default: each run has the config's own length",
    )
    parser.add_argument(
        "--halving",
        action="store_true",
        help="train all settings to a part of their schedule, the better half twice as far, and so on to its end",
    )
    parser.add_argument("--at-once", type=int, metavar="N", help="runs side by side (default: one a GPU, one without)")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and the time, and exit")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUES", help="for example optimizer.base_lr=0.02,0.05,0.1"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""Predicts seconds, energy and money of a run, and the steps that a budget pays for, from measured costs."""

from bisect import bisect_right
from dataclasses import replace

import torch

import fastsiam
from fastsiam.config import Config
from fastsiam.config.budget import Budget
from fastsiam.config.published import published_for
from fastsiam.data.bottleneck import Loading
from fastsiam.evaluate.collapse import CollapseGuard
from fastsiam.evaluate.online import FILL_STEPS
from fastsiam.plan.advice import limit_of, tips
from fastsiam.plan.results import Measured, Plan, Run
from fastsiam.runtime.energy import kilowatt_hours
from fastsiam.training.progress import EVALUATED_BY, LAST_SAVES

# kNN of the untrained encoder and of raw pixels, before training.
CONTROLS = 2


def plan_of(config: Config, budget: Budget | None, measured: Measured, loading: Loading) -> Plan:
    """Returns everything that follows from the measurements. `budget`: `--budget`, beside the config's own."""
    limit, steps = limit_of(measured), steps_per_epoch(config, measured)
    return Plan(
        fastsiam=fastsiam.__version__,
        torch=torch.__version__,
        config=config.run.name,
        batch_size=config.train.batch_size,
        learning_rate=config.learning_rate,
        steps_per_epoch=steps,
        epoch_seconds=steps * config.train.batch_size / measured.images_per_second.median,
        measured=measured,
        limit=limit,
        advice=tips(config, measured, loading, limit),
        run=_with_published(config, measured, run_of_config(config, measured)),
        budget=budget and _with_published(config, measured, run_of_budget(config, measured, budget)),
    )


def steps_per_epoch(config: Config, measured: Measured) -> int:
    """Returns the number of whole batches: an incomplete last one is dropped."""
    return measured.images // config.train.batch_size


def run_of_config(config: Config, measured: Measured) -> Run:
    """Predicts the config's own epochs or budget, up to train.max_share and train.max_steps."""
    run = run_of_budget(config, measured, config.to_spend)
    most = run.steps and config.train.last_step(run.steps)
    if not run.steps or most >= run.steps:
        return run
    return run_of_steps(config, measured, config.to_spend, most)


def run_of_budget(config: Config, measured: Measured, budget: Budget) -> Run:
    """Predicts the longest run that a budget pays for, without regard to where the config stops it."""
    planned = budget.steps(steps_per_epoch(config, measured), config.train.batch_size)
    if planned is not None:
        return run_of_steps(config, measured, budget, planned)
    seconds, watts = budget.amount, _watts(measured)
    if budget.kind == "joules":
        if watts is None:
            return Run(budget.text, budget.kind, budget.amount)
        seconds = budget.amount / watts
    most = int(seconds * measured.images_per_second.median / config.train.batch_size) + 1
    steps = range(most + 1)
    fitting = bisect_right(steps, seconds, key=lambda count: run_of_steps(config, measured, budget, count).total)
    return run_of_steps(config, measured, budget, max(fitting - 1, 0))


def run_of_steps(config: Config, measured: Measured, budget: Budget, steps: int) -> Run:
    """Predicts what a number of steps of a budget takes."""
    per_epoch, has_knn = steps_per_epoch(config, measured), measured.knn_seconds is not None
    fills = FILL_STEPS if config.evaluate.controls and has_knn else 0
    knn_times = _knn_times(config, steps, per_epoch, early=not budget.counts_steps) if has_knn else 0
    collapse_times = -(-steps // CollapseGuard(per_epoch).every_steps)
    train = (steps + fills) * config.train.batch_size / measured.images_per_second.median
    save_times = int(train // config.checkpoint.every_seconds) + LAST_SAVES
    seconds = {
        "start": measured.start_seconds,
        "compile": measured.compile_seconds,
        "train": train,
        "knn": knn_times * (measured.knn_seconds or 0.0),
        "collapse": collapse_times * measured.collapse_seconds,
        "saves": save_times * (measured.checkpoint.seconds or 0.0),
    }
    total, watts, price = sum(seconds.values()), _watts(measured), config.budget_price_per_hour
    return Run(
        asked=budget.text,
        kind=budget.kind,
        amount=budget.amount,
        steps=steps,
        epochs=steps / per_epoch,
        **seconds,
        knn_times=knn_times,
        collapse_times=collapse_times,
        save_times=save_times,
        total=total,
        watts=watts,
        kwh=None if watts is None else kilowatt_hours(watts * total),
        cost=None if price is None else total / 3600 * price,
    )


def _with_published(config: Config, measured: Measured, run: Run) -> Run:
    """Returns the run with the published accuracies of its number of epochs."""
    if run.steps is None:
        return run
    found, reason = published_for(config, measured.images, run.epochs)
    return replace(run, published=found, not_published=reason)


def _watts(measured: Measured) -> float | None:
    joules = measured.joules_per_image
    return None if joules is None else joules * measured.images_per_second.median


def _knn_times(config: Config, steps: int, per_epoch: int, *, early: bool) -> int:
    """Counts kNN evaluations. `early`: the run makes one to know what its last will cost, unless one comes by then."""
    every = (config.evaluate.knn_every_epochs or 0) * per_epoch
    regular = steps // every if every else 0
    last = 0 if regular and steps == regular * every else 1
    extra = early and (not every or every > EVALUATED_BY * steps)
    return regular + last + extra + (CONTROLS if config.evaluate.controls else 0)

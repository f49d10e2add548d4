"""Predictions from known costs, to the last digit."""

import dataclasses

import pytest

from fastsiam.config import load_config
from fastsiam.config.budget import parse_budget
from fastsiam.plan.predict import run_of_budget, run_of_config, run_of_steps, steps_per_epoch
from fastsiam.plan.results import Checkpoint
from tests.support.plans import measured, rates

# Epochs of 10 steps, each a second; a checkpoint a minute.
CONFIG = ("train.batch_size=100", "checkpoint.every_seconds=60", "evaluate.controls=false")
COSTS = measured(
    images=1050,
    images_per_second=rates(100),
    start_seconds=7.0,
    compile_seconds=20.0,
    knn_seconds=3.0,
    collapse_seconds=0.5,
    checkpoint=Checkpoint(1000, 0.25),
    joules_per_image=5.0,
)
EPOCHS, HOURS = parse_budget("1M images"), parse_budget("1h")


def config(*overrides, knn=5):
    return load_config("r50_100ep", [*CONFIG, f"evaluate.knn_every_epochs={knn}", *overrides])


def test_a_run_is_the_sum_of_its_parts():
    """100 steps: kNN after epochs 5 and 10, collapse every 25, a save a minute and two at the end."""
    run = run_of_steps(config("budget_price_per_hour=3.6"), COSTS, EPOCHS, 100)
    assert (run.epochs, run.knn_times, run.collapse_times, run.save_times) == (10, 2, 4, 3)
    assert run.train == pytest.approx(100.0)
    assert run.total == pytest.approx(7 + 20 + 100 + 2 * 3 + 4 * 0.5 + 3 * 0.25)
    assert run.kwh == pytest.approx(500 * run.total / 3.6e6)
    assert run.cost == pytest.approx(run.total / 1000)
    assert run_of_steps(config(), COSTS, EPOCHS, 100).cost is None


@pytest.mark.parametrize(
    ("steps", "budget", "overrides", "knn", "times"),
    [
        (50, EPOCHS, (), 5, 1),
        (70, EPOCHS, (), 5, 2),
        (100, EPOCHS, (), "null", 1),
        # Two before training.
        (100, EPOCHS, ("evaluate.controls=true",), 5, 4),
        # In a budget of time one comes by a tenth of it, unless epoch 5 does.
        (100, HOURS, (), 5, 3),
        (600, HOURS, (), 5, 12),
    ],
)
def test_knn_is_counted_as_a_run_makes_it(steps, budget, overrides, knn, times):
    assert run_of_steps(config(*overrides, knn=knn), COSTS, budget, steps).knn_times == times


def test_controls_fill_batch_norm_statistics_and_need_knn():
    controls = config("evaluate.controls=true")
    # The untrained encoder's batch-norm statistics see 25 batches.
    assert run_of_steps(controls, COSTS, EPOCHS, 100).train == pytest.approx(125.0)
    without = run_of_steps(controls, dataclasses.replace(COSTS, knn_seconds=None), EPOCHS, 100)
    assert (without.knn_times, without.train) == (0, pytest.approx(100.0))


def test_each_kind_of_budget_buys_its_epochs():
    def steps(text, price=None):
        return run_of_budget(config(), COSTS, parse_budget(text, price)).steps

    assert steps("5k images") == 50
    assert steps("5.05k images") == 50
    # Collapse measures after 25, 50, ..., kNN after 50, 100, the early one, and the last.
    seconds = steps("200s")
    assert run_of_steps(config(), COSTS, HOURS, seconds).total <= 200
    assert run_of_steps(config(), COSTS, HOURS, seconds + 1).total > 200
    assert seconds == 153
    assert steps("0.2USD", price=3.6) == seconds
    # 100 kJ at 500 W.
    assert steps(f"{100 / 3600}kWh") == seconds
    assert steps("10s") == 0
    assert (
        run_of_budget(config(), dataclasses.replace(COSTS, joules_per_image=None), parse_budget("1kWh")).steps is None
    )


def test_a_configs_own_run_ends_at_its_max_steps():
    timed = ["budget=2h", "train.max_steps=70"]
    half = ["train.max_share=0.5"]
    for overrides, steps in ((["train.max_steps=70"], 70), ([], 250_200), (timed, 70), (half, 125_100)):
        own = load_config("r50_100ep", overrides)
        assert steps_per_epoch(own, measured()) == 2502
        assert run_of_config(own, measured()).steps == steps

"""Rounds and shares of a budget, by hand."""

from pathlib import Path

import pytest

from fastsiam.config import load_config
from fastsiam.config.budget import part_of
from fastsiam.sweep.plan import START_SECONDS, Variant, halvings, plan_of
from tests.support.refusals import refuses


def variants(settings, seeds=1, *overrides):
    config = load_config("quickstart", overrides)
    return [
        Variant(f"lr={number}", config.with_values({"optimizer.base_lr": number, "train.seed": seed}), seed)
        for number in range(1, settings + 1)
        for seed in range(seeds)
    ]


def plan(settings, seeds=1, **options):
    return plan_of(variants(settings, seeds), Path("runs/sweep"), **options)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (2, [(0.5, 2), (1, 1)]),
        (3, [(0.5, 3), (1, 2)]),
        (4, [(0.5, 4), (1, 2)]),
        (5, [(0.25, 5), (0.5, 3), (1, 2)]),
        (8, [(0.25, 8), (0.5, 4), (1, 2)]),
        (9, [(0.125, 9), (0.25, 5), (0.5, 3), (1, 2)]),
    ],
)
def test_the_better_half_trains_twice_as_far(settings, expected):
    assert [(part.share, part.settings) for part in halvings(settings)] == expected


def test_time_is_shared_on_the_wall():
    # 6 runs one after another; on 4 GPUs in two turns.
    assert plan(3, 2, budget="20min").each == f"{(1200 - 6 * START_SECONDS) // 6}s"
    assert plan(3, 2, budget="20min", at_once=4).each == f"{(1200 - 2 * START_SECONDS) // 2}s"


def test_images_energy_and_money_are_added_up():
    assert plan(3, 2, budget="60k images", at_once=4).each == "10000 images"
    assert plan(3, 2, budget="0.6kWh").each == "0.1kWh"
    priced = variants(3, 2, "train.epochs=null", "budget=1h", "budget_price_per_hour=2")
    assert plan_of(priced, Path("runs/x"), budget="12USD").each == "2USD"


def test_halving_pays_each_round_for_what_it_adds():
    # 8 x 2 runs to a quarter, 4 x 2 a quarter further, 2 x 2 a half further: 4 + 2 + 2 whole runs.
    assert plan(8, 2, budget="80k images", halving=True).each == "10000 images"
    # Two at once: 8, 4 and 2 turns, 14 starts.
    expected = (3600 - 14 * START_SECONDS) / (8 / 4 + 4 / 4 + 2 / 2)
    assert plan(8, 2, budget="1h", halving=True, at_once=2).each == f"{int(expected)}s"


def test_a_run_has_its_folder_its_budget_and_its_seed():
    found = plan(2, 2, budget="60k images")
    config = found.config_of(found.variants[3])
    assert (config.run.dir, config.run.name) == ("runs/sweep", "lr=2_seed=1")
    assert (config.budget, config.train.epochs, config.train.seed) == ("15000 images", None, 1)
    own = plan(2)
    assert own.config_of(own.variants[0]).to_spend.text == "8 epochs"


@pytest.mark.parametrize("budget", ["2min", "400 images", "3s"])
def test_too_small_a_budget_names_one_that_suffices(budget):
    with refuses("budget-too-small", "--budget") as caught:
        plan(4, 2, budget=budget, halving=True)
    enough = str(caught.value).partition("; give ")[2].partition(" or more")[0].replace(",", "")
    assert plan(4, 2, budget=enough, halving=True).each


def test_what_cannot_be_halved_or_compared_is_refused():
    with refuses("one-setting", "--halving"):
        plan(1, 3, halving=True)
    with refuses("halving-stops", "train.max_steps"):
        plan_of(variants(2, 1, "train.max_steps=5"), Path("x"), halving=True)
    with refuses("no-measure", "data.backend"):
        plan_of(variants(2, 1, "data.backend=synthetic", "data.val=null"), Path("x"))
    with refuses("unknown-unit", "--budget"):
        plan(2, budget="5 mins")
    with refuses("same-setting"):
        plan_of([*variants(1), *variants(1)], Path("x"))


def test_without_labels_rankme_is_the_measure():
    assert plan(2).measure == "knn_top1"
    assert plan_of(variants(2, 1, "data.val=null"), Path("x")).measure == "rankme"


@pytest.mark.parametrize(
    ("text", "share", "part"),
    [("20min", 1 / 9, "133s"), ("10M images", 1 / 3, "3333333 images"), ("0.8kWh", 0.25, "0.2kWh"),
     ("15USD", 1 / 9, "1.666666USD"), (".5 h", 0.5, "900s")],
)  # fmt: skip
def test_a_part_of_a_budget_is_rounded_down(text, share, part):
    assert part_of(text, share) == part

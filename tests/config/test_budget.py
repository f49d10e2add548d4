"""Budgets as they are written, on the command line and in a config, and those that are refused."""

import pytest

from fastsiam.config import load_config
from fastsiam.config.budget import Budget, parse_budget
from tests.support.refusals import refused, refuses

WRITTEN = {
    "2h": ("seconds", 7200),
    "1.5h": ("seconds", 5400),
    "45min": ("seconds", 2700),
    "90 s": ("seconds", 90),
    "1d": ("seconds", 86400),
    "10M images": ("images", 10_000_000),
    "1.28M images": ("images", 1_280_000),
    "512 images": ("images", 512),
    "1 image": ("images", 1),
    "300k images": ("images", 300_000),
    "0.8kWh": ("joules", 2.88e6),
    "500 Wh": ("joules", 1.8e6),
    ".5kWh": ("joules", 1.8e6),
}


@pytest.mark.parametrize("text", WRITTEN)
def test_an_amount_with_its_unit(text):
    kind, amount = WRITTEN[text]
    assert parse_budget(text) == Budget(kind, pytest.approx(amount), text)


def test_money_is_time_at_a_price():
    """15 / 2.5 hours."""
    assert parse_budget("15USD", 2.5) == Budget("seconds", 21600, "15USD")
    assert parse_budget("3 EUR", 1).amount == 10800
    # The price of an hour is a fact to report where the budget is another one.
    assert parse_budget("2h", 2.5) == parse_budget("2h")


REFUSED = {
    "budget=2": "budget-without-unit",
    "budget=2.5": "budget-without-unit",
    "budget=two hours": "not-a-budget",
    "budget=-2h": "not-a-budget",
    "budget=2hours": "unknown-unit",
    "budget=10m": "unknown-unit",
    # Three capital letters, but no currency: at 3 an hour 45MIN would be 15 hours.
    "budget=45MIN": "unknown-unit",
    "budget=0.8KWH": "unknown-unit",
    "budget=0h": "empty-budget",
    "budget=0.1 images": "empty-budget",
    f"budget={'9' * 400}M images": "empty-budget",
    "budget=0 images": "empty-budget",
    "budget=15USD": "no-price",
    "budget_price_per_hour=0": "out-of-range",
    "train.epochs=null": "no-epochs-no-budget",
}


@pytest.mark.parametrize("override", REFUSED)
def test_what_is_not_a_budget_is_refused(override):
    price = {"budget_price_per_hour"} if REFUSED[override] == "no-price" else set()
    error = refused("train", "--config", "quickstart", override)
    assert error.code == REFUSED[override]
    assert error.key in price | {override.partition("=")[0]}


def test_the_last_word_wins():
    """A budget on the command line takes the place of the file's epochs, and epochs that of its budget."""
    assert load_config("r50_100ep").to_spend == Budget("epochs", 100, "100 epochs")
    spending = load_config("r50_100ep", ["budget=2h"])
    assert (spending.train.epochs, spending.to_spend.amount) == (None, 7200)
    assert load_config("r50_8h").to_spend == Budget("seconds", 28800, "8h")
    counting = load_config("r50_8h", ["train.epochs=3"])
    assert (counting.train.epochs, counting.budget) == (3, None)
    assert load_config("r50_100ep", ["budget=null"]).train.epochs == 100
    with refuses("epochs-and-budget", "budget"):
        load_config("r50_100ep", ["budget=2h", "train.epochs=3"])


def test_another_budget_is_another_run():
    names = {load_config("r50_100ep", [f"budget={text}"]).run.name for text in ("2h", "3h", "2M images")}
    assert len(names) == 3


def test_a_budget_is_parsed_once(monkeypatch):
    config = load_config("r50_8h")
    monkeypatch.setattr("fastsiam.config.schema.parse_budget", None)
    assert config.to_spend is config.to_spend


@pytest.mark.parametrize(("budget", "code"), [("0.8kWh", "no-energy-counter"), ("7 images", "budget-too-small")])
def test_what_this_run_cannot_spend_is_refused(tiny, tmp_path, budget, code):
    """Energy that nothing measures here, and less than a batch of 8."""
    error = refused("train", "--config", "quickstart", *tiny("train.epochs=null", f"budget={budget}"))
    assert (error.key, error.code) == ("budget", code)
    assert not (tmp_path / "runs").exists()

"""What may be spent, as it is written: on the command line, in a config, and what is refused."""

import pytest

from fastsiam.config import load_config
from fastsiam.config.budget import Budget, parse_budget
from fastsiam.errors import UserError
from fastsiam.train import main

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
    "budget=2": "budget: 2 has no unit; write 2h, 45min, 10M images, 0.8kWh or 15USD",
    "budget=2.5": "budget: 2.5 has no unit; write 2h",
    "budget=two hours": "budget: 'two hours' is not an amount with its unit; write 2h",
    "budget=-2h": "budget: '-2h' is not an amount with its unit",
    "budget=2hours": "budget: '2hours' has a unit that is not known (hours); write 2h",
    "budget=10m": "budget: '10m' has a unit that is not known (m)",
    # Three capital letters, but no currency: at 3 an hour 45MIN would be 15 hours.
    "budget=45MIN": "budget: '45MIN' has a unit that is not known (MIN); did you mean min?",
    "budget=0.8KWH": "budget: '0.8KWH' has a unit that is not known (KWH); did you mean kWh?",
    "budget=0h": "budget: '0h' must be more than nothing",
    "budget=0.1 images": "budget: '0.1 images' must be more than nothing",
    f"budget={'9' * 400}M images": f"budget: '{'9' * 35} ... ",
    "budget=0 images": "budget: '0 images' must be more than nothing",
    "budget=15USD": "budget_price_per_hour: null, but budget is 15USD; set what an hour costs in USD",
    "budget_price_per_hour=0": "budget_price_per_hour: 0 should be greater than 0",
    "train.epochs=null": "train.epochs: null, and there is no budget; set train.epochs=100 or budget=2h",
}


@pytest.mark.parametrize("override", REFUSED)
def test_what_is_no_budget_is_one_sentence(override, capsys):
    assert main(["--config", "quickstart", override]) == 2
    assert capsys.readouterr().err.startswith(f"fastsiam: {REFUSED[override]}")


def test_the_last_word_wins():
    """A budget on the command line takes the place of the file's epochs, and epochs that of its budget."""
    assert load_config("r50_100ep").to_spend == Budget("epochs", 100, "100 epochs")
    spending = load_config("r50_100ep", ["budget=2h"])
    assert (spending.train.epochs, spending.to_spend.amount) == (None, 7200)
    assert load_config("r50_8h").to_spend == Budget("seconds", 28800, "8h")
    counting = load_config("r50_8h", ["train.epochs=3"])
    assert (counting.train.epochs, counting.budget) == (3, None)
    assert load_config("r50_100ep", ["budget=null"]).train.epochs == 100
    with pytest.raises(UserError, match="budget: 2h and train.epochs: 3 are both given; set one of them null"):
        load_config("r50_100ep", ["budget=2h", "train.epochs=3"])


def test_another_budget_is_another_run():
    names = {load_config("r50_100ep", [f"budget={text}"]).run.name for text in ("2h", "3h", "2M images")}
    assert len(names) == 3


def test_energy_is_refused_where_nothing_measures_it(tiny, tmp_path, capsys):
    assert main(["--config", "quickstart", *tiny("train.epochs=null", "budget=0.8kWh")]) == 2
    assert capsys.readouterr().err == (
        "fastsiam: budget: 0.8kWh needs the energy counter of a GPU (NVML), which is not available (CPU device); give "
        "hours instead, budget=2h\n"
    )
    assert not (tmp_path / "runs").exists()


def test_less_than_a_batch_is_refused(tiny, capsys):
    assert main(["--config", "quickstart", *tiny("train.epochs=null", "budget=7 images")]) == 2
    assert capsys.readouterr().err == "fastsiam: budget: 7 images is less than one batch of 8\n"

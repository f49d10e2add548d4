"""Budgets of a run: epochs, images, time, energy or money."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from fastsiam.config.yaml_file import shown
from fastsiam.errors import UserError

SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400}
JOULES = {"Wh": 3600.0, "kWh": 3.6e6}
COUNTS = {"": 1, "k": 1e3, "M": 1e6, "B": 1e9}

_NUMBER = r"(\d+(?:\.\d*)?|\.\d+)"
_IMAGES = re.compile(rf"{_NUMBER}\s*([kMB]?)\s*images?")
_QUANTITY = re.compile(rf"{_NUMBER}\s*([A-Za-z]+)")
_CURRENCY = re.compile("[A-Z]{3}")

EXAMPLES = "2h, 45min, 10M images, 0.8kWh or 15USD"


@dataclass(frozen=True)
class Budget:
    """An amount of one kind; money is time at a price."""

    kind: Literal["epochs", "images", "seconds", "joules"]
    amount: float
    text: str
    """The budget as the user wrote it."""

    @property
    def is_time(self) -> bool:
        """True for hours and minutes; money is also spent in seconds, but on several runs at once in each of them."""
        match = _QUANTITY.fullmatch(self.text)
        return match is not None and match[2] in SECONDS

    @property
    def counts_steps(self) -> bool:
        """True where the number of steps does not depend on the machine: exact resume is promised."""
        return self.kind in ("epochs", "images")

    def steps(self, steps_per_epoch: int, batch_size: int) -> int | None:
        """Steps of the whole schedule; None where time or energy ends it."""
        if self.kind == "epochs":
            return int(self.amount) * steps_per_epoch
        return int(self.amount) // batch_size if self.kind == "images" else None


def parse_budget(text: str, price_per_hour: float | None = None) -> Budget:
    """Parses `2h`, `45min`, `10M images`, `0.8kWh`, or `15USD` at `price_per_hour`.

    Raises `UserError` whose sentence begins with the key.
    """
    written = text.strip()
    if match := _IMAGES.fullmatch(written):
        return _positive("images", float(match[1]) * COUNTS[match[2]], written)
    match = _QUANTITY.fullmatch(written)
    if not match:
        raise UserError(f"budget: {shown(text)} is not an amount with its unit; write {EXAMPLES}", "not-a-budget")
    number, unit = float(match[1]), match[2]
    if unit in SECONDS:
        return _positive("seconds", number * SECONDS[unit], written)
    if unit in JOULES:
        return _positive("joules", number * JOULES[unit], written)
    meant = [known for known in (*SECONDS, *JOULES) if known.casefold() == unit.casefold()]
    if meant or not _CURRENCY.fullmatch(unit):
        cure = f"did you mean {meant[0]}?" if meant else f"write {EXAMPLES}"
        raise UserError(f"budget: {shown(text)} has an unknown unit ({unit}); {cure}", "unknown-unit")
    if price_per_hour is None:
        text = f"budget_price_per_hour: null, but budget is {written}; set what an hour costs in {unit}"
        raise UserError(text, "no-price")
    return _positive("seconds", 3600 * number / price_per_hour, written)


def part_of(text: str, share: float) -> str:
    """Returns a share of a budget as a budget in the same unit, rounded down: `133s` is a ninth of `20min`.

    `text`: one that `parse_budget` takes.
    """
    written = text.strip()
    if match := _IMAGES.fullmatch(written):
        return f"{_whole(float(match[1]) * COUNTS[match[2]] * share)} images"
    number, unit = _QUANTITY.fullmatch(written).groups()
    if unit in SECONDS:
        return f"{_whole(float(number) * SECONDS[unit] * share)}s"
    return f"{_whole(float(number) * share * 1e6) / 1e6:.6f}".rstrip("0").rstrip(".") + unit


def _whole(number):
    # 0.6 / 6 is a little less than 0.1.
    return math.floor(number + 1e-6)


def _positive(kind, amount, text):
    if kind == "images" and math.isfinite(amount):
        amount = round(amount)
    if not 0 < amount < math.inf:
        raise UserError(f"budget: {shown(text)} is not a finite amount above 0; write {EXAMPLES}", "empty-budget")
    return Budget(kind, amount, text)

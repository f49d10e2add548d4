"""Values of a grid as they are typed, `KEY=a,b,c` and `KEY=0..2`, and the variants that are their product."""

import itertools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from fastsiam.config import Config, load_config, reference
from fastsiam.config.yaml_file import flat, shown
from fastsiam.errors import UserError
from fastsiam.sweep.plan import MOST_RUNS, SEED, Variant

_RANGE = re.compile(r"\s*(-?\d+)\s*\.\.\s*(-?\d+)\s*")
# Where a sweep puts its runs is its own business.
_OF_THE_SWEEP = ("run.name", "run.dir", "run.fresh")


@dataclass(frozen=True)
class Grid:
    """Overrides of all runs, and values by key, as texts in YAML."""

    overrides: tuple[str, ...]
    values: dict[str, list[str]] = field(default_factory=dict)

    @property
    def short(self) -> dict[str, str]:
        """Names of the keys with several values: their last part where no two share it."""
        last = [key.rpartition(".")[2] for key in self.values]
        return {key: end if last.count(end) == 1 else key for key, end in zip(self.values, last, strict=True)}


def parse(arguments: Iterable[str]) -> Grid:
    """Splits `section.key=value` arguments into those with one value and those with several.

    Commas separate values, but not inside of brackets, braces and quotes. LOW..HIGH is a range of integers, both ends
    included, where the key takes integers alone: `views.size=128..224` stays one value. Raises `UserError`.
    """
    overrides, values, given = [], {}, []
    for argument in arguments:
        key, equals, text = argument.partition("=")
        found = _values(key, text) if equals else []
        given.append(key)
        if len(found) > 1:
            values[key] = found
        else:
            overrides.append(f"{key}={found[0]}" if found else argument)
    for key in values:
        if given.count(key) > 1:
            raise UserError(
                f"{key}: given {given.count(key)} times; write all its values once, {key}=A,B", "given-twice"
            )
        if key in _OF_THE_SWEEP:
            raise UserError(f"{key}: takes one value in a sweep, whose runs are named by their values", "one-value")
    return Grid(tuple(overrides), values)


def variants_of(config: str, grid: Grid, more: Sequence[str] = ()) -> list[Variant]:
    """Returns the product of a grid as variants of a config, seeds varying first.

    `config`: as `load_config` takes it; `more`: overrides of all runs that come last. Raises `UserError` for a grid of
    more than `MOST_RUNS` runs, for values that the config does not take, and for two runs that are the same.
    """
    number = prod(len(texts) for texts in grid.values.values())
    if number > MOST_RUNS:
        counts = " x ".join(f"{len(texts)} of {key}" for key, texts in grid.values.items())
        raise UserError(f"KEY=VALUES: {counts} are {number:,} runs, more than {MOST_RUNS:,}; give fewer values", "many")
    keys = sorted(grid.values, key=lambda key: key == SEED)
    found: dict[str, str] = {}
    variants, short = [], grid.short
    for texts in itertools.product(*(grid.values[key] for key in keys)):
        chosen = dict(zip(keys, texts, strict=True))
        typed = [f"{key}={text}" for key, text in chosen.items()]
        loaded = load_config(config, [*grid.overrides, *typed, *more])
        named = {short[key]: text.strip() for key, text in chosen.items() if key != SEED}
        label = "_".join(f"{name}={text}" for name, text in named.items()) or Path(config).stem
        variant = Variant(label, loaded, loaded.train.seed, named)
        known = _identity(loaded)
        if known in found:
            raise UserError(
                f"KEY=VALUES: {found[known]} and {variant.name} are the same run; leave one of the values out",
                "same-setting",
            )
        found[known] = variant.name
        variants.append(variant)
    return variants


def _values(key, text):
    parts = _split(text)
    if len(parts) > 1 and not all(part.strip() for part in parts):
        raise UserError(f"{key}: {shown(text)} has an empty value; write {key}=A,B,C", "empty-value")
    known = reference.keys().get(key) if any(map(_RANGE.fullmatch, parts)) else None
    if known is None or not known.range.startswith("integer") or " text" in known.range:
        return parts
    return [value for part in parts for value in _numbers(key, part)]


def _numbers(key, part):
    match = _RANGE.fullmatch(part)
    if match is None:
        return [part]
    low, high = int(match[1]), int(match[2])
    if low > high:
        raise UserError(f"{key}: {part.strip()} holds no number; write {key}={high}..{low}", "empty-range")
    if high - low >= MOST_RUNS:
        text = f"{key}: {part.strip()} has {high - low + 1:,} values, more than {MOST_RUNS:,}; give fewer"
        raise UserError(text, "many")
    return [str(number) for number in range(low, high + 1)]


def _split(text: str) -> list[str]:
    """Parts between commas that stand outside of brackets, braces and quotes."""
    parts, depth, quote = [""], 0, ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"" and not parts[-1].strip(" [{:,"):
            quote = sign
        elif sign in "[{":
            depth += 1
        elif sign in "]}":
            depth -= 1
        if sign == "," and depth <= 0 and not quote:
            parts.append("")
        else:
            parts[-1] += sign
    return parts


def _identity(config: Config) -> str:
    values = flat(config.model_dump(mode="json"))
    return json.dumps({key: value for key, value in values.items() if key not in _OF_THE_SWEEP}, sort_keys=True)

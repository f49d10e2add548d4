"""The README's first table: what a stranger asks, answered for fastsiam and its peers from the newest results."""

from collections.abc import Callable
from dataclasses import dataclass

CONTESTANTS = ("fastsiam", "authors", "lightly", "solo-learn")


@dataclass(frozen=True)
class Question:
    """One row: a number of a benchmark's lines with these params."""

    text: str
    benchmark: str
    key: str
    params: dict
    ours: str = "fastsiam"
    """The variant that stands for fastsiam."""


QUESTIONS = (
    Question(
        "two views each of ImageNet photographs, 224 px, images/s",
        "loader", "images_per_second", {"size": 224, "workers": 2}, "dali matrix",
    ),
    Question(
        "two views each of ImageNet photographs, 224 px, from memory, images/s",
        "loader", "images_per_second", {"size": 224, "workers": 2}, "resident matrix",
    ),
    Question("training step, ResNet-50, 224 px, images/s", "step", "images_per_second", {"encoder": "resnet50"}),
    Question("training step, ResNet-18, 32 px, images/s", "step", "images_per_second", {"encoder": "resnet18"}),
)  # fmt: skip


def machines(found: dict[str, list[list[dict]]]) -> list[list[dict]]:
    """The lines of all benchmarks that QUESTIONS ask, by machine."""
    asked = dict.fromkeys(question.benchmark for question in QUESTIONS)
    by_name = {}
    for benchmark in asked:
        for lines in found.get(benchmark, []):
            environment = lines[0]["environment"]
            by_name.setdefault((environment["gpu"], environment["cpu"]), []).extend(lines)
    return list(by_name.values())


def answers(lines: list[dict], number: Callable[[float], str]) -> tuple[list[list[str]], list[dict]]:
    """Rows of text for one machine (question, a cell a contestant, ours against the authors'), and the lines used."""
    rows, used = [], []
    for question in QUESTIONS:
        variants = dict(zip(CONTESTANTS, (question.ours, *CONTESTANTS[1:]), strict=True))
        told = {name: _line(question, variant, lines) for name, variant in variants.items()}
        if told["fastsiam"] is None:
            continue
        used += [line for line in told.values() if line]
        cells = [number(line[question.key]) if line else "-" for line in told.values()]
        ratio = told["fastsiam"][question.key] / told["authors"][question.key] if told["authors"] else None
        rows.append([question.text, *cells, f"{number(ratio)}x" if ratio else "-"])
    return rows, used


def _line(question, variant, lines):
    fitting = (
        line
        for line in lines
        if line["benchmark"] == question.benchmark
        and line["variant"] == variant
        and line.get(question.key) is not None
        and all(line["params"].get(key) == value for key, value in question.params.items())
    )
    return next(fitting, None)

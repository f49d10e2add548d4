"""Table of the README: five questions, answered for fastsiam and its peers from the newest results."""

from dataclasses import dataclass, field

from benchmarks.race import standings
from benchmarks.readme.captions import NOTHING, caption, number

CONTESTANTS = ("fastsiam", "authors", "lightly", "solo-learn")


@dataclass(frozen=True)
class Question:
    """One row: a number of the benchmark's lines that have these params."""

    text: str
    benchmark: str
    key: str
    params: dict
    variants: dict[str, str] = field(default_factory=dict)
    """The variant of a contestant where it has another name."""
    percents: str | None = None
    """The number behind a `key` that is text; percentages are compared by difference."""


QUESTIONS = (
    Question(
        "kNN after 5 minutes on 10,000 CIFAR-10 images, ResNet-8, %",
        standings.BENCHMARK, "knn", {"data": "cifar10", "images": 10_000, "encoder": "cifar_resnet8", "seconds": 300.0},
        {"solo-learn": "solo-learn DALI"}, "knn_mean",
    ),
    Question(
        "two views each of ImageNet photographs, 224 px, images/s",
        "loader", "images_per_second", {"size": 224, "workers": 2}, {"fastsiam": "dali matrix"},
    ),
    Question(
        "two views each of ImageNet photographs, 224 px, from memory, images/s",
        "loader", "images_per_second", {"size": 224, "workers": 2}, {"fastsiam": "resident matrix"},
    ),
    Question("training step, ResNet-50, 224 px, images/s", "step", "images_per_second", {"encoder": "resnet50"}),
    Question("training step, ResNet-18, 32 px, images/s", "step", "images_per_second", {"encoder": "resnet18"}),
)  # fmt: skip


def machines(found: dict[str, list[list[dict]]]) -> list[list[dict]]:
    """Returns the lines of all benchmarks of QUESTIONS, one list a machine."""
    asked = dict.fromkeys(question.benchmark for question in QUESTIONS)
    by_name = {}
    for benchmark in asked:
        for lines in found.get(benchmark, []):
            environment = lines[0]["environment"]
            # A line of a race is one run of a contestant.
            rows = standings.rows(lines) if benchmark == standings.BENCHMARK else lines
            by_name.setdefault((environment["gpu"], environment["cpu"]), []).extend(rows)
    return list(by_name.values())


def text(found: dict[str, list[list[dict]]]) -> str:
    """Returns caption and table of each machine."""
    header = ["", *CONTESTANTS, "fastsiam against authors"]
    rule = ["---", *["---:"] * (len(header) - 1)]
    texts = []
    for lines in machines(found):
        rows, used = answers(lines)
        if rows:
            table = "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))
            commits = {line["benchmark"]: line["environment"]["commit"][:12] for line in used}
            told = ", ".join(f"{commit} ({benchmark})" for benchmark, commit in commits.items())
            texts.append(f"{caption(used, {}, f'commits {told}')}\n\n{table}")
    return "\n\n".join(texts) or "No results are recorded yet."


def answers(lines: list[dict]) -> tuple[list[list[str]], list[dict]]:
    """Returns rows of text for one machine (question, contestants, ours against the authors') and their lines."""
    rows, used = [], []
    for question in QUESTIONS:
        told = {name: _line(question, question.variants.get(name, name), lines) for name in CONTESTANTS}
        if told["fastsiam"] is None:
            continue
        used += [line for line in told.values() if line]
        values = [line[question.key] if line else NOTHING for line in told.values()]
        cells = [value if isinstance(value, str) else number(value) for value in values]
        rows.append([question.text, *cells, _against(question, told["fastsiam"], told["authors"])])
    return rows, used


def _against(question, ours, theirs):
    if theirs is None:
        return NOTHING
    if question.percents:
        return f"{ours[question.percents] - theirs[question.percents]:+.1f} points"
    return f"{number(ours[question.key] / theirs[question.key])}x"


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

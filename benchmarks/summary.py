"""The README's first table: what a stranger asks, answered for fastsiam and its peers from the newest results."""

from dataclasses import dataclass

from benchmarks.captions import NOTHING, caption, number

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


def text(found: dict[str, list[list[dict]]]) -> str:
    """Caption and table for each machine."""
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
    """Rows of text for one machine (question, a cell a contestant, ours against the authors'), and the lines used."""
    rows, used = [], []
    for question in QUESTIONS:
        variants = dict(zip(CONTESTANTS, (question.ours, *CONTESTANTS[1:]), strict=True))
        told = {name: _line(question, variant, lines) for name, variant in variants.items()}
        if told["fastsiam"] is None:
            continue
        used += [line for line in told.values() if line]
        cells = [number(line[question.key]) if line else NOTHING for line in told.values()]
        ratio = told["fastsiam"][question.key] / told["authors"][question.key] if told["authors"] else None
        rows.append([question.text, *cells, f"{number(ratio)}x" if ratio else NOTHING])
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

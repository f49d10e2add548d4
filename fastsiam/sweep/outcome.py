"""End of a sweep: the table and sentences on the screen, sweep.json, and the page."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from fastsiam.errors import Notice
from fastsiam.runtime.files import replace_file
from fastsiam.sweep import scores
from fastsiam.sweep.ledger import Ledger
from fastsiam.sweep.plan import Plan
from fastsiam.sweep.scores import Setting
from fastsiam.sweep.table import text_of

PAGE, TABLE = "report.html", "sweep.json"


def conclude(
    plan: Plan,
    ledger: Ledger,
    console: Console,
    title: str,
    go_on: Callable[[Setting, str], str] | None = None,
) -> list[Setting]:
    """Prints the table, what is best and what failed; writes sweep.json and report.html; returns the rows.

    `go_on(best, measure)`: the command that goes on with the winner.
    """
    from fastsiam.sweep.page import page

    rows, measure = scores.table(plan, ledger), scores.measure_in(plan, ledger)
    sentence = scores.verdict(plan, ledger, rows)
    command = go_on(rows[0], measure) if go_on and rows and rows[0].score else None
    say = saying(console)
    say("")
    for line in text_of(plan, rows, measure):
        say(line)
    say("")
    for variant, ended in failures(rows):
        say(f"{ended.status:9} {variant.name}: {ended.said}")
    say(f"best      {sentence}")
    if command:
        say(f"go on     {command}")
    document = page(plan, rows, measure, title, sentence, command).encode("utf-8", errors="backslashreplace")
    write_files(plan.folder, {TABLE: _json(plan, rows, measure, sentence), PAGE: document}, say)
    say(f"table     {plan.folder / TABLE}")
    say(f"report    {plan.folder / PAGE}")
    return rows


def saying(console: Console) -> Callable[[str], None]:
    """Returns a function that prints a line as it is: whole, without colours or markup."""
    return lambda text: console.print(text, highlight=False, soft_wrap=True, markup=False)


def write_files(folder: Path, files: Mapping[str, bytes], say: Callable[[str], None]) -> None:
    """Writes files by their names; a disk that refuses is a warning, for the table is on the screen."""
    for name, data in files.items():
        try:
            replace_file(folder / name, data)
        except OSError as error:
            say(f"warning: {Notice(f'{folder / name} was not written ({error.strerror or error})', 'unwritten')}")


def failures(rows: Sequence[Setting]) -> list:
    """Returns (variant, how it ended) of the runs without a result."""
    return [(variant, end) for row in rows for variant, end in row.runs if end is not None and end.status != "done"]


def _json(plan, rows, measure, sentence):
    """One object, with a line for each setting and each run."""
    settings = [
        {
            "label": row.label, **row.values, "status": row.status, "share": row.share,
            **{name: asdict(found) if (found := getattr(row, name)) else None
               for name in ("score", "loss", "std_ratio", "images_per_second")},
        }
        for row in rows
    ]  # fmt: skip
    runs = [asdict(end) for row in rows for _, end in row.runs if end is not None]
    lines = [f'"measure": {json.dumps(measure)}', f'"budget": {json.dumps(plan.budget)}']
    lines += [f'"best": {json.dumps(sentence)}']
    for name, found in (("settings", settings), ("runs", runs)):
        lines.append(f'"{name}": [\n' + ",\n".join(json.dumps(one) for one in found) + "\n]")
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()

"""Tables of README.md and RESULTS.md, made from `results/<date>_<machine>/<benchmark>.jsonl` and nothing else.

A table stands between `<!-- table: NAME -->` and `<!-- /table -->`; `gpu_tests` stands for the sentence that names the
last commit verified on a GPU. `python -m benchmarks.tables` writes what is between; with `--check` it writes nothing
and exits with 1 where a page would change. Each machine shows its newest folder that holds the benchmark. A line from a
checkout with changes is refused, because nobody could measure it again.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import readme
from benchmarks.experiments import lines as experiments
from benchmarks.harness.checkout import CHECKOUT
from benchmarks.harness.results import read_results
from benchmarks.race import methods, standings
from benchmarks.readme.captions import ABSENT, NOTHING, VERSIONS, caption, number, param
from fastsiam.errors import UserError

MARKER = re.compile(r"<!-- table: (\w+) -->\n(.*?)<!-- /table -->", re.DOTALL)
OPENING = "<!-- table:"
PAGES = (CHECKOUT / "README.md", CHECKOUT / "benchmarks/RESULTS.md")
FOLDER = re.compile(r"\d{4}-\d{2}-\d{2}_(.+)")
GPU_TESTS = "gpu_tests"

# Keys that the lines of one file must share, because the caption has them once.
_ONE_RUN = ("gpu", "driver", "cpu", "cores", "threads", "commit", "python", *VERSIONS)


@dataclass(frozen=True)
class Column:
    """Number of a result line. `spread` adds [p20, p80], of a time or of a rate that is proportional to 1 / time."""

    header: str
    key: str
    scale: float = 1.0
    unit: str = ""
    spread: bool = False

    def text(self, line: dict) -> str:
        if ABSENT in line:
            return ABSENT
        value = line.get(self.key)
        if value is None:
            return NOTHING
        if isinstance(value, str):
            return value
        value = value if self.scale == 1 else value * self.scale
        text = number(value) + self.unit
        if not self.spread:
            return text
        low, high = line["p20_seconds"] / line["median_seconds"], line["p80_seconds"] / line["median_seconds"]
        if not self.key.endswith("seconds"):
            low, high = 1 / high, 1 / low
        return f"{text} [{number(value * low)}, {number(value * high)}]"


@dataclass(frozen=True)
class Table:
    """One table: its benchmark, its rows in their order, its columns."""

    benchmark: str
    columns: tuple[Column, ...]
    baseline: str | None = None
    """The variant that a last column compares with, among rows of equal params."""
    rows: tuple[str, ...] | None = None
    """Variants in order, absent ones included; None: all of the file, in its order."""
    without: tuple[str, ...] = ()
    """Variants that another table shows; used where `rows` is None."""
    rows_of: Callable[[list[dict]], list[dict]] | None = None
    """Makes rows out of lines, where a row is not a line."""
    speed: str | None = None
    """The number whose ratio the last column shows; None: 1 / median_seconds."""


MS = Column("ms [p20, p80]", "median_seconds", scale=1000, spread=True)
IMAGES = Column("images/s [p20, p80]", "images_per_second", spread=True)
MEMORY = Column("peak MiB", "peak_memory_bytes", scale=2**-20)
LAUNCHES = Column("launches", "launches")
BANDWIDTH = (
    Column("GB/s", "gigabytes_per_second"),
    Column("of the copy bandwidth", "share_of_copy_bandwidth", scale=100, unit=" %"),
)

STEP = (
    IMAGES,
    Column("TFLOP/s", "teraflops_per_second"),
    *(Column(f"of {level}", f"share_of_{level}", scale=100, unit=" %") for level in ("L0", "L1", "L4", "L6")),
    MEMORY,
    LAUNCHES,
    Column("first step, s", "first_step_seconds"),
)
LOADER = (IMAGES, Column("CPU ms an image", "cpu_seconds_per_image", scale=1000))
TRAFFIC = (
    LAUNCHES,
    Column("GB", "bytes", scale=1e-9),
    Column("MB an image", "bytes_per_image", scale=1e-6),
    Column("TFLOP", "operations", scale=1e-12),
    Column("ms at least", "predicted_seconds", scale=1000),
    Column("images/s at most", "images_per_second"),
    Column("peak GB", "peak_activation_bytes", scale=1e-9),
    Column("bytes, ratio", "bytes_ratio", unit="x"),
    Column("launches, ratio", "launches_ratio", unit="x"),
)
END_TO_END = (IMAGES, Column("limit", "limit"), Column("of the limit", "share_of_limit", scale=100, unit=" %"))
DISTRIBUTED = (
    MS,
    IMAGES,
    Column("of no communication", "share_of_silent", scale=100, unit=" %"),
    Column("of one process", "efficiency", scale=100, unit=" %"),
    Column("graphs", "graphs"),
    Column("first step, s", "first_step_seconds"),
)
RACE = (
    Column("kNN, %", "knn"),
    Column("s to the target", "seconds_to_target"),
    Column("reached it", "reached"),
    Column("images/s", "images_per_second"),
    Column("best base_lr", "base_lr"),
    Column("precision", "precision"),
    Column("memory", "memory_format"),
    Column("loader", "loader"),
)
METHODS = (
    *(Column(name.replace("_", " "), name) for name in methods.COMPONENTS),
    Column("kNN, %", "knn"),
    Column("images/s", "images_per_second"),
    MEMORY,
    Column("best base_lr", "base_lr"),
    Column("protocol", "protocol"),
    Column("precision", "precision"),
)
MULTI_CROP = (
    IMAGES,
    Column("of two views", "share_of_two_views", unit="x"),
    Column("CPU ms an image", "cpu_seconds_per_image", scale=1000),
    Column("at least", "goal"),
)
NT_XENT = (
    MS,
    Column("of lightly's time", "time_of_lightly", unit="x"),
    MEMORY,
    Column("of lightly's memory", "memory_of_lightly", unit="x"),
    Column("goals", "goals"),
)
BUDGET = (
    Column("processes lived, s", "lived_seconds"),
    Column("of the budget", "lived_share", scale=100, unit=" %"),
    Column("by their own account", "spent_share", scale=100, unit=" %"),
    Column("steps", "steps"),
    Column("resumed at step", "resumed_at_step"),
)
LINEAR = (Column("s", "median_seconds"), Column("top-1, %", "top1"), Column("how", "description"))
PEERS = ("lightly", "lightly + bf16 + channels-last", "solo-learn")

TABLES = {
    "step": Table("step", STEP, baseline="authors", without=PEERS, speed="images_per_second"),
    "peers": Table("step", STEP, baseline="authors", rows=("authors", *PEERS, "fastsiam"), speed="images_per_second"),
    "loader": Table("loader", LOADER, baseline="authors", speed="images_per_second"),
    "end_to_end": Table("end_to_end", END_TO_END),
    "distributed": Table("distributed", DISTRIBUTED),
    "budget": Table("budget", BUDGET),
    "race": Table("time_to_accuracy", RACE, rows_of=standings.rows),
    "methods": Table("methods", METHODS, baseline="lightly", rows_of=methods.rows, speed="images_per_second"),
    "multi_crop": Table("multi_crop", MULTI_CROP),
    "nt_xent": Table("nt_xent", NT_XENT, baseline="lightly"),
    "linear": Table("linear", LINEAR, baseline="lightly"),
    "loss": Table("loss", (MS, *BANDWIDTH, MEMORY, LAUNCHES), baseline="eager"),
    "augment": Table(
        "augment", (MS, Column("ms a view", "ms_per_view"), *BANDWIDTH, MEMORY, LAUNCHES), baseline="eager"
    ),
    "knn": Table("knn", (MS, Column("top-1, %", "top1")), baseline="faiss IndexFlatIP"),
    "spectrum": Table(
        "spectrum", (Column("Spearman with kNN", "spearman"), Column("p", "p_value"), Column("last kNN, %", "knn_last"))
    ),
    "traffic": Table("traffic", TRAFFIC),
    "host": Table("host", (MS,)),
    "crop": Table("crop", (MS, Column("ms a crop", "ms_per_crop"), *BANDWIDTH, MEMORY, LAUNCHES), baseline="eager"),
}


def read(path: Path) -> list[dict]:
    """Returns the lines of one run; raises `UserError` where two describe one row or the machine changes."""
    lines, seen = read_results(path), {}
    for place, line in enumerate(lines, 1):
        where, row = f"{path}:{place}", (line["variant"], _key(line))
        if row in seen:
            message = f"{where}: {line['variant']} {line['params']} is already in line {seen[row]}"
            raise UserError(message, code="same-row-twice")
        seen[row] = place
        differing = [key for key in _ONE_RUN if line["environment"].get(key) != lines[0]["environment"].get(key)]
        if differing:
            message = f"{where}: {', '.join(differing)} differ from line 1; a file holds one run"
            raise UserError(message, code="several-runs")
    return lines


def refuse_unrepeatable(path: Path, lines: list[dict]) -> None:
    """Raises `UserError` at the first line whose code cannot be checked out again."""
    for place, line in enumerate(lines, 1):
        if not line["environment"].get("commit"):
            raise UserError(f"{path}:{place}: no commit is recorded", code="no-commit")
        if line["environment"].get("dirty") is not False:
            raise UserError(f"{path}:{place}: the checkout had changes (dirty)", code="dirty")


def read_all(results: Path) -> dict[str, list[list[dict]]]:
    """Returns, by benchmark, the lines of each machine's newest run; machines are in the order of their names."""
    newest = {}
    for path in sorted(results.glob("*/*.jsonl")):
        folder = FOLDER.fullmatch(path.parent.name)
        if not folder:
            message = f"{path.parent}: the name is not <date>_<machine>; rename the folder, as in 2026-01-31_h200"
            raise UserError(message, code="folder-name")
        lines = read(path)
        refuse_unrepeatable(path, lines)
        if lines:
            newest[path.stem, folder[1]] = lines
    found = {}
    for (benchmark, _), lines in sorted(newest.items()):
        found.setdefault(benchmark, []).append(lines)
    return found


def render(table: Table, lines: list[dict]) -> str:
    """Caption and Markdown table of one file's lines; params that differ between lines are columns."""
    groups = {}
    for line in table.rows_of(lines) if table.rows_of else lines:
        groups.setdefault(_key(line), {})[line["variant"]] = line
    shown = [row for group in groups.values() for row in _rows(table, group)]
    names = list(dict.fromkeys(name for line in shown for name in line["params"]))
    values = {name: [line["params"].get(name) for line in shown] for name in names}
    varying = [name for name in names if any(value != values[name][0] for value in values[name])]
    columns = [column for column in table.columns if any(line.get(column.key) is not None for line in shown)]
    header = [*varying, "variant", *(column.header for column in columns)]
    header += [f"against {table.baseline}"] if table.baseline else []
    body = []
    for line in shown:
        cells = [param(line["params"].get(name)) for name in varying]
        cells += [line["variant"], *(column.text(line) for column in columns)]
        if table.baseline:
            cells.append(_ratio(table, line, groups[_key(line)].get(table.baseline)))
        body.append(cells)
    text_cells = len(varying) + 1
    rule = [*["---"] * text_cells, *["---:"] * (len(header) - text_cells)]
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *body))
    constant = {name: values[name][0] for name in names if name not in varying}
    return f"{caption(shown, constant)}\n\n{text}\n"


def fill(page: str, found: dict[str, list[list[dict]]], name: str) -> str:
    """Returns the text of a page with every marked table made anew; `name` is the page in error messages.

    Raises `UserError` for a marker without an end, an unknown table, or a table without results.
    """
    tables = MARKER.findall(page)
    if page.count(OPENING) != len(tables) or any(OPENING in body for _, body in tables):
        raise UserError(f"{name}: a '{OPENING} NAME -->' lacks its '<!-- /table -->'", code="marker-without-end")

    def replacement(match: re.Match) -> str:
        asked = match[1]
        if asked in SPECIAL:
            text = f"{SPECIAL[asked](found)}\n"
        elif asked not in TABLES:
            known = ", ".join([*TABLES, *SPECIAL])
            raise UserError(f"{name}: there is no table '{asked}'; write one of {known}", code="unknown-table")
        elif not found.get(TABLES[asked].benchmark):
            message = f"{name}: table '{asked}' has no lines in results/*/{TABLES[asked].benchmark}.jsonl"
            raise UserError(message, code="no-results")
        else:
            text = "\n".join(render(TABLES[asked], lines) for lines in found[TABLES[asked].benchmark])
        return f"<!-- table: {asked} -->\n{text}<!-- /table -->"

    return MARKER.sub(replacement, page)


def last_verified(found: dict[str, list[list[dict]]]) -> str:
    """Returns a sentence on the newest commit on which no test marked gpu failed or was skipped."""
    machines = found.get(GPU_TESTS, [])
    whole = [line for lines in machines for line in lines if line["passed"] and not line["failed"] + line["skipped"]]
    if not whole:
        return "No commit has been verified on a GPU yet."
    line = max(whole, key=lambda line: line["environment"]["date"])
    machine = line["environment"]
    mixed = "seen" if line["mixed_decoding"] else "not seen"
    return (
        f"Last commit verified on a GPU: {machine['commit'][:12]} on {machine['gpu']}, {machine['date'][:10]} "
        f"(torch {machine['torch']}): {line['passed']} tests passed, mixed decoding {mixed}."
    )


SPECIAL = {GPU_TESTS: last_verified, experiments.BENCHMARK: experiments.text, **readme.BLOCKS}
"""Blocks that do not show the lines of one benchmark."""


def _key(line: dict) -> str:
    return json.dumps(line["params"], sort_keys=True)


def _rows(table: Table, group: dict[str, dict]) -> list[dict]:
    """Returns the lines of one group of equal params in the table's order; a missing row of the table is absent."""
    if table.rows is None:
        return [line for variant, line in group.items() if variant not in table.without]
    like = next(iter(group.values()))
    stand_in = {"params": like["params"], "samples_seconds": [], "environment": like["environment"], ABSENT: ""}
    return [group.get(variant, {**stand_in, "variant": variant}) for variant in table.rows]


def _ratio(table: Table, line: dict, baseline: dict | None) -> str:
    """Returns how many times as fast as the baseline the line is."""
    if ABSENT in line or baseline is None or ABSENT in baseline:
        return ABSENT
    if table.speed is None:
        return f"{number(baseline['median_seconds'] / line['median_seconds'])}x"
    return f"{number(line[table.speed] / baseline[table.speed])}x"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description="Write the tables of results.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a page would change")
    parser.add_argument("--pages", type=Path, nargs="+", default=PAGES, help="Markdown files (README.md, RESULTS.md)")
    parser.add_argument("--results", type=Path, default=CHECKOUT / "benchmarks" / "results")
    arguments = parser.parse_args(argv)
    try:
        found = read_all(arguments.results)
        changed = {}
        for page in arguments.pages:
            before = page.read_text(encoding="utf-8")
            after = fill(before, found, page.name)
            if after != before:
                changed[page] = after
    except UserError as error:
        print(f"benchmarks: {error} [{error.code}]", file=sys.stderr)
        return 2
    for page, text in changed.items():
        if arguments.check:
            print(f"{page} differs from {arguments.results}; run python -m benchmarks.tables", file=sys.stderr)
        else:
            page.write_text(text, encoding="utf-8")
    return 1 if arguments.check and changed else 0


if __name__ == "__main__":
    sys.exit(main())

"""HTML page of one run or several, rendered from page.html.j2: no script, nothing fetched, the same bytes each time."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import fastsiam
from fastsiam.report import plots, summary, thumbnails
from fastsiam.report.read_run import AXES, Run

_FOLDER = Path(__file__).parent
# Two runs differ in where they lie; a reader asks for what they compute.
_PLACES = ("run.name", "run.dir", "run.fresh")


@dataclass(frozen=True)
class Column:
    """One column of the table that compares runs."""

    label: str
    value: Callable[[Run], str]
    is_number: bool = True
    always: bool = False
    """Shown even where no run has a value."""


COLUMNS = (
    Column("Status", lambda run: summary.status_of(run)[0], is_number=False),
    Column("kNN, %", lambda run: _percent(summary.knn_of(run))),
    Column("Untrained, %", lambda run: _percent(run.control("knn_top1"))),
    Column("Raw pixels, %", lambda run: _percent(run.control("raw_pixels_knn_top1"))),
    Column("Epochs", summary.epochs),
    Column("Images", lambda run: summary.count(run.last("images_seen"))),
    Column("Training time", summary.training_time),
    Column("Images/s", summary.rate),
    Column("kWh", lambda run: summary.significant(run.last("kwh")), always=True),
    Column("J/image", lambda run: summary.significant(summary.joules(run))),
    Column("Budget", lambda run: str(run.config.get("budget") or "–"), is_number=False),
    Column("Hardware", summary.hardware, is_number=False),
)


def page(runs: Sequence[Run], reload_seconds: float | None = None) -> str:
    """Returns the whole document; `reload_seconds`: a browser loads it again after so many, None: never."""
    environment = Environment(
        loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    panels = _panels(runs)
    return environment.get_template("page.html.j2").render(
        runs=runs,
        several=len(runs) > 1,
        reload=None if reload_seconds is None else max(1, round(reload_seconds)),
        resumed=any(run.of_kind("resume") for run in runs),
        columns=_columns(runs),
        panels=panels,
        axes=[axis for axis in AXES if any(axis in drawn for _, _, drawn in panels)],
        warnings=_warnings(runs),
        config=compare(runs, "config"),
        environment=compare(runs, "environment"),
        style=Markup((_FOLDER / "page.css").read_text(encoding="utf-8")),
        version=fastsiam.__version__,
        summary=summary,
        plots=plots,
        thumbnails=thumbnails,
    )


def compare(runs: Sequence[Run], of: str) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Returns keys of `config` or `environment` that differ, with a value for each run, and those in common."""
    flat = [{key: _shown(value) for key, value in getattr(run, of).items()} for run in runs]
    excluded = _PLACES if len(runs) > 1 else ()
    keys = dict.fromkeys(key for values in flat for key in values if key not in excluded)
    differing = {key: [values.get(key, "–") for values in flat] for key in keys if len({v.get(key) for v in flat}) > 1}
    return differing, {key: flat[0][key] for key in keys if key not in differing}


def _columns(runs):
    filled = [(column, [column.value(run) for run in runs]) for column in COLUMNS]
    return [(column, cells) for column, cells in filled if column.always or any(cell != "–" for cell in cells)]


def _panels(runs):
    """Panels with their captions and plots by axis, where a run has numbers for them."""
    found = []
    of = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    for panel in plots.PANELS:
        figures = {axis: plots.curves(panel, runs, axis) for axis in AXES}
        drawn = {
            axis: plots.to_svg(figure, f"{panel.key}-{axis}", f"{panel.title} of {of} over {axis}. {panel.caption}")
            for axis, figure in figures.items()
            if figure is not None
        }
        has_controls = len(runs) == 1 and panel.key == "knn" and runs[0].control("knn_top1") is not None
        caption = panel.caption + (f" Dashed: {runs[0].begins}; dotted: raw pixels." if has_controls else "")
        if drawn:
            found.append((panel, caption, drawn))
    return found


def _warnings(runs):
    """Warnings with their first step and how many times each came."""
    first, times = {}, Counter()
    for run in runs:
        for step, sentence in run.warnings:
            first.setdefault((run.name, sentence), step)
            times[run.name, sentence] += 1
    return [
        {
            "run": name,
            "sentence": sentence,
            "place": f"step {step:,}" if isinstance(step, int) else "before training",
            "times": times[name, sentence],
        }
        for (name, sentence), step in first.items()
    ]


def _percent(value):
    return "–" if value is None else f"{value:.2f}"


def _shown(value) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)

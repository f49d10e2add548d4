"""Page of a sweep, rendered from sweep.html.j2 in the style of a run's report: no script, nothing fetched."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import fastsiam
from fastsiam.errors import UserError
from fastsiam.report import plots, summary
from fastsiam.report.read_run import AXES, Run, open_run
from fastsiam.sweep import scores, table
from fastsiam.sweep.plan import Plan
from fastsiam.sweep.scores import Setting

# Settings whose curves are drawn, the best first: more could not be told apart.
DRAWN = plots.NUM_COLORS
_PANELS = ("knn", "rankme", "loss", "std_ratio")
_FOLDER = Path(__file__).parent
_STYLE = _FOLDER.parent / "report" / "page.css"


def page(plan: Plan, rows: Sequence[Setting], measure: str, title: str, sentence: str, command: str | None) -> str:
    """Returns the whole document.

    `measure`: what `rows` are compared by; `sentence`: which setting is best; `command`: what to type next, or None.
    """
    drawn = list(rows[:DRAWN])
    runs, looks = [], []
    for index, row in enumerate(drawn):
        for variant, _ in row.runs:
            with contextlib.suppress(UserError):
                runs.append(open_run(plan.folder / variant.name, variant.name))
                looks.append(index)
    panels = _panels(runs, looks, title)
    environment = Environment(
        loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("sweep.html.j2").render(
        title=title,
        plan=plan,
        measure=measure,
        sentence=sentence,
        command=command,
        rows=rows,
        drawn=drawn,
        columns=table.columns(plan, rows, measure),
        runs=_lines(plan, rows, measure),
        panels=panels,
        axes=[axis for axis in AXES if any(axis in of_axis for _, of_axis in panels)],
        plots=plots,
        style=Markup(_STYLE.read_text(encoding="utf-8")),
        version=fastsiam.__version__,
    )


def _panels(runs: Sequence[Run], looks: Sequence[int], title: str):
    found = []
    for panel in plots.PANELS:
        if panel.key not in _PANELS:
            continue
        drawn = {}
        for axis in AXES:
            figure = plots.curves(panel, runs, axis, looks)
            if figure is not None:
                label = f"{panel.title} of {title} over {axis}. {panel.caption}"
                drawn[axis] = plots.to_svg(figure, f"{panel.key}-{axis}", label)
        if drawn:
            found.append((panel, drawn))
    return found


def _lines(plan, rows, measure):
    """A line for each run, with a link to its own report where that was written."""
    found = []
    for row in rows:
        for variant, ended in row.runs:
            has_report = (plan.folder / variant.name / "report.html").is_file()
            found.append(
                {
                    "name": variant.name,
                    "link": f"{quote(variant.name)}/report.html" if has_report else None,
                    "tone": summary.STATUSES.get(ended.status, ("", "bad"))[1] if ended else "neutral",
                    "status": ended.status if ended else "unfinished",
                    "score": scores.number(scores.measured([ended and getattr(ended, measure)]), 2),
                    "loss": scores.number(scores.measured([ended and ended.loss]), 3).replace("-", "−"),
                    "step": "–" if ended is None or ended.step is None else f"{ended.step:,}",
                    "said": ended.said if ended else "",
                }
            )
    return found

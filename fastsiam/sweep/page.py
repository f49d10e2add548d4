"""Page of compared runs, rendered from sweep.html.j2 in the style of a run's report: no script, nothing fetched."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import fastsiam
from fastsiam.errors import UserError
from fastsiam.report import plots, summary
from fastsiam.report.read_run import AXES, Run, open_run
from fastsiam.sweep import scores, table
from fastsiam.sweep.ledger import Ended
from fastsiam.sweep.plan import Plan, Variant
from fastsiam.sweep.scores import Setting

# Settings whose curves are drawn, the first ones: more could not be told apart.
DRAWN = plots.NUM_COLORS
_PANELS = ("knn", "rankme", "loss", "std_ratio")
_FOLDER = Path(__file__).parent
_STYLE = _FOLDER.parent / "report" / "page.css"


@dataclass(frozen=True)
class Content:
    """What a page shows. Each row of `columns` is one setting with the runs of its seeds."""

    eyebrow: str
    title: str
    lead: str
    heading: str
    """Of the table, and of each setting in a sentence: `Settings`."""
    note: str
    """Beside the table: what its numbers are."""
    columns: Sequence[tuple[str, bool, list[str]]]
    """(heading, is a number, cells)"""
    labels: Sequence[str]
    """Of the settings, as the curves name them."""
    folders: Sequence[Sequence[Path]]
    """Run folders of each setting."""
    runs: Sequence[dict]
    """Lines of the last table, see `line_of`."""
    measure: str
    command: str | None = None
    """What to type next."""
    findings: Sequence[tuple[str, str, str]] = ()
    """(tone, word, sentence): `good`, `bad` or `neutral` before what was asked and found."""
    footer: str = ""
    axes: Sequence[str] = tuple(AXES)
    """Horizontal axes of the curves, the first one shown."""


def page(plan: Plan, rows: Sequence[Setting], measure: str, title: str, sentence: str, command: str | None) -> str:
    """Returns the whole document of a sweep.

    `measure`: what `rows` are compared by; `sentence`: which setting is best; `command`: what to type next, or None.
    """
    budget = f"; budget {plan.budget} in all, {plan.each} for a run that trains to its end" if plan.budget else ""
    return render(
        Content(
            eyebrow="Sweep",
            title=title,
            lead=sentence,
            heading="Settings",
            note=_note(plan, measure),
            columns=table.columns(plan, rows, measure),
            labels=[row.label for row in rows],
            folders=[[plan.folder / variant.name for variant, _ in row.runs] for row in rows],
            runs=[line_of(plan, variant, ended, measure) for row in rows for variant, ended in row.runs],
            measure=measure,
            command=command,
            footer=budget,
        )
    )


def render(content: Content) -> str:
    """Returns the whole document."""
    runs, looks = [], []
    for index, folders in enumerate(content.folders[:DRAWN]):
        for folder in folders:
            with contextlib.suppress(UserError):
                runs.append(open_run(folder, folder.name))
                looks.append(index)
    panels = _panels(runs, looks, content.title)
    environment = Environment(
        loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("sweep.html.j2").render(
        content=content,
        drawn=list(content.labels[:DRAWN]),
        panels=panels,
        axes=[axis for axis in content.axes if any(axis in of_axis for _, of_axis in panels)],
        plots=plots,
        style=Markup(_STYLE.read_text(encoding="utf-8")),
        version=fastsiam.__version__,
    )


def line_of(plan: Plan, variant: Variant, ended: Ended | None, measure: str, status: str | None = None) -> dict:
    """Returns a run's line of the last table, with a link to its own report where that was written.

    `status`: in place of that in `ended`.
    """
    has_report = (plan.folder / variant.name / "report.html").is_file()
    status = status or (ended.status if ended else "unfinished")
    return {
        "name": variant.name,
        "link": f"{quote(variant.name)}/report.html" if has_report else None,
        "tone": summary.STATUSES.get(status, ("", "bad"))[1] if ended else "neutral",
        "status": status,
        "score": scores.number(scores.measured([ended and getattr(ended, measure)]), 2),
        "loss": scores.number(scores.measured([ended and ended.loss]), 3).replace("-", "−"),
        "step": "–" if ended is None or ended.step is None else f"{ended.step:,}",
        "said": ended.said if ended else "",
    }


def _note(plan, measure):
    what = "kNN top-1 on data.val, which has chosen the best and is therefore a little high for it"
    if measure != "knn_top1":
        what = "RankMe of training images, measured without labels; more directions are better, and it is no accuracy"
    rounds = " Settings that were left out stand as they were in their last round." if len(plan.rounds) > 1 else ""
    return f"The best first. Mean ± sample standard deviation over n seeds; {what}.{rounds}"


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

"""Plots as inline SVG in the colours of the page: text takes `currentColor`, lines take CSS variables.

matplotlib draws with placeholder colours; each is replaced by its CSS name.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, ScalarFormatter

from fastsiam.report.read_run import Run

NUM_COLORS = 8
CLASS_MARKERS = ("o", "s", "^", "v", "D", "P", "X", "*", "<", ">")
DASHES = ((), (5, 1.6), (1.6, 1.2), (6, 1.4, 1.4, 1.4))

_INK, _GRID, _MUTED = "#010203", "#010204", "#010205"
_SERIES = [f"#0102{index + 16:02x}" for index in range(NUM_COLORS)]
_CLASSES = [f"#0102{index + 48:02x}" for index in range(len(CLASS_MARKERS))]
_CSS_NAMES = (
    {_INK: "currentColor", _GRID: "var(--grid)", _MUTED: "var(--muted)"}
    | {color: f"var(--s{index})" for index, color in enumerate(_SERIES)}
    | {color: f"var(--k{index})" for index, color in enumerate(_CLASSES)}
)
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fastsiam",
    "font.family": ["DejaVu Sans"],
    "font.size": 8,
    "axes.unicode_minus": True,
    "axes.formatter.useoffset": False,
    "text.parse_math": False,
    # Points; 40,000 noisy log lines then make a page of 1 MB that looks the same as at matplotlib's 1/9 with 1.8 MB.
    "path.simplify_threshold": 0.25,
}


@dataclass(frozen=True)
class Panel:
    """One plot of the curves: a field of one kind of line in metrics.jsonl."""

    key: str
    kind: str
    field: str
    title: str
    caption: str
    scale: float = 1.0
    from_zero: bool = True


PANELS = (
    Panel(
        "loss", "train", "loss", "Loss", "Negative cosine between p and the other view's z; −1 is full agreement.",
        from_zero=False,
    ),
    Panel(
        "knn", "knn", "knn_top1", "kNN accuracy", "Top-1 in percent: validation images against training images.",
        from_zero=False,
    ),
    Panel(
        "online_linear", "online_linear", "val_top1", "Online linear accuracy",
        "Top-1 in percent on validation images, of a classifier trained on features of the training views.",
        from_zero=False,
    ),
    Panel(
        "online_linear_train", "online_linear", "train_top1", "Online linear accuracy in training",
        "Top-1 in percent on the training views, before the classifier learned from them.", from_zero=False,
    ),
    Panel(
        "rankme", "spectrum", "rankme", "RankMe",
        "Directions that the features of training images use, measured without labels while training.",
    ),
    Panel(
        "alpha", "spectrum", "alpha", "Decay of the spectrum", "Eigenvalues of the features fall as rank to the −alpha."
    ),
    Panel("std_ratio", "collapse", "std_ratio", "Spread of z", "In evaluation mode: 1 is spread out, 0 is one point."),
    Panel("effective_rank", "collapse", "effective_rank", "Effective rank", "Directions that z uses; 1 is a line."),
    Panel(
        "mean_abs_cos", "collapse", "mean_abs_cos", "Similarity of different images",
        "Mean |cosine| between z of different images; 1 is one point.",
    ),
    Panel("lr", "train", "lr", "Learning rate", "Of the encoder, for the whole batch."),
    Panel("view_size", "train", "view_size", "Size of a view", "Pixels; loss and throughput change with it."),
    Panel("rate", "train", "images_per_second", "Throughput", "Images per second between log lines."),
    Panel(
        "wait", "train", "data_wait_fraction", "Waiting for data", "Percent of the training time.", scale=100
    ),
    Panel("energy", "train", "joules_per_image", "Energy", "Joules per image, as measured."),
)  # fmt: skip


def color_of(index: int) -> str:
    """Returns the CSS colour of the index-th run."""
    return f"var(--s{index % NUM_COLORS})"


def dashes_of(index: int) -> tuple[float, ...]:
    """Returns on and off lengths, in points, of the line of the index-th run; empty for a solid one."""
    return DASHES[index % len(DASHES)]


def curves(panel: Panel, runs: Sequence[Run], axis: str, looks: Sequence[int] | None = None) -> Figure | None:
    """Returns the plot of a panel on one of `AXES`, a line for each run that has the field; None if no run has.

    `looks`: which colour and dashes each run has, see `color_of`; None: its own. Runs of one look are seeds of one
    setting: each is thin, and their mean is drawn where all have come.
    """
    found = [(index, run.series(panel.kind, panel.field, axis)) for index, run in enumerate(runs)]
    found = [(index, series) for index, series in found if series is not None]
    if not found:
        return None
    divisor, unit = _time_unit(max(series.x.max() for _, series in found)) if axis == "time" else (1.0, "")
    with matplotlib.rc_context(_STYLE):
        figure, axes = _empty((4.0, 2.55), (0.125, 0.165, 0.855, 0.79))
        for index, series in found:
            look = looks[index] if looks else index
            seeds = [series for other, series in found if looks and looks[other] == look]
            is_seed = len(seeds) > 1
            _draw_run(axes, panel, runs[index], look, series, axis, divisor, alone=len(runs) == 1, thin=is_seed)
            if is_seed and series is seeds[-1]:
                _draw_mean(axes, panel, look, seeds, divisor)
        axes.set_xlabel({"time": f"training time, {unit}", "images": "images", "epochs": "epochs"}[axis], color=_INK)
        axes.set_xlim(0, max(series.x.max() for _, series in found) / divisor * 1.02 or 1)
        if panel.from_zero:
            axes.set_ylim(bottom=min(0.0, axes.dataLim.y0))
        axes.xaxis.set_major_locator(_locator())
        if axis == "images":
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    return figure


def _draw_run(axes, panel, run, index, series, axis, divisor, alone, thin):
    few = len(series.x) <= (2 if panel.kind == "train" else 60)
    axes.plot(
        series.x / divisor,
        series.y * panel.scale,
        color=_SERIES[index % NUM_COLORS],
        linewidth=0.5 if thin else 1.3,
        dashes=dashes_of(index) or (None, None),
        marker="o" if few and (not thin or len(series.x) == 1) else "",
        markersize=1.5 if thin else 2.6,
        label=f"run {index}",
    )
    for place in run.resumes(axis):
        mark = _MUTED if alone else _SERIES[index % NUM_COLORS]
        axes.axvline(place / divisor, color=mark, linewidth=0.8, dashes=(2, 2), label="resume")
    if alone and panel.key == "knn":
        for field, dashes in (("knn_top1", (4, 2)), ("raw_pixels_knn_top1", (1, 1.5))):
            value = run.control(field)
            if value is not None:
                axes.axhline(value, color=_MUTED, linewidth=1, dashes=dashes, label=field)


def _draw_mean(axes, panel, look, seeds, divisor):
    """The mean of seeds, between whose points each is a straight line."""
    begin, end = max(series.x[0] for series in seeds), min(series.x[-1] for series in seeds)
    places = np.unique(np.concatenate([series.x for series in seeds]))
    places = places[(places >= begin) & (places <= end)]
    values = [np.interp(places, series.x, series.y) for series in seeds]
    axes.plot(
        places / divisor, np.mean(values, 0) * panel.scale,
        color=_SERIES[look % NUM_COLORS], linewidth=1.8, dashes=dashes_of(look) or (None, None),
        marker="o" if len(places) == 1 else "", markersize=2.6, label=f"mean {look}",
    )  # fmt: skip


def projection(points: np.ndarray, labels: Sequence[str], explained: np.ndarray, classes: Sequence[str]) -> Figure:
    """Returns a plot of images as points [N, 2], with a colour and a marker for each of `classes`."""
    labels = np.asarray(labels)
    with matplotlib.rc_context(_STYLE):
        figure, axes = _empty((5.2, 4.0), (0.1, 0.11, 0.88, 0.87))
        for index, name in enumerate(classes):
            there = points[labels == name]
            kind = index % len(CLASS_MARKERS)
            axes.plot(
                there[:, 0], there[:, 1], linestyle="", marker=CLASS_MARKERS[kind], markersize=4,
                color=_CLASSES[kind], markeredgewidth=0, alpha=0.8, label=f"class {index}",
            )  # fmt: skip
        axes.set_xlabel(f"component 1, {100 * explained[0]:.1f} % of the variance", color=_INK)
        axes.set_ylabel(f"component 2, {100 * explained[1]:.1f} %", color=_INK)
        axes.xaxis.set_major_locator(_locator())
        axes.yaxis.set_major_locator(_locator())
    return figure


def to_svg(figure: Figure, key: str, label: str) -> Markup:
    """Returns the figure as an `<svg>` element; `key` makes its ids unique, `label` is what a screen reader reads."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="([^"]+)"', rf' id="{key}-\1"', svg)
    svg = re.sub(r'(href="|url\()#', rf"\g<1>#{key}-", svg)
    box = re.search(r'viewBox="([^"]+)"', svg)[1]
    svg = svg[svg.index(">") + 1 :].replace("xlink:href", "href")
    svg = re.sub(r"#0102[0-9a-f]{2}", lambda color: _CSS_NAMES.get(color[0], color[0]), svg).strip()
    return Markup('<svg viewBox="{}" role="img" aria-label="{}">').format(box, label) + Markup(svg)


def _empty(size, place):
    figure = Figure(figsize=size)
    FigureCanvasSVG(figure)
    axes = figure.add_axes(place)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    axes.grid(axis="y", color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, length=0, pad=4)
    axes.tick_params(axis="x", length=2.5, color=_GRID)
    axes.yaxis.set_major_locator(_locator())
    axes.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
    return figure, axes


def _locator():
    return MaxNLocator(5, steps=[1, 2, 2.5, 5, 10])


def _time_unit(seconds: float) -> tuple[float, str]:
    if seconds < 180:
        return 1.0, "seconds"
    return (60.0, "minutes") if seconds < 3 * 3600 else (3600.0, "hours")

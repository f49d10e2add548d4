"""kNN accuracy over wall-clock and over images, as PNG and SVG: a thin line a run, a thick one for their mean."""

import statistics
from pathlib import Path

from benchmarks.race.contestants import CONTESTANTS
from benchmarks.race.standings import Standing

# Okabe and Ito's, a brown and a grey, which colour-blind readers tell apart; a contestant has its own in every race.
_HEX = ("#D55E00", "#000000", "#8C564B", "#0072B2", "#009E73", "#56B4E9", "#7F7F7F", "#E69F00", "#CC79A7")
_COLOURS = dict(zip(CONTESTANTS, _HEX, strict=True))
_GREY = "#555555"


def draw(found: list[Standing], controls: list[dict], folder: Path, name: str) -> list[Path]:
    """Writes `folder`/`name`.png and .svg; returns their paths.

    `controls`: result lines with kNN without training, whose mean is a dotted line. Raises `ImportError` without
    matplotlib.
    """
    # Without a display; and pyplot would keep every figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for standing in found:
        colour = _COLOURS[standing.variant]
        for axes, column in ((left, 0), (right, 1)):
            curves = [run["curve"] for run in standing.runs]
            for curve in curves:
                axes.plot(*_line(curve, column), color=colour, alpha=0.35, linewidth=0.8)
            label = f"{standing.variant} (n = {len(curves)})"
            axes.plot(*_line(mean_curve(curves), column), color=colour, linewidth=2.2, label=label)
    for axes, text in ((left, "training time, s"), (right, "images")):
        axes.axhline(found[0].target, color=_GREY, linewidth=0.8, linestyle="--")
        if controls:
            untrained = statistics.fmean(line["untrained_knn"] for line in controls)
            axes.axhline(untrained, color=_GREY, linewidth=0.8, linestyle=":")
            axes.annotate("without training", (0.99, untrained), xycoords=("axes fraction", "data"),
                          xytext=(0, 3), textcoords="offset points", ha="right", color=_GREY, fontsize=8)  # fmt: skip
        axes.set_xlabel(text)
        axes.set_xlim(left=0)
        axes.grid(color="#DDDDDD", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_ylabel("kNN top-1, %")
    left.annotate(f"target {found[0].target:g} %", (0.01, found[0].target), xycoords=("axes fraction", "data"),
                  xytext=(0, 3), textcoords="offset points", color=_GREY, fontsize=8)  # fmt: skip
    right.xaxis.set_major_formatter("{x:,.0f}")
    left.legend(frameon=False, fontsize=8)
    params = found[0].params
    setting = f"{params['encoder']}, {params['size']} px, batch {params['batch']}"
    images = f"{params['images']:,} images of {params['data']}"
    minutes = f"{params['seconds'] / 60:g} minute" + ("" if params["seconds"] == 60 else "s")
    figure.suptitle(f"{setting}: {images}, {minutes} of training each", fontsize=10)
    paths = [folder / f"{name}.{ending}" for ending in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=150)
    return paths


def mean_curve(curves: list[list[tuple[float, int, float]]]) -> list[tuple[float, float, float]]:
    """Seconds, images and kNN, evaluation by evaluation."""
    return [
        tuple(statistics.fmean(column) for column in zip(*points, strict=True)) for points in zip(*curves, strict=True)
    ]


def _line(curve, column):
    return [point[column] for point in curve], [point[2] for point in curve]

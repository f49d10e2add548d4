"""The paper's Figure 2: loss, std_ratio and kNN over images, a thin line a seed, a thick one the mean."""

import statistics
from pathlib import Path

# Okabe and Ito's blue and vermilion, which colour-blind readers tell apart, then the others.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_PANELS = (("loss", "loss"), ("std_ratio", "std_ratio of z"), ("knn_top1", "kNN top-1, %"))


def draw(lines: list[dict], folder: Path, name: str) -> list[Path]:
    """Writes `folder`/`name`.png and .svg; returns their paths. `lines`: of one experiment."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    titles = list(dict.fromkeys(line["title"] for line in lines))
    for axes, (field, label) in zip(figure.subplots(1, len(_PANELS)), _PANELS, strict=True):
        for colour, title in zip(_COLOURS, titles, strict=False):
            curves = [line["curves"].get(field, []) for line in lines if line["title"] == title]
            for curve in curves:
                axes.plot(*_line(curve), color=colour, alpha=0.4, linewidth=0.8)
            axes.plot(*_line(mean_curve(curves)), color=colour, linewidth=2.2, label=f"{title} (n = {len(curves)})")
        axes.set_xlabel("images")
        axes.set_title(label, fontsize=10)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.grid(color="#DDDDDD", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=8)
    paths = [folder / f"{name}.{ending}" for ending in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=150)
    return paths


def mean_curve(curves: list[list]) -> list[tuple[int, float]]:
    """Mean of [images, value] at those images where all curves have a value."""
    known = [{images: value for images, value in curve if value is not None} for curve in curves]
    places = sorted(set.intersection(*(set(one) for one in known))) if known else []
    return [(images, statistics.fmean(one[images] for one in known)) for images in places]


def _line(curve):
    return [point[0] for point in curve], [point[1] for point in curve]

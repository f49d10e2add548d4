"""One HTML page of one run or several: no script, nothing fetched, the same bytes for the same folders."""

from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path

import fastsiam
from fastsiam.report import plots, summary, thumbnails
from fastsiam.report.read_run import AXES, Run
from fastsiam.report.thumbnails import outside

_STYLE = Path(__file__).with_name("page.css")
_WARNINGS_SHOWN = 100
# Where a run lies is no difference between two of them.
_PLACES = ("run.name", "run.dir", "run.fresh")


def page(runs: Sequence[Run]) -> str:
    """The whole document."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs: " + ", ".join(run.name for run in runs)
    parts = [_head_of_one(runs[0]) if len(runs) == 1 else _head_of_several(runs), _curves(runs)]
    for index, run in enumerate(runs):
        parts.append(_pictures(run, index, several=len(runs) > 1))
    parts += [_warnings(runs), _config(runs), _environment(runs)]
    footer = (
        f"<footer>fastsiam {outside(fastsiam.__version__)}, from metrics.jsonl of {len(runs)} run folder(s).</footer>"
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_STYLE.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in (*parts, footer) if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _head_of_one(run):
    text, tone = summary.status_of(run)
    result = summary.result(run)
    reason = run.status.get("reason")
    said = f'<p class="{tone}">{outside(reason)}</p>' if reason else ""
    facts = "".join(
        f'<div><dt>{fact.label}</dt><dd><span class="value">{outside(fact.value)}</span>'
        + (f"<small>{outside(fact.note)}</small>" if fact.note else "")
        + "</dd></div>"
        for fact in summary.facts(run)
    )
    return (
        f'<header>\n<p class="eyebrow">Pretraining run</p>\n<h1>{outside(run.name)}</h1>\n'
        f'<p class="lead"><span class="status {tone}">{outside(text)}</span>{_what(run)}</p>\n{said}'
        f'<div class="result"><span class="value">{outside(result.value)}</span>'
        f'<span><span class="label">{result.label}</span><small>{outside(result.note)}</small></span></div>\n'
        f'<dl class="facts">{facts}</dl>\n</header>'
    )


def _what(run):
    """What was trained, on what, in a few words."""
    config = run.config
    size = config.get("views.size")
    parts = [config.get("method.name"), config.get("model.encoder"), config.get("data.train")]
    parts += [f"{size} px" if size is not None else None]
    return "".join(f" · {outside(part)}" for part in parts if part is not None)


def _head_of_several(runs):
    columns = [
        ("Status", "", lambda run: _status(run)),
        ("kNN, %", "n", lambda run: _percent(summary.knn_of(run))),
        ("Untrained, %", "n", lambda run: _percent(run.control("knn_top1"))),
        ("Raw pixels, %", "n", lambda run: _percent(run.control("raw_pixels_knn_top1"))),
        ("Epochs", "n", summary.epochs),
        ("Images", "n", lambda run: summary.count(run.last("images_seen"))),
        ("Training time", "n", summary.training_time),
        ("Images/s", "n", summary.rate),
        ("kWh", "n", lambda run: _significant(summary.kwh(run))),
        ("J/image", "n", lambda run: _significant(summary.joules(run))),
        ("Budget", "", lambda run: outside(run.config.get("budget") or "–")),
        ("Hardware", "", lambda run: outside(summary.hardware(run))),
    ]
    # A column that no run fills tells nothing; energy stays, for its absence is asked for.
    kept = [
        column for column in columns
        if column[0] in ("kWh",) or any(column[2](run) not in ("–", outside("–")) for run in runs)
    ]  # fmt: skip
    head = "".join(f'<th scope="col" class="{kind}">{label}</th>' for label, kind, _ in kept)
    rows = "".join(
        f'<tr><th scope="row">{_swatch(index)} {outside(run.name)}</th>'
        + "".join(f'<td class="{kind}" data-of="{label}">{value(run)}</td>' for label, kind, value in kept)
        + "</tr>"
        for index, run in enumerate(runs)
    )
    return (
        f'<header>\n<p class="eyebrow">Pretraining runs</p>\n<h1>{len(runs)} runs compared</h1>\n'
        f'<table class="compared"><thead><tr><th scope="col">Run</th>{head}</tr></thead><tbody>{rows}</tbody></table>\n'
        "</header>"
    )


def _status(run):
    text, tone = summary.status_of(run)
    return f'<span class="status {tone}">{outside(text)}</span>'


def _percent(value):
    return "–" if value is None else f"{value:.2f}"


def _significant(value):
    return "–" if value is None else summary.significant(value)


def _swatch(index):
    dashes = " ".join(f"{2 * length:g}" for length in plots.dashes_of(index))
    return (
        '<svg class="swatch" viewBox="0 0 26 8" aria-hidden="true" style="display:inline-block">'
        f'<line x1="0" y1="4" x2="26" y2="4" style="stroke:{plots.color_of(index)};stroke-width:3" '
        f'stroke-dasharray="{dashes or "none"}"/></svg>'
    )


def _curves(runs):
    drawn = {panel.key: {axis: plots.curves(panel, runs, axis) for axis in AXES} for panel in plots.PANELS}
    axes = [axis for axis in AXES if any(drawing[axis] is not None for drawing in drawn.values())]
    if not axes:
        return '<section><h2>Curves</h2><p class="note">metrics.jsonl has no numbers yet.</p></section>'
    names = {"time": "Time", "images": "Images", "epochs": "Epochs"}
    switch = ""
    for axis in axes:
        edge = (" first" if axis == axes[0] else "") + (" last" if axis == axes[-1] else "")
        checked = " checked" if axis == axes[0] else ""
        switch += (
            f'<input type="radio" name="axis" id="axis-{axis}"{checked}>'
            f'<label class="axis{edge}" for="axis-{axis}">{names[axis]}</label>'
        )
    panels = "".join(_panel(panel, drawn[panel.key], runs) for panel in plots.PANELS)
    return (
        f"<section><h2>Curves</h2>\n{_legend(runs)}\n"
        f'<div class="curves"><span class="axis-label">Horizontal axis</span>{switch}\n'
        f'<div class="panels">{panels}</div></div></section>'
    )


def _panel(panel, drawn, runs):
    if not any(drawn.values()):
        return ""
    svgs = ""
    for axis, figure in drawn.items():
        if figure is not None:
            of = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
            label = escape(f"{panel.title} of {of} over {axis}. {panel.caption}")
            svg = plots.to_svg(figure, f"{panel.key}-{axis}", label)
            svgs += f'<div class="plot by-{axis}">{svg}</div>'
    caption = panel.caption
    if len(runs) == 1 and panel.key == "knn" and runs[0].control("knn_top1") is not None:
        caption += " Dashed: untrained; dotted: raw pixels."
    return f"<figure><figcaption><h3>{panel.title}</h3>{caption}</figcaption>{svgs}</figure>"


def _legend(runs):
    resumed = any(run.of_kind("resume") for run in runs)
    items = [] if len(runs) == 1 else [f"<li>{_swatch(i)} {outside(run.name)}</li>" for i, run in enumerate(runs)]
    if resumed:
        items.append(
            '<li><svg class="swatch" viewBox="0 0 26 8" aria-hidden="true"><line x1="13" y1="-4" x2="13" y2="12" '
            'style="stroke:var(--muted)" stroke-dasharray="3 3"/></svg> resumed</li>'
        )
    return f'<ul class="runs">{"".join(items)}</ul>' if items else ""


def _pictures(run, index, several):
    of = f" of {outside(run.name)}" if several else ""
    pictures = run.pictures
    step = f"{int(pictures['knn_step']):,}" if "knn_step" in pictures and pictures["knn_step"].ndim == 0 else "?"
    parts = []
    if pairs := thumbnails.pairs(pictures):
        parts.append(
            f'<section><h2>What the encoder saw{of}</h2><p class="note">Both views of the first images of the first '
            f"step, after augmentation, with the normalisation taken back.</p>{pairs}</section>"
        )
    if near := thumbnails.neighbours(pictures):
        parts.append(
            f'<section><h2>Nearest neighbours{of}</h2><p class="note">Validation images and the training images whose '
            f"features are most similar (cosine), at step {step}. A solid line marks the same class, a dashed one "
            f"another.</p>{near}</section>"
        )
    plot = thumbnails.projection(pictures, f"projection-{index}", lambda what: f"{run.name}: {what}")
    if plot:
        parts.append(
            f'<section><h2>Features in two dimensions{of}</h2><p class="note">Validation images of up to '
            f"{len(plots.CLASS_MARKERS)} classes, l2-normalised features on their first two principal components, "
            f"at step {step}.</p>{plot}</section>"
        )
    return "\n".join(parts)


def _warnings(runs):
    told = Counter()
    first = {}
    for run in runs:
        for step, sentence in run.warnings:
            key = (run.name if len(runs) > 1 else "", sentence)
            told[key] += 1
            first.setdefault(key, step)
    if not told:
        return '<section><h2>Warnings</h2><p class="note">None.</p></section>'
    items = []
    for (name, sentence), times in list(told.items())[:_WARNINGS_SHOWN]:
        at = f"step {first[name, sentence]:,}" if isinstance(first[name, sentence], int) else "before training"
        at += f", {times:,} times" if times > 1 else ""
        of = f"{outside(name)}: " if name else ""
        items.append(f'<li><span class="at">{at}</span><span>{of}{outside(sentence)}</span></li>')
    more = len(told) - _WARNINGS_SHOWN
    tail = f'<p class="note">And {more:,} more in metrics.jsonl.</p>' if more > 0 else ""
    return f'<section><h2>Warnings</h2><ul class="warnings">{"".join(items)}</ul>{tail}</section>'


def differing(runs: Sequence[Run], of: str = "config") -> list[str]:
    """The keys in which the configs (or `environment`s) of runs differ, in their order; where a run lies is none."""
    values = [getattr(run, of) for run in runs]
    keys = dict.fromkeys(key for one in values for key in one if key not in _PLACES)
    return [key for key in keys if len({_shown(one[key]) if key in one else None for one in values}) > 1]


def _config(runs):
    if not any(run.config for run in runs):
        return '<section><h2>Config</h2><p class="note">config.yaml is missing or cannot be read.</p></section>'
    if len(runs) == 1:
        return f"<section><h2>Config</h2>{_keys(runs[0].config)}</section>"
    keys, same = differing(runs), '<p class="note">Nowhere.</p>'
    return (
        f"<section><h2>Where the configs differ</h2>{_table(keys, runs, 'config') if keys else same}</section>\n"
        f"<section><h2>What the configs share</h2>{_keys(_shared(runs, keys, 'config'))}</section>"
    )


def _environment(runs):
    if not any(run.environment for run in runs):
        return ""
    keys = differing(runs, "environment")
    table = _table(keys, runs, "environment") if keys else ""
    return f"<section><h2>Environment</h2>{table}{_keys(_shared(runs, keys, 'environment'))}</section>"


def _shared(runs, keys, of):
    values = getattr(runs[0], of)
    return {key: value for key, value in values.items() if key not in keys and (len(runs) == 1 or key not in _PLACES)}


def _keys(values):
    rows = "".join(
        f"<div><dt>{outside(key)}</dt><dd>{outside(_shown(value))}</dd></div>" for key, value in values.items()
    )
    return f'<dl class="keys">{rows}</dl>'


def _table(keys, runs, of):
    head = "".join(f'<th scope="col">{_swatch(index)}<br>{outside(run.name)}</th>' for index, run in enumerate(runs))
    rows = "".join(
        f'<tr><th scope="row">{outside(key)}</th>'
        + "".join(
            f'<td data-of="{escape(run.name)}">{outside(_shown(getattr(run, of).get(key, "–")))}</td>' for run in runs
        )
        + "</tr>"
        for key in keys
    )
    return f'<table><thead><tr><th scope="col">key</th>{head}</tr></thead><tbody>{rows}</tbody></table>'


def _shown(value) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)

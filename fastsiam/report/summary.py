"""What a run came to, in words and numbers for a page: no HTML here."""

import math
from dataclasses import dataclass

from fastsiam.config.budget import JOULES, parse_budget
from fastsiam.report.read_run import Run, number
from fastsiam.run.progress_line import duration

# What status.json says, as a page says it: (text, tone).
STATUSES = {
    "done": ("done", "good"),
    "collapsed": ("collapsed", "bad"),
    "failed": ("failed", "bad"),
    "preempted": ("stopped on request, can go on", "neutral"),
    "running": ("running, or killed", "neutral"),
}


@dataclass(frozen=True)
class Fact:
    """One number of a run's headline."""

    label: str
    value: str
    note: str = ""


def status_of(run: Run) -> tuple[str, str]:
    """(text, tone: good | bad | neutral)."""
    said = run.status.get("status")
    return STATUSES.get(said, (str(said) if said is not None else "status unknown", "neutral"))


def knn_of(run: Run) -> float | None:
    """The last kNN accuracy, percent."""
    told = number(run.status.get("knn_top1"))
    return told if math.isfinite(told) else run.last("knn_top1", "knn", "end")


def result(run: Run) -> Fact:
    """The kNN accuracy with its controls, or what there is in its place."""
    knn, loss = knn_of(run), run.last("loss", "train")
    controls = [
        f"{run.control(field):.2f} % {of}"
        for field, of in (("knn_top1", "untrained"), ("raw_pixels_knn_top1", "on raw pixels"))
        if run.control(field) is not None
    ]
    if knn is not None:
        return Fact("kNN top-1", f"{knn:.2f} %", "against " + ", ".join(controls) if controls else "")
    if loss is not None:
        return Fact("Loss", f"{loss:.4f}".replace("-", "−"), "kNN was not measured")
    return Fact("Result", "none yet", "metrics.jsonl has no step")


def facts(run: Run) -> list[Fact]:
    """The headline's other numbers, always the same ones in the same order."""
    images = run.last("images_seen")
    return [
        _epochs(run, images),
        Fact("Images seen", count(images)),
        _time(run),
        Fact("Throughput", rate(run), "images/s while training"),
        _energy(run),
        *_budget(run),
        *_cost(run),
        _hardware(run),
    ]


def rate(run: Run) -> str:
    """Images per second over the whole training time."""
    images, seconds = run.last("images_seen"), run.last("train_seconds")
    if not images or not seconds:
        return "–"
    value = images / seconds
    return f"{value:,.0f}" if value >= 10 else f"{value:.2f}"


def kwh(run: Run) -> float | None:
    return run.last("kwh")


def joules(run: Run) -> float | None:
    """Per image over the run: of its last line where that tells it, else from kWh."""
    told, energy, images = run.last("joules_per_image", "end"), kwh(run), run.last("images_seen")
    if told is not None:
        return told
    if energy is not None and images:
        return energy * JOULES["kWh"] / images
    return run.last("joules_per_image")


def epochs(run: Run) -> str:
    """Epochs trained."""
    images = run.last("images_seen")
    if images is None or not run.images_per_epoch:
        return "–"
    return significant(images / run.images_per_epoch)


def hardware(run: Run) -> str:
    environment = run.environment
    ranks = int(number(environment.get("ranks"))) if number(environment.get("ranks")) > 1 else 1
    if environment.get("gpu") and environment.get("device") != "cpu":
        return (f"{ranks} × " if ranks > 1 else "") + str(environment["gpu"])
    cores = environment.get("cpu_cores")
    if cores is None:
        return "unknown"
    return f"CPU, {cores} cores" + (f", {ranks} processes" if ranks > 1 else "")


def count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def significant(value: float) -> str:
    """Three digits, without an exponent."""
    digits = 0 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{min(digits, 6)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def training_time(run: Run) -> str:
    seconds = run.last("train_seconds")
    return "–" if seconds is None else duration(seconds)


def _epochs(run, images):
    planned = run.config.get("train.epochs")
    return Fact("Epochs", epochs(run), f"of {planned}" if planned is not None else "")


def _time(run):
    wall = run.last("wall_seconds")
    return Fact("Training time", training_time(run), "" if wall is None else f"{duration(wall)} with evaluation")


def _energy(run):
    energy, per_image = kwh(run), joules(run)
    if energy is None and per_image is None:
        return Fact("Energy", "not available")
    if energy is None:
        return Fact("Energy", f"{significant(per_image)} J/image")
    note = "" if per_image is None else f"{significant(per_image)} J/image"
    return Fact("Energy", f"{significant(energy)} kWh", note)


def _budget(run):
    given = run.config.get("budget")
    if given is None:
        return []
    share = _share_spent(run, str(given))
    return [Fact("Budget", "–" if share is None else f"{100 * share:.1f} %", f"spent of {given}")]


def _share_spent(run, given):
    """Of the whole budget, as a run says when it ends; progress is of what evaluation leaves for training."""
    price = number(run.config.get("budget_price_per_hour"))
    try:
        budget = parse_budget(given, price if math.isfinite(price) else None)
    except ValueError:
        return None
    energy = kwh(run)
    spent = {
        "images": run.last("images_seen"),
        "seconds": run.last("spent_seconds"),
        "joules": None if energy is None else energy * JOULES["kWh"],
    }[budget.kind]
    return None if spent is None else spent / budget.amount


def _cost(run):
    """Of the process time, which a price is paid for; evaluation, saving and what a kill has lost are in it."""
    price, seconds = number(run.config.get("budget_price_per_hour")), run.last("spent_seconds")
    if not math.isfinite(price):
        return []
    value = "–" if seconds is None else f"{price * seconds / 3600:,.2f}"
    return [Fact("Cost", value, f"at {price:g} an hour")]


def _hardware(run):
    environment = run.environment
    chosen = [environment.get("dtype"), "compiled" if environment.get("compile") else None, environment.get("driver")]
    torch = f"torch {environment['torch']}" if environment.get("torch") else None
    return Fact("Hardware", hardware(run), ", ".join(str(part) for part in (*chosen[:2], torch) if part))

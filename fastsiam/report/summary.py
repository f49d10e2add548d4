"""Numbers and words that a page shows of a run; no HTML."""

import math
from dataclasses import dataclass

from fastsiam.config.budget import JOULES, parse_budget
from fastsiam.report.read_run import Run, number
from fastsiam.run.progress_line import duration

# Status in status.json: (text, tone).
STATUSES = {
    "done": ("done", "good"),
    "collapsed": ("collapsed", "bad"),
    "failed": ("failed", "bad"),
    "preempted": ("stopped on request, can be resumed", "neutral"),
    "running": ("running, or killed", "neutral"),
}


@dataclass(frozen=True)
class Fact:
    """One number of a run's headline."""

    label: str
    value: str
    note: str = ""


def status_of(run: Run) -> tuple[str, str]:
    """Returns (text, tone: good | bad | neutral)."""
    status = run.status.get("status")
    return STATUSES.get(status, ("status unknown" if status is None else str(status), "neutral"))


def subject(run: Run) -> list[str]:
    """Returns method, encoder, data and view size, as far as the config has them."""
    size = run.config.get("views.size")
    parts = [run.config.get(key) for key in ("method.name", "model.encoder", "data.train")]
    return [str(part) for part in (*parts, size and f"{size} px") if part is not None]


def knn_of(run: Run) -> float | None:
    """Returns the last kNN accuracy in percent."""
    last = number(run.status.get("knn_top1"))
    return last if math.isfinite(last) else run.last("knn_top1", "knn", "end")


@dataclass(frozen=True)
class Evaluation:
    """One row of the table of evaluations."""

    protocol: str
    images: str
    epoch: str
    """Of the weights: last or best."""
    features: str
    """online: measured by the run; offline: of the frozen encoder, by `fastsiam evaluate`."""
    step: str
    numbers: str


def evaluations(run: Run) -> list[Evaluation]:
    """Returns the last kNN of the run itself, and the results of `fastsiam evaluate` in the order of their times."""
    rows, knn = [], knn_of(run)
    if knn is not None:
        k, temperature = (run.config.get(f"evaluate.knn_{name}", "?") for name in ("k", "temperature"))
        images = str(run.config.get("data.val", "–"))
        numbers = f"top1 {knn:.2f} (k {k}, T {temperature})"
        rows.append(Evaluation("knn", images, "last", "online", count(run.last("step", "knn", "end")), numbers))
    for line in run.evaluations:
        names, data, encoder = line.get("results"), line.get("data"), line.get("encoder")
        if not isinstance(names, list) or not isinstance(data, dict) or not isinstance(encoder, dict):
            continue
        description = encoder.get("description")
        step = number(description.get("step") if isinstance(description, dict) else None)
        untrained = ", random weights" if encoder.get("untrained") else ""
        rows.append(
            Evaluation(
                str(line.get("protocol")) + untrained,
                str(data.get("val") or data.get("train") or "–"),
                str(line.get("epoch", "–")),
                str(line.get("features", "–")),
                count(step if math.isfinite(step) and not untrained else None),
                ", ".join(f"{name} {_number(line[name])}" for name in names if isinstance(name, str) and name in line),
            )
        )
    return rows


def _number(value) -> str:
    return f"{value:.2f}" if isinstance(value, float) else "none" if value is None else str(value)


def result(run: Run) -> Fact:
    """Returns the kNN accuracy with its controls; without one the loss."""
    knn, loss = knn_of(run), run.last("loss", "train")
    controls = [
        f"{run.control(field):.2f} % {of}"
        for field, of in (("knn_top1", run.begins), ("raw_pixels_knn_top1", "on raw pixels"))
        if run.control(field) is not None
    ]
    if knn is not None:
        return Fact("kNN top-1", f"{knn:.2f} %", "against " + ", ".join(controls) if controls else "")
    if loss is not None:
        return Fact("Loss", f"{loss:.4f}".replace("-", "−"), "kNN was not measured")
    return Fact("Result", "none yet", "metrics.jsonl has no step")


def facts(run: Run) -> list[Fact]:
    """Returns the headline's other numbers, always in the same order."""
    planned, wall = run.config.get("train.epochs"), run.last("wall_seconds")
    environment = run.environment
    software = [
        environment.get("dtype"),
        "compiled" if environment.get("compile") else None,
        f"torch {environment['torch']}" if environment.get("torch") else None,
    ]
    return [
        *_start(run),
        Fact("Epochs", epochs(run), "" if planned is None else f"of {planned}"),
        Fact("Images seen", count(run.last("images_seen"))),
        Fact("Training time", training_time(run), "" if wall is None else f"{duration(wall)} with evaluation"),
        Fact("Throughput", rate(run), "images/s while training"),
        _energy(run),
        *_budget(run),
        *_cost(run),
        Fact("Hardware", hardware(run), ", ".join(str(part) for part in software if part)),
    ]


def _start(run):
    """The weights that the run began with, and how many runs and files lie behind them."""
    weights = run.environment.get("weights")
    if not isinstance(weights, dict):
        return []
    earlier, depth = weights.get("earlier"), 0
    while isinstance(earlier, dict):
        earlier, depth = earlier.get("earlier"), depth + 1
    behind = f", itself begun from {depth} before it" if depth else ""
    note = f"{weights.get('matched')} tensors, sha256 {str(weights.get('sha256'))[:12]}{behind}"
    return [Fact("Started from", str(weights.get("source")), note)]


def rate(run: Run) -> str:
    """Returns images per second over the whole training time."""
    images, seconds = run.last("images_seen"), run.last("train_seconds")
    if not images or not seconds:
        return "–"
    value = images / seconds
    return f"{value:,.0f}" if value >= 10 else f"{value:.2f}"


def joules(run: Run) -> float | None:
    """Returns joules per image over the run: of its last line if that has them, else from kWh."""
    whole, energy, images = run.last("joules_per_image", "end"), run.last("kwh"), run.last("images_seen")
    if whole is not None:
        return whole
    if energy is not None and images:
        return energy * JOULES["kWh"] / images
    return run.last("joules_per_image")


def epochs(run: Run) -> str:
    """Returns epochs trained."""
    images = run.last("images_seen")
    return significant(None if images is None or not run.images_per_epoch else images / run.images_per_epoch)


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


def significant(value: float | None) -> str:
    """Returns three digits, without an exponent."""
    if value is None:
        return "–"
    digits = 0 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{min(digits, 6)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def training_time(run: Run) -> str:
    seconds = run.last("train_seconds")
    return "–" if seconds is None else duration(seconds)


def _energy(run):
    energy, per_image = run.last("kwh"), joules(run)
    each = None if per_image is None else f"{significant(per_image)} J/image"
    if energy is None:
        return Fact("Energy", each or "not available")
    return Fact("Energy", f"{significant(energy)} kWh", each or "")


def _budget(run):
    given = run.config.get("budget")
    if given is None:
        return []
    share = _share_spent(run, str(given))
    return [Fact("Budget", "–" if share is None else f"{100 * share:.1f} %", f"spent of {given}")]


def _share_spent(run, given):
    """Share of the whole budget, as the end of a run prints it; progress is a share of the part left for training."""
    price = number(run.config.get("budget_price_per_hour"))
    try:
        budget = parse_budget(given, price if math.isfinite(price) else None)
    except ValueError:
        return None
    energy = run.last("kwh")
    spent = {
        "images": run.last("images_seen"),
        "seconds": run.last("spent_seconds"),
        "joules": None if energy is None else energy * JOULES["kWh"],
    }[budget.kind]
    return None if spent is None else spent / budget.amount


def _cost(run):
    """Price of the process time, which includes evaluation, saving and what a kill has lost."""
    price, seconds = number(run.config.get("budget_price_per_hour")), run.last("spent_seconds")
    if not math.isfinite(price):
        return []
    return [Fact("Cost", "–" if seconds is None else f"{price * seconds / 3600:,.2f}", f"at {price:g} an hour")]

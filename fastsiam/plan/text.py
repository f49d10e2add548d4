"""Text of a plan: the answer first, then what it is made of."""

from fastsiam.config import Config
from fastsiam.config.published import TABLE_4, batch_size_text
from fastsiam.optim.build import large_batch_warning
from fastsiam.plan.results import STAGES, Measured, Plan, Rate, Run


def text_of(plan: Plan, config: Config) -> str:
    """Returns all lines of a plan."""
    sections = [[_answer(plan)], _machine(plan, config), _rates(plan.measured), _batches(plan.measured)]
    sections += [_limit(plan), _parts(plan, config)]
    warning = large_batch_warning(config)
    sections[-1] += [f"note      {note}" for note in (*plan.measured.notes, warning) if note]
    return "\n\n".join("\n".join(lines) for lines in sections)


def spoken(seconds: float) -> str:
    """Returns a duration in two units at most: 0.4 s, 52 s, 12 min 5 s, 11 h 20 min, 3 d 4 h."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    for unit, size, part, smaller in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        whole, rest = divmod(round(seconds / smaller), size // smaller)
        if whole:
            return f"{whole} {unit}" + (f" {rest} {part}" if rest else "")
    return f"{round(seconds)} s"


def _answer(plan: Plan) -> str:
    run, parts = plan.run, []
    if run.kind == "epochs":
        epochs = _epochs(run.epochs)
        parts.append(f"{epochs} take{'s' if epochs == '1 epoch' else ''} {spoken(run.total)}")
    else:
        parts.append(_bought(run, plan.measured.energy) + (f" in {spoken(run.total)}" if run.steps else ""))
    parts.append(f"{STAGES[plan.limit.stage]} is the limit")
    if plan.budget:
        parts.append(_bought(plan.budget, plan.measured.energy))
    return "; ".join(parts) + "."


def _bought(run: Run, energy: str) -> str:
    if run.steps is None:
        return f"{run.asked} cannot be predicted, because energy is {energy}"
    if not run.steps:
        return f"{run.asked} is too little for one step: start-up and evaluation alone take {spoken(run.total)}"
    return f"{run.asked} buys {_epochs(run.epochs)}"


def _machine(plan: Plan, config: Config) -> list[str]:
    measured = plan.measured
    ranks = f", {measured.ranks} ranks" if measured.ranks > 1 else ""
    knn = f"{measured.val_images:,} for kNN" if measured.val_images else "no kNN"
    compiles = "on" if measured.compile else "off"
    batch, micro_batch = str(plan.batch_size), config.train.micro_batch
    if micro_batch:
        batch += f" in micro batches of {micro_batch}"
    return [
        f"fastsiam  {plan.fastsiam}, torch {plan.torch}, {measured.gpu or measured.device}{ranks}",
        f"data      {measured.images:,} images under {config.data.train}, {knn}",
        f"step      {config.method.name}, {config.model.encoder}, {_views(config)}, batch {batch}, {measured.dtype}, "
        f"compile {compiles}",
        f"loader    {measured.loader}",
        f"measured  in {spoken(measured.measuring_seconds)}, at batch {measured.measured_batch_size}",
    ]


def _views(config: Config) -> str:
    text = " + ".join(f"{views.count} x {views.full_size} px" for views in config.views)
    growing = " and ".join(f"{views.size} px" for views in config.views if len(views.sizes) > 1)
    return f"{text} (faster while {growing} grow)" if growing else text


def _rates(measured: Measured) -> list[str]:
    return [
        _row("images/s", "median", "lowest", "highest"),
        _rate_row("training", measured.images_per_second, "loader and step together"),
        _rate_row("step alone", measured.step_images_per_second, "on views that lie on the device"),
        *(_rate_row(f"loader alone, {one.name}", one.images_per_second, one.note or "") for one in measured.loaders),
    ]


def _batches(measured: Measured) -> list[str]:
    lines = [_row("batch, step alone", "median", "lowest", "highest", "learning rate")]
    for one in measured.batch_sizes:
        note = f"{one.learning_rate:.4g}" + (f"  {one.note}" if one.note else "")
        lines.append(_rate_row(f"{one.batch_size:,}", one.step_images_per_second, note))
    return lines


def _limit(plan: Plan) -> list[str]:
    measured, limit = plan.measured, plan.limit
    stages = ", ".join(f"{STAGES[name]} {1000 * seconds:.3g} ms" for name, seconds in measured.known_stages.items())
    how = "one after the other on the same cores" if measured.shares_cores else "side by side"
    lines = [
        f"an image  {stages}, each alone",
        f"limit     {STAGES[limit.stage]}; loader and step {how} allow {_digits(limit.expected)} images/s, training "
        f"reaches {100 * limit.share:.0f} % of that",
    ]
    for tip in plan.advice:
        gain = f"{tip.gain:.2f} times the images/s, from what was measured" if tip.gain else "not measured"
        lines.append(f"try       {tip.action}: {tip.cause} ({gain})")
    return lines


def _parts(plan: Plan, config: Config) -> list[str]:
    lines = [f"epoch     {plan.steps_per_epoch:,} steps, {spoken(plan.epoch_seconds)}"]
    for run in (plan.run, plan.budget):
        if run and run.steps is not None:
            lines += _run_lines(run, plan.measured, config)
    if plan.measured.joules_per_image is None:
        lines.append(f"energy    {plan.measured.energy}")
    if config.budget_price_per_hour is None:
        lines.append("cost      not known: set budget_price_per_hour to what an hour of all machines costs")
    return lines


def _run_lines(run: Run, measured: Measured, config: Config) -> list[str]:
    size = measured.checkpoint.bytes
    parts = [
        ("start", run.start),
        ("compilation", run.compile),
        ("training", run.train),
        (f"{run.knn_times} kNN", run.knn),
        (f"{run.collapse_times} collapse measures", run.collapse),
        (f"{run.save_times} checkpoints" + (f" of {size / 1e6:,.0f} MB" if size else ""), run.saves),
    ]
    text = " + ".join(f"{part} {spoken(seconds)}" for part, seconds in parts if seconds)
    epochs = "" if run.asked == _epochs(run.epochs) else f"{_epochs(run.epochs)}, "
    lines = [f"{run.asked:<9} {epochs}{run.steps:,} steps in {spoken(run.total)} = {text}"]
    if run.kwh is not None:
        lines.append(f"energy    {run.kwh:.3g} kWh at {run.watts:,.0f} W, {measured.joules_per_image:.3g} J/image")
    if run.cost is not None:
        lines.append(f"cost      {run.cost:,.2f} at {config.budget_price_per_hour:g} an hour")
    worth = [str(one) for one in run.published]
    if any(one.source == TABLE_4.source for one in run.published):
        worth.append(batch_size_text(config.train.batch_size))
    if worth:
        worth.append("these are results of others' runs of full length, not a prediction")
    if run.not_published:
        worth.append(run.not_published)
    return lines + [f"worth     {one}" for one in worth]


def _row(name: str, median: str, lowest: str, highest: str, note: str = "") -> str:
    return f"{name:<40}{median:>9}{lowest:>9}{highest:>9}  {note}".rstrip()


def _rate_row(name: str, rate: Rate | None, note: str) -> str:
    if rate is None:
        return _row(name, "-", "", "", note)
    spread = (_digits(rate.lowest), _digits(rate.highest)) if rate.windows > 1 else ("once", "")
    return _row(name, _digits(rate.median), *spread, note)


def _digits(number: float) -> str:
    """Formats three digits without an exponent."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _epochs(number: float) -> str:
    text = f"{number:,.0f}" if number >= 100 or number == int(number) else f"{number:.3g}"
    return f"{text} epoch" + ("" if text == "1" else "s")
